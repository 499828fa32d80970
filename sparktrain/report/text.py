"""A run in words."""

import math

from sparktrain.results import RunResult


def run_text(result: RunResult) -> str:
    """Its summary, a few lines."""
    s = result.summary()
    first, last = (math.nan if s[f"loss_{end}"] is None else s[f"loss_{end}"] for end in ("first", "last"))
    before, after = s["heldout_loss_before"], s["heldout_loss_after"]
    held = f"held-out loss {before:.4f} -> {after:.4f}\n" if before is not None else ""
    digests = "\n".join(f"digest        {name}: {digest}" for name, digest in s["digests"].items())
    skipped = f", {s['skipped_steps']} skipped for a loss that is no number" if s["skipped_steps"] else ""
    return (
        f"{s['steps']} steps{skipped}, {s['tokens']:,} tokens, {s['world_size']} ranks, "
        f"{s['num_parameters']:,} parameters\n"
        f"loss          {first:.4f} -> {last:.4f}\n"
        f"{held}"
        f"speed         {s['tokens_per_second']:,.0f} tokens/s; seconds: {s['compute_seconds']:.1f} compute, "
        f"{s['communication_seconds']:.1f} communication, {s['data_seconds']:.1f} data\n"
        f"bytes         payload {s['payload_bytes']:,}, sent {s['bytes_sent']:,}, received {s['bytes_received']:,} "
        f"per rank\n"
        f"{digests}\n"
        f"run directory {result.run_dir}"
    )
