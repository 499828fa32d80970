"""Parquet: rows are windows, read by row group, with labels and packed documents; the rest is named."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparktrain import plan, tokens
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec
from sparktrain.tokens import IGNORED, Shard, TokenFile, parquet, sources
from sparktrain.tokens.kept import Kept

ROWS, LENGTH = 23, 6
IDS = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 31 % 1000


def write(path: Path, columns: dict[str, Any], types: dict[str, pa.DataType] | None = None, group: int = 5) -> Path:
    arrays = {
        name: pa.array(list(map(list, rows)) if isinstance(rows, np.ndarray) else rows, (types or {}).get(name))
        for name, rows in columns.items()
    }
    pq.write_table(pa.table(arrays), path, row_group_size=group)
    return path


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int32()), pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.uint32(), LENGTH)],
)
@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_any_rows_are_read_back_in_row_major_order(tmp_path: Path, name: str, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"] * ROWS, name: IDS}, {name: kind})
    shard = tokens.inspect(str(path))
    size = kind.value_type.bit_width // 8
    assert shard == Shard(str(path), ROWS * LENGTH, size, "parquet", row_length=LENGTH)
    assert Shard.from_json(json.loads(json.dumps(asdict(shard)))) == shard
    file = TokenFile(shard)
    for first in range(ROWS):
        for last in range(first + 1, ROWS + 1):
            found = file.read(first * LENGTH, (last - first) * LENGTH)
            assert found.dtype == np.int64
            assert found.tolist() == IDS[first:last].ravel().tolist()
    file.close()


def test_psyches_preprocessed_rows_come_with_labels_positions_and_packed_documents(tmp_path: Path) -> None:
    labels = np.where(IDS % 3 == 0, IGNORED, IDS)
    packed = [[4, 2], [6], [1, 2], []] * 6
    cycle = [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    positions = np.array(cycle * 6)[:ROWS]
    columns = {"inputs": IDS, "labels": labels, "position_ids": positions, "sequence_lengths": packed[:ROWS]}
    path = write(tmp_path / "a.parquet", columns, {"sequence_lengths": pa.list_(pa.int32())})
    shard = tokens.inspect(str(path))
    assert shard.columns == ("labels", "position_ids", "sequence_lengths")
    assert Shard.from_json(json.loads(json.dumps(asdict(shard)))) == shard
    rows = [7, 2, 22, 3, 0]
    batch = tokens.read_sequences([(TokenFile(shard), row * LENGTH) for row in rows], LENGTH)
    assert batch.tokens.tolist() == IDS[rows].tolist()
    assert batch.labels is not None
    assert batch.labels.tolist() == labels[rows].tolist()
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == positions[rows].tolist()
    assert batch.sequence_lengths is not None
    assert [found.tolist() for found in batch.sequence_lengths] == [[6], [1, 2, 3], [1, 2, 3], [6], [4, 2]]
    # Neither what labels leave out nor what is first in a document is a target.
    assert batch.num_targets == int(((labels != IGNORED) & (positions > 0))[rows].sum()) < batch.tokens[:, 1:].size


def test_windows_without_labels_beside_some_with_them_predict_every_token(tmp_path: Path) -> None:
    plain = TokenFile(tokens.inspect(str(write(tmp_path / "a.parquet", {"input_ids": IDS}))))
    labelled = write(tmp_path / "b.parquet", {"input_ids": IDS, "labels": np.full_like(IDS, IGNORED)})
    batch = tokens.read_sequences([(plain, 0), (TokenFile(tokens.inspect(str(labelled))), 0)], LENGTH)
    assert batch.labels is not None
    assert batch.labels.tolist() == [IDS[0].tolist(), [IGNORED] * LENGTH]
    assert (batch.position_ids, batch.sequence_lengths) == (None, None)
    assert batch.num_targets == LENGTH - 1


@pytest.mark.parametrize(("window", "sequence_length"), [("overlap1", LENGTH - 1), ("psyche", LENGTH)])
def test_a_plan_of_rows_covers_each_row_once_per_epoch(tmp_path: Path, window: str, sequence_length: int) -> None:
    shards = tuple(tokens.inspect(str(write(tmp_path / f"{i}.parquet", {"input_ids": IDS + i}))) for i in range(2))
    spec = PlanSpec(shards, sequence_length, total_batch=2 * ROWS, steps=1, seed=3, window=window)
    assert (spec.num_microshards, spec.window_length) == (2 * ROWS, LENGTH)
    assert spec.target_tokens(0) == 2 * ROWS * (LENGTH - 1)
    assert PlanSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    files = {shard.path: TokenFile(shard) for shard in shards}
    rows = plan.rows(spec, 0, 2 * ROWS)
    found = tokens.read_windows([(files[row.path], row.start) for row in rows], spec.window_length)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, np.concatenate([IDS, IDS + 1]).tolist()))


def test_a_row_group_is_read_alone_and_once_for_all_windows_in_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.parquet", {"input_ids": rng.integers(0, 1000, (4000, 64))}, group=100)
    size = path.stat().st_size
    read: list[int] = []
    open_source = sources.open_source(str(path))

    class Counting:
        uri, descriptor = str(path), None

        def size(self) -> int:
            return open_source.size()

        def read(self, offset: int, length: int) -> bytes:
            read.append(length)
            return open_source.read(offset, length)

        def close(self) -> None:
            open_source.close()

    rows = parquet.Rows(tokens.inspect(str(path)), Counting())
    footer = sum(read)
    for row in (310, 399, 300):
        rows.read(row, row + 1)
    assert 0 < sum(read) - footer < 1.5 * size / 40
    assert footer < size / 4


def test_kept_row_groups_are_bounded(tmp_path: Path) -> None:
    shard = tokens.inspect(str(write(tmp_path / "a.parquet", {"input_ids": IDS}, group=1)))
    bytes_of_a_row = 8 * LENGTH + 8 * 2
    kept: Kept[parquet.Rows, Any] = Kept(5 * bytes_of_a_row)
    rows = parquet.Rows(shard, sources.open_source(shard.path), kept)
    assert rows.read(0, ROWS).tokens.tolist() == IDS.ravel().tolist()
    assert kept.numbers(rows) == [18, 19, 20, 21, 22]
    rows.read(18, 19)
    rows.read(0, 1)
    assert kept.numbers(rows) == [0, 18, 20, 21, 22]
    rows.close()
    assert not kept.numbers(rows)


UNEVEN = [list(range(LENGTH))] * 3 + [list(range(LENGTH - 1)), list(range(LENGTH + 1))]


@pytest.mark.parametrize(
    ("columns", "types", "message"),
    [
        ({"text": ["a"]}, {}, "has no column inputs or input_ids, it has text: rename"),
        ({"input_ids": [1, 2]}, {}, "has column input_ids of type int64, expected lists of integers"),
        ({"input_ids": [["a"]]}, {}, "has column input_ids of type list<.*string>, expected lists of integers"),
        ({"input_ids": [[[1]]]}, {}, "expected lists of integers"),
        ({"input_ids": [[1.5]]}, {}, "expected lists of integers"),
        ({"input_ids": [[1]], "labels": [1]}, {}, "has column labels of type int64"),
        ({"input_ids": []}, {"input_ids": pa.list_(pa.int32())}, "is empty, it has no row"),
        ({"input_ids": [[1, 2], [3]]}, {}, "has 2 rows of 3 tokens in column input_ids, expected rows of equal length"),
        ({"input_ids": UNEVEN}, {}, "in row group 0, column input_ids, row 3 of 5 values, expected 6: pack or pad it"),
        ({"input_ids": [[1], None]}, {}, "in row group 0, column input_ids, a row or value that is null"),
        ({"input_ids": [[1, None], [2, 3]]}, {}, "a row or value that is null: leave such rows out"),
        ({"input_ids": [[1, -2]]}, {}, "column input_ids, the value -2, expected 0 or more"),
        ({"input_ids": [[1, -100]]}, {}, "column input_ids, the value -100, expected 0 or more"),
        ({"input_ids": [[1, 2]]}, {"input_ids": pa.list_(pa.uint64())}, "unsigned 8-byte integers: write it as int64"),
        ({"input_ids": [[1, 2]], "labels": [[1, -7]]}, {}, "column labels, the value -7, expected 0 or more, or -100"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, {}, "column labels, row 0 of 1 values, expected 2"),
        ({"input_ids": [[1, 2]], "position_ids": [[-1, 0]]}, {}, "column position_ids, the value -1, expected 0 or"),
        ({"input_ids": [[1, 2]], "sequence_lengths": [[0, 2]]}, {}, "column sequence_lengths, the value 0, expected 1"),
        ({"input_ids": [[1, 2]], "sequence_lengths": [[2, 1]]}, {}, "a row 0 that sums to 3, more than its 2 tokens"),
    ],
)
def test_what_is_no_row_of_tokens_is_one_line(
    tmp_path: Path, columns: dict[str, Any], types: dict[str, pa.DataType], message: str
) -> None:
    refused(write(tmp_path / "a.parquet", columns, types), message)


def test_padding_is_refused_unless_labels_say_it_is_no_target(tmp_path: Path) -> None:
    columns = {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]}
    refused(write(tmp_path / "a.parquet", columns), "has tokens in row group 0 that attention_mask leaves out, padding")
    labelled = columns | {"labels": [[1, 2], [3, IGNORED]]}
    assert tokens.inspect(str(write(tmp_path / "b.parquet", labelled))).columns == ("labels",)
    full = {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 1]]}
    assert tokens.inspect(str(write(tmp_path / "c.parquet", full))).columns == ()


def test_large_ids_are_not_cast_down(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"input_ids": [[1, 2**40]]})
    assert TokenFile(tokens.inspect(str(path))).read(0, 2).tolist() == [1, 2**40]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "is no Parquet file that can be read"),
        (lambda content: content[: len(content) // 2], "is no Parquet file that can be read"),
        (lambda content: b"PAR1" + bytes(100), "is no Parquet file that can be read"),
        (lambda content: content[:4] + bytes(60) + content[64:], "is no Parquet file that can be read"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", {"input_ids": IDS})
    path.write_bytes(damage(path.read_bytes()))
    refused(path, message)


def test_a_file_truncated_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"input_ids": IDS})
    file = TokenFile(tokens.inspect(str(path)))
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"a\.parquet ends at byte 100, expected at least"):
        file.read(10 * LENGTH, LENGTH)


def test_a_part_of_a_row_is_refused(tmp_path: Path) -> None:
    file = TokenFile(tokens.inspect(str(write(tmp_path / "a.parquet", {"input_ids": IDS}))))
    for start, length in ((1, LENGTH), (0, LENGTH + 1)):
        with pytest.raises(DataError, match=re.escape(f"has rows of 6 tokens, asked for {length} from token {start}")):
            file.read(start, length)


def test_row_groups_too_large_to_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"input_ids": IDS})
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 80)
    refused(
        path, "has 30 values in row group 0, more than the 10 that are read at a time: write it with smaller row groups"
    )


def read_all(path: Path) -> None:
    shard = tokens.inspect(str(path))
    TokenFile(shard).read(0, shard.num_tokens)


def refused(path: Path, message: str) -> None:
    """Inspecting and reading ``path`` in full is one line that names it."""
    with pytest.raises(DataError, match=message) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
