"""The batch reader against a memcpy of the same bytes, and against other readers of the same tokens.

    python benchmarks/reader.py [--rounds 7] [--environment data/reader-venv]

Windows of 2,049 tokens of 2 bytes, in batches of 64, page cache hot. Ours reads an epoch by a plan on disk, each window
compared with the digest that it was planned with: in random order, and in blocks of 16 and in sequence, whose windows
are read together; from local shards, as stored, which is what comes out of the reader, and in int64, which is what
others give; and from a cache. Others, in an environment that is made once, and each in a process of its own:
datatrove's DatatroveFolderDataset, mosaicml-streaming's StreamingDataset (py1e), datasets' Dataset in numpy format, in
random order. All take turns in each round; medians of rounds, ratios to what was measured in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparktrain import plan, tokens
from sparktrain.atomic import write
from sparktrain.config import Data
from sparktrain.digests import file_of
from sparktrain.rundir import RunDir
from sparktrain.tokens import ds
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train.batches import Batches

LENGTH, BATCH, SHARDS, VOCAB = 2049, 64, 10, 50_000
# What others read in a round: they are slower.
WINDOWS = 6400
# mosaicml-streaming asks for older numpy and transformers and for every cloud's client; these are what it imports.
PACKAGES = (
    *("torch", "torchvision", "transformers", "datatrove", "datasets"),
    *("orjson", "Brotli", "python-snappy", "zstd", "xxhash", "catalogue"),
)
ALONE = ("mosaicml-streaming",)
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
OTHERS = ("datatrove", "streaming", "datasets")
Figure = dict[str, float]


def measured(read: Callable[[], int]) -> Figure:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens_ = read()
    return {"tokens": tokens_, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def prepare(path: Path, shards: int, per_shard: int) -> tuple[tokens.Shard, ...]:
    path.mkdir()
    for i in range(shards):
        ids = np.random.default_rng(i).integers(0, VOCAB, per_shard)
        ds.write(path / f"{i:05d}_00000_shuffled.ds", [ids], VOCAB, "random")
    return tuple(tokens.inspect(uri) for uri in tokens.find_shards(path))


def ours(path: Path, spec: plan.PlanSpec, cache: Path | None = None) -> tuple[Callable[[], int], Callable[[], int]]:
    """A pass over an epoch by a plan in ``path``: as stored, and in int64."""
    directory = RunDir(path)
    directory.plan.mkdir(parents=True)
    columns = zip(*plan.rows(spec, 0, spec.num_positions), strict=True)
    table = pa.table(dict(zip(plan.Assignment._fields, map(list, columns), strict=True)))
    pq.write_table(table, directory.plan / "part-0.parquet")
    directory.digests.mkdir()
    for number, shard in enumerate(spec.shards):
        stored = np.fromfile(shard.path.removeprefix("local://"), dtype="<u2")
        found = [crc32(stored[i * (LENGTH - 1) :][:LENGTH].data) for i in range((len(stored) - 1) // (LENGTH - 1))]
        write(file_of(directory.digests, number), np.array(found, dtype="<u4").tobytes())
    open_ = opener(Data(cache_dir=cache), known(spec.shards))

    def batches() -> Batches:
        return Batches(directory, spec, 0, 1, opener=open_, cached=cache is not None)

    cpu = torch.device("cpu")
    return (
        lambda: sum(batch.tokens.numel() for batch in batches()),
        lambda: sum(batch.to(cpu).tokens.numel() for batch in batches()),
    )


def readers(path: Path, shards: tuple[tokens.Shard, ...]) -> dict[str, Callable[[], int]]:
    steps = sum(plan.count_microshards(shard, LENGTH - 1) for shard in shards) // BATCH
    spec = plan.PlanSpec(shards, LENGTH - 1, BATCH, steps, seed=0)
    # The same files by a scheme that counts as elsewhere.
    far = tuple(
        replace(s, path=f"local://{s.path}", num_bytes=len(raw), sha256=sha256(raw).hexdigest())
        for s in shards
        for raw in [Path(s.path).read_bytes()]
    )
    source = np.concatenate([np.fromfile(shard.path, dtype="<u2") for shard in shards])
    target = np.empty_like(source)

    def memcpy() -> int:
        np.copyto(target, source)
        return len(source)

    found: dict[str, Callable[[], int]] = {"memcpy": memcpy}
    for name, changes in {"random": {}, "blocks of 16": {"block": 16}, "in sequence": {"order": "sequential"}}.items():
        chosen: Any = replace(spec, **changes)
        found[name], found[f"{name}, int64"] = ours(path / name, chosen)
        far_chosen = replace(chosen, shards=far)
        found[f"{name}, cache"], found[f"{name}, cache, int64"] = ours(path / f"{name} far", far_chosen, path / "cache")
    return found


def environment(where: Path) -> Path:
    """The Python of an environment with the others, as far as they can be installed."""
    python = where / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", where], check=True)
        for packages, options in ((PACKAGES, ()), (ALONE, ("--no-deps",))):
            for package in packages:
                command = [
                    python,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--constraint",
                    "constraints.txt",
                    *options,
                    package,
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(
                        f"{package} cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True
                    )
    return python


def started(python: Path, name: str, path: Path) -> "subprocess.Popen[str] | None":
    """Another reader, in a process of its own: some leave threads behind."""
    arguments = [name, path / "shards", path, LENGTH, BATCH, WINDOWS]
    command = [str(part) for part in (python, Path(__file__).with_name("reader_others.py"), *arguments)]
    pipe = subprocess.PIPE
    other = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    assert other.stdout
    problem = json.loads(other.stdout.readline())
    if not problem:
        return other
    other.communicate()
    print(f"{name} is left out: {problem}")
    return None


def asked(other: "subprocess.Popen[str]") -> Figure:
    assert other.stdin
    assert other.stdout
    print(file=other.stdin, flush=True)
    figure: Figure = json.loads(other.stdout.readline())
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=20_480_001, help="per shard")
    parser.add_argument("--environment", type=Path, default=Path("data/reader-venv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    python = environment(options.environment.absolute())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        found = readers(path, prepare(path / "shards", SHARDS, options.tokens))
        there = {name: started(python, name, path) for name in OTHERS}
        rounds: list[dict[str, Figure]] = []
        for i in range(options.rounds + 1):
            figures = {name: measured(read) for name, read in found.items()}
            figures |= {name: asked(other) for name, other in there.items() if other}
            rounds += [figures] if i else []  # the first fills the cache
        for other in filter(None, there.values()):
            other.communicate()
    report(rounds)


def report(rounds: list[dict[str, Figure]]) -> None:
    def median(name: str, kind: str, over: str = "") -> float:
        rates = [r[name]["tokens"] / r[name][kind] for r in rounds]
        bases = [r[over]["tokens"] / r[over][kind] if over else 1e6 for r in rounds]
        return statistics.median(rate / base for rate, base in zip(rates, bases, strict=True))

    others = [name for name in rounds[0] if name in OTHERS]
    header = "".join(f"{f'/ {name}':>14}" for name in ("memcpy", *others))
    print(f"{len(rounds)} rounds, million tokens a second{'':<6}{'wall':>8}{'CPU':>8}   wall ratios{header}")
    for name in rounds[0]:
        ratios = "".join(f"{median(name, 'wall', over):>14.3f}" for over in ("memcpy", *others))
        print(f"{name:<36}{median(name, 'wall'):>10.1f}{median(name, 'cpu'):>8.1f}{'':<14}{ratios}")
    for name in rounds[0]:
        ratios = "".join(f"{median(name, 'cpu', over):>14.3f}" for over in ("memcpy", *others))
        print(f"{name:<36}{'':>18}   CPU ratios {ratios}")


if __name__ == "__main__":
    main()
