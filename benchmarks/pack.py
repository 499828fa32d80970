"""How long it takes to write and to read a parameter pack, beside copying and hashing the same bytes.

    python benchmarks/pack.py [--millions 10] [--rounds 5]

A Llama of so many million parameters; medians of wall and of CPU seconds, files in the page cache.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparktrain.train import parameter_pack as packs


def model_of(millions: float) -> LlamaForCausalLM:
    """Layers of 1.05 million parameters and an embedding and a head of 1.02 each, as many as come closest."""
    layers = max(1, round((millions - 2.05) / 1.05))
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of(arguments.millions)
    with tempfile.TemporaryDirectory() as directory:
        pack, values = Path(directory) / "pack", Path(directory) / "pack" / "values.f32le"
        rows: dict[str, Callable[[], object]] = {
            "write": lambda: packs.write(pack, model, "schema"),
            "read and load": lambda: packs.load(pack, model),
            "copy the bytes": lambda: (Path(directory) / "copy").write_bytes(values.read_bytes()),
            "sha256 of them": lambda: hashlib.sha256(values.read_bytes()).digest(),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(arguments.rounds):
            for name, call in rows.items():
                began = time.perf_counter(), time.process_time()
                call()
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        print(f"{model.num_parameters():,} parameters, {values.stat().st_size / 1e6:.0f} MB, one thread")
        for name, taken in times.items():
            wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
            print(f"  {name:15s} {wall:6.3f} s, CPU {cpu:6.3f} s")


if __name__ == "__main__":
    main()
