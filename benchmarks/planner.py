"""Planning: rows per second, memory, and the ratio to writing a bare range of as many rows.

    python benchmarks/planner.py [--rows 100000 1000000 10000000] [--rounds 3]

Each number of rows is planned in a process of its own, whose Python driver and JVM are asked for their peak memory when
it has planned once. In local mode the JVM is driver and executors in one. Plan, range and a range made as wide as the
plan, eight columns that cost nothing to compute, are written in turn, to Parquet; medians over rounds, ratios over
pairs, of wall and of CPU seconds (of the JVM and its Python workers): those do not depend on what else runs.
The plan is one epoch of 1,000 shards, in batches of 512.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from pyspark.sql import SparkSession

from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.spark import planner
from sparktrain.tokens import Shard

SHARDS, BATCH, LENGTH = 1000, 512, 2048
WIDE = (
    "id div 512 step",
    "cast(id % 512 as int) slot",
    "id pos",
    "0 epoch",
    "id microshard_id",
    "concat('/data/corpus/', id div 10000) path",
    "id * 2048 start",
    "2049 length",
)


def spec_of(rows: int, block: int) -> PlanSpec:
    steps = rows // BATCH
    # A number of sequences that is no multiple of anything, so that cycles are walked.
    tokens = (steps * BATCH // SHARDS + 1) * LENGTH + 1
    shards = [Shard(f"/data/corpus/{i:05d}_00000_shuffled.ds", tokens, 2) for i in range(SHARDS)]
    return PlanSpec(tuple(shards), LENGTH, BATCH, steps, seed=1, block=block)


def java() -> psutil.Process:
    return next(p for p in psutil.Process().children(recursive=True) if p.name() == "java")


def cpu_seconds() -> float:
    """Of the JVM and the Python workers below it, all of which stay alive."""
    return sum(sum(p.cpu_times()[:4]) for p in [java(), *java().children(recursive=True)])


def seconds(fn: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU."""
    began, before = time.perf_counter(), cpu_seconds()
    fn()
    return time.perf_counter() - began, cpu_seconds() - before


def peak_mib() -> tuple[float, float]:
    """Most memory so far of this process, and of its JVM."""
    status = Path(f"/proc/{java().pid}/status").read_text()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure(rows: int, rounds: int, block: int, memory: str) -> dict[str, float]:
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.driver.memory", memory)
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    spec = spec_of(rows, block)
    plans, ranges, wides, peaks = [], [], [], []
    with tempfile.TemporaryDirectory() as path:
        positions = spark.range(spec.num_positions)
        bare, wide = positions.write.mode("overwrite"), positions.selectExpr(*WIDE).write.mode("overwrite")
        for i in range(rounds + 1):
            directory = RunDir(Path(path) / str(i))
            directory.path.mkdir()
            plans.append(seconds(lambda to=directory: planner.write_plan(spark, spec, to)))
            peaks.append(peak_mib())
            ranges.append(seconds(lambda: bare.parquet(f"file://{path}/bare")))
            wides.append(seconds(lambda: wide.parquet(f"file://{path}/wide")))
        size = sum(file.stat().st_size for file in directory.plan.glob("*.parquet"))

    def ratio(over: list[tuple[float, float]], kind: int) -> float:
        pairs = zip(plans[1:], over[1:], strict=True)  # the first round warms up
        return statistics.median(a[kind] / b[kind] for a, b in pairs)

    return {
        "rows": spec.num_positions,
        "seconds": statistics.median(wall for wall, _ in plans[1:]),
        "range": statistics.median(wall for wall, _ in ranges[1:]),
        "ratio": ratio(ranges, 0),
        "cpu": ratio(ranges, 1),
        "to_wide": ratio(wides, 0),
        "bytes": size / spec.num_positions,
        "python": peaks[0][0],  # of planning alone: what comes after it is rows that the JVM writes
        "jvm": peaks[0][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--memory", default="1g", help="heap of the JVM")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.rows[0], args.rounds, args.block, args.memory)))
        return
    options = ["--rounds", str(args.rounds), "--block", str(args.block), "--memory", args.memory, "--one"]
    for rows in args.rows:
        command = [sys.executable, __file__, "--rows", str(rows), *options]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        m = json.loads(said.splitlines()[-1])
        print(
            f"{m['rows']:>10,.0f} rows  {m['seconds']:6.2f} s, {m['rows'] / m['seconds']:>9,.0f} rows/s, "
            f"{m['ratio']:.2f} x a bare range ({m['range']:.2f} s), {m['cpu']:.2f} x its CPU, "
            f"{m['to_wide']:.2f} x a range as wide, {m['bytes']:.1f} bytes/row, "
            f"peak {m['python']:.0f} MiB Python driver, {m['jvm']:.0f} MiB JVM",
            flush=True,
        )


if __name__ == "__main__":
    main()
