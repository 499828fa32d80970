"""Other readers of the same tokens, for ``benchmarks/reader.py``, which runs this in an environment of its own.

    python reader_others.py READER DATA WORK LENGTH BATCH WINDOWS

Says as JSON what is wrong with the reader, or nothing; then answers each line with tokens, wall and CPU seconds of a
pass: WINDOWS windows in random order, in batches ``[BATCH, LENGTH]`` int64 tensors.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

DATA, WORK = Path(sys.argv[2]), Path(sys.argv[3])
LENGTH, BATCH, WINDOWS = (int(value) for value in sys.argv[4:7])


# A torchvision of another build than torch, which streaming imports for its pictures, lacks these.
VISION = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    VISION.define(f"{operator}(Tensor boxes) -> Tensor")


def windows():
    for shard in sorted(DATA.glob("*.ds")):
        tokens = np.fromfile(shard, dtype="<u2")
        yield from tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def batches_of(count):
    order = np.random.default_rng(0).permutation(count)[:WINDOWS]
    return [order[i : i + BATCH].tolist() for i in range(0, len(order) - BATCH + 1, BATCH)]


def datatrove():
    from datatrove.utils.dataset import DatatroveFolderDataset

    data = DatatroveFolderDataset(str(DATA), seq_len=LENGTH - 1, filename_pattern="*.ds", token_size=2)
    for batch in batches_of(len(data)):
        yield torch.stack([data[i]["input_ids"] for i in batch])


def streaming():
    from streaming import StreamingDataset

    data = StreamingDataset(
        local=str(WORK / "mds"), shuffle=True, shuffle_seed=0, batch_size=BATCH, num_canonical_nodes=1
    )
    batch = []
    for i, row in enumerate(data):
        if i == WINDOWS:
            break
        batch.append(torch.from_numpy(row["tokens"].astype(np.int64)))
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []


def write_streaming():
    from streaming import MDSWriter

    with MDSWriter(out=str(WORK / "mds"), columns={"tokens": f"ndarray:uint16:{LENGTH}"}) as out:
        for window in windows():
            out.write({"tokens": window})


def datasets():
    from datasets import load_from_disk

    data = load_from_disk(str(WORK / "arrow")).with_format("numpy")
    for batch in batches_of(len(data)):
        yield torch.from_numpy(data[batch]["tokens"].astype(np.int64))


def write_datasets():
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    rows = np.stack(list(windows()))
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), LENGTH)
    Dataset(InMemoryTable(pa.table({"tokens": column}))).save_to_disk(str(WORK / "arrow"))


READERS = {
    "datatrove": (datatrove, None),
    "streaming": (streaming, write_streaming),
    "datasets": (datasets, write_datasets),
}


def main():
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    read, write = READERS[sys.argv[1]]
    problem = ""
    try:
        if write:
            write()
        first = next(iter(read()))
        if first.shape != (BATCH, LENGTH) or first.dtype != torch.int64:
            problem = f"gave {first.shape} of {first.dtype}"
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(json.dumps(problem), file=said, flush=True)
    for _ in sys.stdin:
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        for batch in read():
            tokens += batch.numel()
        found = {"tokens": tokens, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), file=said, flush=True)


if __name__ == "__main__":
    main()
