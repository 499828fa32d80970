"""A run in words."""

import math
from typing import Any

from sparktrain.results import RunResult, shares
from sparktrain.results.records import PHASES


def run_text(result: RunResult) -> str:
    """Its summary, a few lines."""
    s = result.summary()
    first, last = (math.nan if s[f"loss_{end}"] is None else s[f"loss_{end}"] for end in ("first", "last"))
    before, after = s["heldout_loss_before"], s["heldout_loss_after"]
    held = f"held-out loss {before:.4f} -> {after:.4f}\n" if before is not None else ""
    sources = "".join(f"source        {line}\n" for line in shares.lines(s["sources"]))
    digests = "\n".join(f"digest        {name}: {digest}" for name, digest in s["digests"].items())
    skipped = f", {s['skipped_steps']} of them without an update" if s["skipped_steps"] else ""
    return (
        f"{s['steps']} steps{skipped}, {s['tokens']:,} tokens, {s['world_size']} ranks, "
        f"{s['num_parameters']:,} parameters\n"
        f"loss          {first:.4f} -> {last:.4f}\n"
        f"{held}{sources}"
        f"speed         {s['tokens_per_second']:,.0f} tokens/s; seconds: {s['compute_seconds']:.1f} compute, "
        f"{s['communication_seconds']:.1f} communication, {s['data_seconds']:.1f} data\n"
        f"{_phases(s)}"
        f"bytes         payload {s['payload_bytes']:,}, sent {s['bytes_sent']:,}, received {s['bytes_received']:,} "
        f"per rank{_fewer(s)}\n"
        f"{digests}\n"
        f"run directory {result.run_dir}"
    )


def _phases(summary: dict[str, Any]) -> str:
    told = [f"{summary[f'{name}_seconds']:.1f} {name}" for name in PHASES if summary[f"{name}_seconds"]]
    return f"optimizer     {summary['optimizer_seconds']:.1f} seconds: {', '.join(told)}\n" if told else ""


def _fewer(summary: dict[str, Any]) -> str:
    fp32, bf16 = summary["fewer_than_ring_fp32"], summary["fewer_than_ring_bf16"]
    if fp32 is None:
        return ""
    return f"; received {fp32:,.1f} times less than by a ring all-reduce in float32, {bf16:,.1f} in bfloat16"
