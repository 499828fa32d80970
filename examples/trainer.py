"""A trainer of one's own for ``inner_loop.command``: a rank's AdamW steps, by nothing but the files it is given.

    [inner_loop]
    command = ["python", "examples/trainer.py", "{job_manifest}", "--model", "DIR", "--micro-batch", "8"]

It ends with the parameters that the rank would have ended with, to the bit, where the flags say what the run's settings
say. Take it as a start: what matters is the job that comes in and the result that goes out, not what happens between.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("job", type=Path, help="{job_manifest}")
    flags.add_argument(
        "--model", required=True, help="Hugging Face directory or id; its config is read, not its weights"
    )
    flags.add_argument("--micro-batch", type=int, default=8)
    flags.add_argument("--weight-decay", type=float, default=0.1)
    flags.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95))
    flags.add_argument("--max-grad-norm", type=float, default=1.0)
    options = flags.parse_args()
    job = json.loads(options.job.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model), dtype=torch.float32)
    model.config.use_cache = False
    model.to(device).train()
    entries = read_parameters(model, Path(job["base_parameter_pack_path"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in entries)  # what the filter leaves out stays as it is
    optimizer = optimizer_of(model, options)
    if "inner_optimizer_state_path" in job:
        optimizer.load_state_dict(torch.load(job["inner_optimizer_state_path"], weights_only=True, map_location=device))
    losses, tokens = 0.0, 0
    for batch in job["batches"][: job["num_inner_steps"]]:
        loss, targets = train_step(model, optimizer, batch["payload"], options)
        losses, tokens = losses + loss, tokens + targets
    result = Path(job["result_manifest_path"])
    write_parameters(entries, job)
    torch.save(optimizer.state_dict(), result.with_name("optimizer.pt"))
    told = {
        "steps_completed": len(job["batches"][: job["num_inner_steps"]]),
        "metrics": {"loss": losses / tokens},
        "inner_optimizer_state_path": str(result.with_name("optimizer.pt")),
        "inner_optimizer_state_encoding": "application/x-torch",
    }
    # Under another name first: half a result is none.
    result.with_name("result.tmp").write_text(json.dumps(told))
    os.replace(result.with_name("result.tmp"), result)


def read_parameters(model: Any, pack: Path) -> dict[str, torch.Tensor]:
    """Copy the pack's tensors, one after the other by name, into the model; those that it has, by name."""
    manifest = json.loads((pack / "manifest.json").read_text())
    state = model.state_dict()
    entries = {name: state[name] for name in manifest["included_keys"]}
    values = torch.from_numpy(np.fromfile(pack / manifest["values_f32_le"], "<f4"))
    for tensor, part in zip(entries.values(), values.split([t.numel() for t in entries.values()]), strict=True):
        tensor.copy_(part.view(tensor.shape))
    return entries


def write_parameters(entries: dict[str, torch.Tensor], job: dict[str, Any]) -> None:
    """The pack of what was trained, with the manifest of the one that was given."""
    base, local = Path(job["base_parameter_pack_path"]), Path(job["output_parameter_pack_path"])
    local.mkdir()
    flat = torch.cat([tensor.float().flatten().cpu() for tensor in entries.values()])
    flat.numpy().astype("<f4").tofile(local / "values.f32le")
    (local / "manifest.json").write_bytes((base / "manifest.json").read_bytes())


def optimizer_of(model: Any, options: argparse.Namespace) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=tuple(options.betas), fused=True)


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, payload: dict[str, Any], options: argparse.Namespace
) -> tuple[float, int]:
    """One step on a batch; the sum of its losses, and of how many targets."""
    with np.load(payload["shard_paths"][0]) as file:
        arrays = {name: torch.from_numpy(file[name]).long().to(model.device) for name in file}
    tokens = arrays["tokens"]
    labels = arrays.get("labels", tokens)[:, 1:]
    targets, total = int((labels != -100).sum()), 0.0
    optimizer.zero_grad(set_to_none=True)
    for begin in range(0, len(tokens), options.micro_batch):
        part = slice(begin, begin + options.micro_batch)
        positions = {"position_ids": arrays["position_ids"][part, :-1]} if "position_ids" in arrays else {}
        logits = model(input_ids=tokens[part, :-1], **positions).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels[part].flatten(), reduction="sum")
        (loss * (1 / max(1, targets))).backward()
        total += float(loss)
    if options.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = payload["learning_rate"]
    optimizer.step()
    return total, targets


if __name__ == "__main__":
    main()
