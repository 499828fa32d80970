"""What orders cost and what they are worth: how random batches are, and how many ranges of the shards a step reads.

    python benchmarks/order.py [--sequences 1000003]

Batches of 256 from 100 equal files. For a uniform permutation: chi-squared of the mix of files per step 99, pairs of
neighbours that stay neighbours 1, autocorrelation 0.
"""

import argparse

import numpy as np

from sparktrain.plan import Ints, Order, psyche, shuffle

BATCH, FILES = 256, 100


def report(name: str, order: Ints) -> None:
    n = len(order)
    steps = order[: n - n % BATCH].reshape(-1, BATCH)
    counts = np.stack([np.bincount(step * FILES // n, minlength=FILES) for step in steps])
    chi = (((counts - BATCH / FILES) ** 2) / (BATCH / FILES)).sum(axis=1)
    neighbours = np.mean(np.abs(np.diff(order)) == 1) * n / 2
    radix = shuffle.radices(n)[1]
    lags = [1, 2, 3, 5, 8, 100, BATCH, radix - 1, radix, radix + 1]
    correlation = max(abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) for lag in lags)
    ranges = 1 + (np.diff(steps, axis=1) != 1).sum(axis=1)
    print(
        f"{name:<24} chi-squared {chi.mean():7.1f} (variance {chi.var():9.0f})  neighbours {neighbours:9.2f}  "
        f"autocorrelation {correlation:.3f}  {ranges.mean():6.1f} ranges per step"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=1_000_003)
    n = parser.parse_args().sequences
    everything = np.arange(n)
    report("numpy", np.random.default_rng(0).permutation(n))
    report("psyche", psyche.permutation(n, psyche.seed_bytes(42)))
    for rounds in (2, 3, 4, 6, 8):
        report(f"{rounds} rounds", shuffle.permute(everything, n, shuffle.round_keys(0, 0, rounds)))
    report("affine", (everything * int(n * 0.618) + 7) % n)
    for block in (2, 4, 8, 16, 32, 64):
        report(f"blocks of {block}", Order("shuffle", n, 0, block=block).in_epoch(0, everything))


if __name__ == "__main__":
    main()
