"""What DiLoCo and SparseLoCo cost beside the model and the network: CPU seconds, side by side with AdamW's.

    python benchmarks/diloco.py [--rounds 7] [--every 50]

Two gloo ranks of one thread, a Llama of 33.9 M parameters. A round's overhead is a step that ends with a sync less a
step of the inner AdamW, on the main thread's CPU clock: waiting costs nothing there, and the network has its own
threads. It is spread over the steps of a round, and compared with AdamW's update and with the whole step that AdamW
takes: forward, backward on 1,024 tokens, update. Rows alternate in one process; figures are medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from sparktrain.train.strategies.diloco import DiLoCo
from sparktrain.train.strategies.replicas.local_steps import LocalSteps
from sparktrain.train.strategies.sparseloco import SparseLoCo

SIZES = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}


def parameters_with_gradients() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = [p.shape for p in LlamaForCausalLM(LlamaConfig(**SIZES)).parameters()]
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return parameters


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def medians(rows: dict[str, Callable[[], object]], rounds: int, made: dict[str, LocalSteps]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 2):
        for name, call in rows.items():
            # Other gradients each time: where all weights move by the same, their choice takes longer.
            for group in made[name].inner.param_groups if name in made else []:
                for parameter in group["params"]:
                    parameter.grad.normal_(std=1e-3)
            seconds = cpu_seconds(call)
            if number >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def strategies() -> dict[str, LocalSteps]:
    def inner(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    made: dict[str, LocalSteps] = {}
    for name, settings in (
        ("DiLoCo, average", {"outer": "average"}),
        ("DiLoCo", {}),
        ("DiLoCo int8", {"compression": "int8"}),
        ("DiLoCo int4", {"compression": "int4"}),
    ):
        parameters = parameters_with_gradients()
        made[name] = DiLoCo(parameters, inner(parameters), sync_every=1, **settings)
    parameters = parameters_with_gradients()
    return made | {"SparseLoCo": SparseLoCo(parameters, inner(parameters), sync_every=1)}


def measure(rank: int, store: str, rounds: int, every: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    made = strategies()
    adamw = torch.optim.AdamW(parameters_with_gradients(), lr=1e-3, fused=True)
    seconds = medians({"AdamW": adamw.step} | {name: s.step for name, s in made.items()}, rounds, made)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    tokens = torch.randint(0, SIZES["vocab_size"], (8, 128))
    model_step = medians({"": lambda: model(tokens, labels=tokens).loss.backward()}, min(rounds, 3), {})[""]
    weights = sum(p.numel() for p in model.parameters())
    if rank == 0:
        update = seconds.pop("AdamW")
        step = model_step + update
        print(f"{weights / 1e6:.1f} M parameters, 2 ranks of one thread, rounds of {every} steps, median of {rounds}")
        print(f"  AdamW            update {1e9 * update / weights:6.2f} ns/parameter, whole step {step:.2f} s")
        for name, value in seconds.items():
            sync = value - update
            payload = made[name].traffic.payload_bytes // (rounds + 2)
            print(
                f"  {name:16s} sync   {1e9 * sync / weights:6.2f} ns/parameter, {payload:,} bytes; per step "
                f"{sync / every / update:.1%} of AdamW's update, {sync / every / step:.3%} of its whole step"
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        mp.spawn(measure, (store, arguments.rounds, arguments.every), nprocs=2)


if __name__ == "__main__":
    main()
