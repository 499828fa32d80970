"""Pipelines for other data: a dataset, a generator, a function of a lease, planned and trained on like shards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparktrain import cli, plan
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, DataError, SparktrainError
from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.tokens.sequences import IGNORED
from sparktrain.tokens.shard import Shard
from sparktrain.train import models, pipelines
from sparktrain.train.batches import Batches
from sparktrain.train.describe import describe
from tests import own_data
from tests.conftest import take_steps, tiny_argv

PAYLOAD = ("--data.payload", json.dumps({"start": 3}))
KINDS = [
    ("indexed", "tests.own_data:Plain", ()),
    ("generated", "tests.own_data:generate", ()),
    ("generated", "", ()),
    ("micro-epoch", "tests.own_data:micro_epoch", PAYLOAD),
]


def planned(run_dir: Path, kind: str, name: str, *more: str) -> tuple[RunDir, RunConfig, PlanSpec]:
    """A run directory with the plan that the driver would make, without Spark."""
    argv = tiny_argv(run_dir, run_dir, "--data.pipeline", kind, "--data.dataset", name, *more)
    config = cli.parse(RunConfig, argv)
    shard = Shard.from_json(json.loads(json.dumps(describe(config)["dataset"])))
    spec = PlanSpec((shard,), 32, config.train.total_batch, config.train.steps, config.run.seed)
    directory = RunDir(run_dir)
    directory.plan.mkdir(parents=True)
    rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
    pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
    return directory, config, spec


def batches(directory: RunDir, config: RunConfig, spec: PlanSpec, rank: int, world: int, first: int = 0) -> list[Any]:
    made = pipelines.planned(config, 512, spec)
    return list(Batches(directory, spec, rank, world, first, made=made))


@pytest.mark.parametrize(("kind", "name", "more"), KINDS)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks_nor_on_where_it_began(
    tmp_path: Path, kind: str, name: str, more: tuple[str, ...]
) -> None:
    run = planned(tmp_path / "run", kind, name, *more)
    alone = batches(*run, 0, 1)
    assert [batch.tokens.shape for batch in alone] == [(8, 33)] * 6
    for world in (2, 3, 8):
        shares = [batches(*run, rank, world) for rank in range(world)]
        for step, whole in enumerate(alone):
            assert torch.equal(torch.cat([share[step].tokens for share in shares]), whole.tokens)
    for early, late in zip(alone[4:], batches(*run, 0, 1, 4), strict=True):
        assert torch.equal(early.tokens, late.tokens)


@pytest.mark.parametrize(("kind", "name", "more"), KINDS)
def test_two_ranks_train_on_it_as_one_does(
    on_ranks: Callable[..., list[Any]], tmp_path: Path, kind: str, name: str, more: tuple[str, ...]
) -> None:
    run = planned(tmp_path / "run", kind, name, *more, "--train.steps", "20")

    def train(rank: int, size: int) -> Any:
        records, model, _ = take_steps(*run, rank, size)
        return records, models.digest(model)

    alone, together = on_ranks(1, train), on_ranks(2, train)
    assert together[0][1] == together[1][1]
    losses = [
        [
            sum(r.loss_sum for r in step) / sum(r.tokens for r in step)
            for step in zip(*(r for r, _ in ranks), strict=True)
        ]
        for ranks in (alone, together)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    if name:  # random tokens have nothing to learn
        assert losses[1][-1] < losses[1][0] - 0.5


def test_an_epoch_of_a_dataset_has_each_item_once(tmp_path: Path) -> None:
    run = planned(tmp_path / "run", "indexed", "tests.own_data:plain", "--train.steps", "7")  # 56 of 50 items
    seen = [tuple(row) for batch in batches(*run, 0, 1) for row in batch.tokens.tolist()]
    items = {tuple(item) for item in own_data.plain}
    assert len(items) == 50
    assert set(seen[:50]) == items
    assert seen[:50] != [tuple(item) for item in own_data.plain]


def test_nothing_generated_comes_twice_and_the_seed_decides_what_comes(tmp_path: Path) -> None:
    ramp = ("--train.batch-ramp", "[[2, 12]]", "--data.skip", '[{"steps": [1, 3]}]')
    _, _, spec = planned(tmp_path / "a", "generated", "tests.own_data:generate", *ramp)
    assert spec.num_microshards == 2 * 8 + 4 * 12 + 8 + 12
    a = [b.tokens for b in batches(*planned(tmp_path / "b", "generated", "", "--run.seed", "5"), 0, 1)]
    b = [b.tokens for b in batches(*planned(tmp_path / "c", "generated", "", "--run.seed", "6"), 0, 1)]
    assert len(torch.unique(torch.cat(a), dim=0)) == 48
    assert not torch.equal(torch.cat(a), torch.cat(b))
    again = planned(tmp_path / "d", "generated", "", "--data.sequences", "10")
    assert len(torch.unique(torch.cat([b.tokens for b in batches(*again, 0, 1)]), dim=0)) == 10


@pytest.mark.parametrize("name", ["Masked", "Labelled"])
def test_masked_tokens_do_not_count(on_ranks: Callable[..., list[Any]], tmp_path: Path, name: str) -> None:
    run = planned(tmp_path / "run", "indexed", f"tests.own_data:{name}")
    batch = batches(*run, 0, 1)[0]
    assert batch.num_targets == 8 * 16
    assert torch.equal(batch.labels, torch.where(torch.arange(33) > 16, batch.tokens, IGNORED))
    records = [records for records, *_ in on_ranks(2, lambda rank, size: take_steps(*run, rank, size)[:1])]
    assert [[r.tokens for r in own] for own in records] == [[4 * 16] * 6] * 2


def test_packed_documents_of_a_dataset_are_kept_apart(tmp_path: Path) -> None:
    directory, config, spec = planned(tmp_path / "run", "indexed", "tests.own_data:Packed")
    assert spec.packed
    batch = batches(directory, config, spec, 0, 1)[0]
    assert batch.position_ids is not None
    assert batch.position_ids[0].tolist() == [*range(20), *range(13)]


def test_arguments_reach_the_users_object(tmp_path: Path) -> None:
    more = ("--data.arguments", '{"start": 7}')
    a = batches(*planned(tmp_path / "a", "generated", "tests.own_data:generate"), 0, 1)
    b = batches(*planned(tmp_path / "b", "generated", "tests.own_data:generate", *more), 0, 1)
    assert torch.equal((a[0].tokens + 7) % 512, b[0].tokens)
    assert (
        planned(tmp_path / "c", "indexed", "tests.own_data:Plain", "--data.arguments", '{"count": 9}')[
            2
        ].num_microshards
        == 9
    )


def test_a_lease_says_what_is_wanted_of_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = planned(tmp_path / "run", "micro-epoch", "tests.own_data:micro_epoch", *PAYLOAD)
    leases: list[dict[str, Any]] = []

    def listen(lease: dict[str, Any]) -> Any:
        leases.append(json.loads(json.dumps(lease)))
        return [np.zeros(33, dtype=np.int64)] * len(lease["microshard_ids"])

    monkeypatch.setattr(own_data, "micro_epoch", listen)
    batches(*run, 1, 2)
    batches(*run, 1, 2)
    again, leases = leases[8:], leases[1:7]  # the first is a probe
    assert again == leases
    rows = [row for row in plan.rows(run[2], 0, 48) if row.slot >= 4]
    for step, lease in enumerate(leases):
        mine = [row for row in rows if row.step == step]
        assert lease["step"] == step
        assert lease["microshard_ids"] == [row.microshard_id for row in mine]
        assert lease["ordinals"] == [4, 5, 6, 7]
        assert lease["epochs"] == [0] * 4
        assert lease["payload"] == {"start": 3}
        assert (lease["sequence_length"], lease["window_length"], lease["vocab_size"]) == (32, 33, 512)
    assert len({lease["lease_id"] for lease in leases}) == 6


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "error", "message"),
    [
        ("indexed", "nowhere.data:Plain", "{}", ConfigError, "no module nowhere: put its directory on PYTHONPATH"),
        ("indexed", "tests.own_data:Plane", "{}", ConfigError, "tests.own_data has no Plane: it has .*"),
        ("indexed", "tests.own_data:Plain", '{"size": 3}', DataError, "Plain fails: TypeError: .*size"),
        ("indexed", "tests.own_data:Empty", "{}", DataError, "Empty has no items: give it some"),
        ("indexed", "tests.own_data:stream", "{}", DataError, "gives a .*, which has no items by number"),
        ("indexed", "tests.own_data:Plain", '{"length": 32}', DataError, r"item 0 of .* \[32\]: it must .* \[33\]"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "short"}', DataError, r"shape \[32\]: it must have shape \[33\]"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "floats"}', DataError, "type float64: it must be integers"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "pair"}', DataError, r"shape \[2, 33\]: it must have shape"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "mapping"}', DataError, "keys .'text'.: it must have input_ids"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "id"}', DataError, "has 600 at 7 of .* vocab_size is 512"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "raises"}', DataError, "item 0 .* fails: KeyError: 'shelf 7'"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "mask"}', DataError, "of its loss_mask: it must be 0 to 1"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "padding"}', DataError, "attention_mask leaves out: it must"),
        ("indexed", "tests.own_data:Wrong", '{"kind": "lengths"}', DataError, r"\[20, 20\]: it must sum to 33 tokens"),
        ("generated", "tests.own_data:VOCAB", "{}", DataError, "item 0 of .*VOCAB fails: TypeError: 'int' object"),
        ("micro-epoch", "tests.own_data:too_few", "{}", DataError, "gives 0 items for a lease of 1: give one for each"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_before_there_is_a_plan(
    tmp_path: Path, kind: str, name: str, arguments: str, error: type[SparktrainError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        planned(tmp_path / "run", kind, name, "--data.arguments", arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("id", "item 49 of .*Wrong has 600 at 7 of its input_ids"),
        ("raises", "item 49 of .*Wrong fails: KeyError"),
        ("columns", r"item 49 of .*Wrong has the columns \['labels'\], the first has \[\]: it must be alike"),
    ],
)
def test_an_item_that_is_wrong_is_named_when_it_is_read(tmp_path: Path, kind: str, message: str) -> None:
    arguments = ("--data.arguments", json.dumps({"kind": kind, "first": 49}), "--train.steps", "7")
    run = planned(tmp_path / "run", "indexed", "tests.own_data:Wrong", *arguments)
    with pytest.raises(DataError, match=message):
        batches(*run, 0, 1)


def test_a_dataset_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    _, config, spec = planned(tmp_path / "run", "indexed", "tests.own_data:Plain")
    (shard,) = spec.shards
    less = replace(spec, shards=(replace(shard, num_tokens=33 * 49),))
    with pytest.raises(DataError, match="Plain has 50 sequences with input_ids, and had 49 sequences with input_ids"):
        pipelines.planned(config, 512, less)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--data.pipeline", "indexed"), "data.pipeline is indexed, which needs data.dataset: give MODULE:ATTRIBUTE"),
        (("--data.dataset", "a:b"), "data.dataset is set, but data.pipeline sharded does not use it"),
        (("--data.pipeline", "indexed", "--data.dataset", "a.b"), "expected MODULE:ATTRIBUTE, as my_package.data:Dat"),
        (("--data.pipeline", "generated", "--data.payload", "{}"), None),
        (("--data.pipeline", "generated", "--data.payload", "[1]"), "data.payload is set, but data.pipeline generated"),
        (("--data.pipeline", "random"), "data.pipeline: input should be 'sharded', 'indexed', 'generated' or"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, argv: tuple[str, ...], message: str | None) -> None:
    argv = (*tiny_argv(tmp_path, tmp_path / "run"), *argv)
    if message is None:
        cli.parse(RunConfig, argv)
        return
    with pytest.raises(ConfigError, match=message):
        cli.parse(RunConfig, argv)


def test_a_job_trains_on_a_dataset_and_ends_in_one_line_where_it_cannot(spark: Any, job: Any, tmp_path: Path) -> None:
    argv = ("--data.pipeline", "indexed", "--data.dataset", "tests.own_data:Wrong", "--data.arguments")
    for arguments, expected in (('{"kind": "id"}', 3), ('{"kind": "id", "first": 50}', 0)):
        code, out, err = job("train", *tiny_argv(tmp_path, tmp_path / "run"), *argv, arguments)
        assert code == expected, err
        if code:
            assert "error: item 0 of tests.own_data:Wrong has 600 at 7 of its input_ids" in err.splitlines()[-1]
            assert not (tmp_path / "run").exists()
    assert "indexed tests.own_data:Wrong, 1,650 tokens, 50 sequences of 32" in out
    assert (tmp_path / "run" / "model" / "config.json").exists()
