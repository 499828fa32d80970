"""An external trainer as one would write it for burn_p2p: it knows the file formats, and nothing of sparktrain.

``python external_trainer.py JOB_JSON`` does H steps of AdamW on a small network and keeps the optimizer's state for the
next round. Its data is in the job: the seed in each batch's payload.
"""

import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], steps: int) -> float:
    """The loss of the last of ``steps`` steps."""
    loss = torch.tensor(0.0)
    for step in range(steps):
        seed = batches[step % len(batches)]["payload"]["seed"]
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = (net(inputs) - inputs[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def optimizer_of(net: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)


def selected(net: torch.nn.Module, job: Any) -> dict[str, torch.Tensor]:
    include, exclude = (job["state_dict_filter"][k] for k in ("include_globs", "exclude_globs"))
    return {
        key: value
        for key, value in sorted(net.state_dict().items())
        if value.is_floating_point()
        and (not include or any(fnmatch.fnmatchcase(key, glob) for glob in include))
        and not any(fnmatch.fnmatchcase(key, glob) for glob in exclude)
    }


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    assert os.environ["BURN_P2P_DILOCO_JOB_MANIFEST"] == sys.argv[1]
    assert os.environ["BURN_P2P_DILOCO_RESULT_MANIFEST"] == job["result_manifest_path"]
    assert "RANK" not in os.environ
    net = network()
    base = Path(job["base_parameter_pack_path"])
    manifest = json.loads((base / "manifest.json").read_text())
    values, at = torch.from_numpy(np.fromfile(base / manifest["values_f32_le"], "<f4")), 0
    for tensor in selected(net, job).values():
        tensor.copy_(values[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in selected(net, job))  # what is excluded is frozen
    optimizer = optimizer_of(net)
    if "inner_optimizer_state_path" in job:
        optimizer.load_state_dict(torch.load(job["inner_optimizer_state_path"], weights_only=True))
    loss = train(net, optimizer, job["batches"], job["num_inner_steps"])
    local = Path(job["output_parameter_pack_path"])
    local.mkdir()
    np.concatenate([t.numpy().ravel() for t in selected(net, job).values()]).astype("<f4").tofile(
        local / "values.f32le"
    )
    five = ("format", "model_schema_hash", "layout_hash", "parameter_count", "values_f32_le")
    (local / "manifest.json").write_text(json.dumps({key: manifest[key] for key in five}))
    state = Path(job["result_manifest_path"]).with_name("state.pt")
    torch.save(optimizer.state_dict(), state)
    result = {
        "steps_completed": job["num_inner_steps"],
        "metrics": {"loss": loss, "gradient": float("nan"), "device": "cpu"},
        "inner_optimizer_state_path": str(state),
        "inner_optimizer_state_encoding": "application/x-torch",
    }
    Path(job["result_manifest_path"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
