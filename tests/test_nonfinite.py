"""A loss that is not a number: the run stops, or leaves out that step and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparktrain import cli, plan, tokens
from sparktrain.changes import Change, Changes, changed
from sparktrain.config import RunConfig
from sparktrain.errors import Changed, Diverged
from sparktrain.plan import PlanSpec
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark.driver import run
from sparktrain.train import loop
from sparktrain.train.batches import Batches
from sparktrain.train.gradients import skip
from sparktrain.train.live import Live
from sparktrain.train.nonfinite import NonFinite
from sparktrain.train.requests import Requests
from sparktrain.train.world import World
from tests.conftest import take_steps, tiny_argv


@pytest.fixture
def poisoned(
    data: Path, planned: tuple[RunDir, PlanSpec], tmp_path: Path
) -> tuple[RunDir, PlanSpec, list[int], list[str]]:
    """A run of 6 steps of a model that gives no number where a certain token comes, which is in a few of the steps: its
    directory, its plan, those steps, and its arguments."""
    directory, spec = planned
    inputs = [set(batch.tokens[:, :-1].flatten().tolist()) for batch in Batches(directory, spec, 0, 1)]
    steps = {token: [i for i, seen in enumerate(inputs) if token in seen] for token in range(512)}
    token = next(token for token, where in steps.items() if 1 < len(where) < 4 and not {0, 1, 5} & {*where})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=512, **sizes))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    model.save_pretrained(tmp_path / "model")
    argv = [*tiny_argv(data, directory.path), "--model.from-pretrained", str(tmp_path / "model")]
    sizes_at = argv.index("--model.sizes")
    return directory, spec, steps[token], argv[:sizes_at] + argv[sizes_at + 2 :]


def requests_of(path: Path, world: World, local: bool, policy: str = "skip") -> Requests:
    config = RunConfig.model_validate({"train": {"on_nonfinite": policy, "max_skipped": 2}})
    live = Live(path, config, world, 0)
    return Requests(
        RunDir(path),
        world,
        local,
        live.waits,
        NonFinite(RunDir(path), world, live, local, False, lambda: 0).skips_loss,
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_whose_loss_is_no_number_is_skipped_and_no_other(
    on_ranks: Callable[..., list[Any]], poisoned: Any, world: int
) -> None:
    directory, spec, steps, argv = poisoned
    config = cli.parse(RunConfig, [*argv, "--train.on-nonfinite", "skip"])

    def rank_main(rank: int, size: int) -> Any:
        return loop.train_in(World(rank, size, torch.device("cpu"), "here"), directory, config, spec, 1)

    result = RunResult.merge(str(directory.path), on_ranks(world, rank_main))  # Diverged where ranks' digests differ
    losses = torch.tensor(result.table["loss"].to_pylist())
    assert torch.nonzero(~losses.isfinite()).flatten().tolist() == steps
    assert result.summary()["skipped_steps"] == len(steps)
    assert f"6 steps, {len(steps)} of them without an update" in result.report()
    model = AutoModelForCausalLM.from_pretrained(directory.model)
    weights = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    assert all(p.isfinite().all() for p in weights)
    assert int((~model.get_input_embeddings().weight.isfinite().all(dim=1)).sum()) == 1


def test_without_that_policy_it_stops(on_ranks: Callable[..., list[Any]], poisoned: Any) -> None:
    directory, spec, steps, argv = poisoned

    def rank_main(rank: int, size: int) -> str:
        world = World(rank, size, torch.device("cpu"), "here")
        with pytest.raises(Diverged) as caught:
            loop.train_in(world, directory, cli.parse(RunConfig, argv), spec, 1)
        return str(caught.value)

    (said,) = on_ranks(1, rank_main)
    assert said == f"loss is nan in step {steps[0]} on rank 0: lower optimizer.lr or check the data"


def test_too_many_in_a_row_stop_all_ranks(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    def rank_main(rank: int, size: int) -> list[str]:
        requests = requests_of(tmp_path, World(rank, size, torch.device("cpu"), "here"), False)
        nan = float("nan") if rank == 1 else 1.0
        said = [str(requests.agree(step, loss).skip) for step, loss in enumerate([1.0, nan, nan, 1.0, nan, nan])]
        with pytest.raises(Diverged) as caught:
            requests.agree(6, nan)
        return [*said, str(caught.value)]

    skipped = ["False", "True", "True", "False", "True", "True"]
    for rank, said in enumerate(on_ranks(2, rank_main)):
        what = "nan" if rank == 1 else "not a number"
        assert said == [
            *skipped,
            f"loss is {what} in step 6 on rank 1 and 2 before it: lower optimizer.lr or check the data",
        ]


def test_ranks_with_steps_of_their_own_skip_alone_and_stay_in_time_for_the_sync(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    def rank_main(rank: int, size: int) -> tuple[list[bool], int, bool, bool]:
        from sparktrain.train.strategies import STRATEGIES

        world = World(rank, size, torch.device("cpu"), "here")
        flags = ("--strategy.kind", "diloco", "--strategy.sync-every", "4")
        config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", *flags))
        torch.manual_seed(0)
        model: Any = torch.nn.Linear(8, 8)
        strategy: Any = STRATEGIES["diloco"].build(dict(model.named_parameters()), config.strategy, config.optimizer, 8)
        requests = requests_of(tmp_path, world, True)
        skips, still = [], True
        for step in range(8):
            asked = requests.agree(step, float("inf") if (rank, step) == (1, 2) else 1.0)
            skips.append(asked.skip)
            model(torch.ones(1, 8) * (rank + 1)).sum().backward()
            before = model.weight.detach().clone()
            if asked.skip:
                skip(model, strategy, 1e-2)
                still = torch.equal(before, model.weight)
            else:
                strategy.step(1e-2, 32)
            model.zero_grad(set_to_none=True)
        strategy.sync()  # Diverged where parameters differ
        return skips, strategy.steps, still, bool(model.weight.isfinite().all())

    first, second = on_ranks(2, rank_main)
    assert first == ([False] * 8, 8, True, True)
    assert second == ([step == 2 for step in range(8)], 8, True, True)


@pytest.mark.parametrize(("world", "more"), [(1, ()), (2, ()), (2, ("--strategy.kind", "distro"))])
def test_a_run_goes_back_to_its_checkpoint_and_leaves_out_what_led_there(
    on_ranks: Callable[..., list[Any]], poisoned: Any, world: int, more: tuple[str, ...]
) -> None:
    directory, spec, steps, argv = poisoned
    flags = ("--train.on-nonfinite", "rollback", "--checkpoint.every", "2")
    config = cli.parse(RunConfig, [*argv, *flags, *more])
    directory.claim(config)

    def rank_main(rank: int, size: int, generation: int) -> Any:
        try:
            return loop.train_in(World(rank, size, torch.device("cpu"), "here"), directory, config, spec, generation)
        except Changed as error:
            return str(error)

    left_out: list[list[int]] = []
    for step in steps:
        if all(step > last for _, last in left_out):
            left_out.append([step // 2 * 2, step])
            said = on_ranks(world, rank_main, directory.new_generation())
            back = f"back to the checkpoint after step {step // 2 * 2}, without the updates from there to this one"
            assert all(text.endswith(f"in step {step} on rank {text[-len(back) - 3]}: {back}") for text in said)
    result = directory.merge(on_ranks(world, rank_main, directory.new_generation()))
    assert Changes(directory.path).taken()[-1].values == {"train.left_out": left_out}
    assert result.summary()["skipped_steps"] == len({s for first, last in left_out for s in range(first, last + 1)})
    model = AutoModelForCausalLM.from_pretrained(directory.model)
    assert all(p.isfinite().all() for name, p in model.named_parameters() if "embed_tokens" not in name)


def test_what_is_left_out_counts_from_where_the_run_went_back_to_also_after_a_change(
    on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = RunConfig.model_validate({"train": {"on_nonfinite": "rollback", "max_skipped": 1, "left_out": [[3, 4]]}})
    changes = Changes(tmp_path)
    changes.ask("hot", config, changed(config, [Change("", "hot", {"optimizer.lr": 0.5})]))
    changes.take(100)

    def rank_main(rank: int, size: int) -> list[Any]:
        world = World(rank, size, torch.device("cpu"), "here")
        nonfinite = NonFinite(RunDir(tmp_path), world, Live(tmp_path, config, world, 50), False, False, lambda: 50)
        with pytest.raises(Changed, match="back to the checkpoint after step 50"):
            nonfinite.skips_loss(110, float("nan"), 0)
        live = Live(tmp_path, config, world, 50)
        seen = [(live.at(step).train.leaves_out(step), live.at(step).optimizer.lr) for step in (49, 50, 99, 110, 111)]
        nonfinite = NonFinite(RunDir(tmp_path), world, live, False, False, lambda: 50)
        with pytest.raises(Diverged, match="after going back 1 times"):
            nonfinite.skips_loss(120, float("nan"), 0)
        return seen

    for seen in on_ranks(2, rank_main):
        assert [left_out for left_out, _ in seen] == [False, True, True, True, False]
        assert [lr for _, lr in seen] == [config.optimizer.lr] * 3 + [0.5] * 2


def test_the_driver_starts_ranks_again_without_what_led_there(spark: Any, poisoned: Any) -> None:
    directory, _, steps, argv = poisoned
    shutil.rmtree(directory.path)
    argv = [*argv, "--train.on-nonfinite", "rollback", "--checkpoint.every", "2", "--launch.ranks", "2"]
    result = run(spark, cli.parse(RunConfig, argv))
    left_out = Changes(directory.path).taken()[-1].values["train.left_out"]
    assert left_out[0] == [steps[0] // 2 * 2, steps[0]]
    assert result.summary()["skipped_steps"] >= len(steps)
    assert directory.latest_generation() == 1 + len(left_out)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(
    on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    def rank_main(rank: int, size: int) -> bool:
        requests = requests_of(tmp_path, World(rank, size, torch.device("cpu"), "here"), False, "rollback")
        with pytest.raises(Diverged, match="in step 3 on rank 1, with no checkpoint to go back to"):
            requests.agree(3, float("nan") if rank == 1 else 1.0)
        return True

    assert on_ranks(2, rank_main) == [True, True]


def test_updates_are_left_out_where_the_settings_say_so(
    trained_at: Callable[..., tuple[list[Any], Any]],
) -> None:
    records, weights = trained_at("--train.left-out", "[[1, 2], [4, 4]]")
    assert [record.step for record in records if record.skipped] == [1, 2, 4]
    plain, other = trained_at()
    assert records[0].loss_sum == plain[0].loss_sum
    assert records[1].loss_sum == plain[1].loss_sum  # after the first update
    assert records[3].loss_sum != plain[3].loss_sum
    assert not any(np.array_equal(a, b) for a, b in zip(weights, other, strict=True))


@pytest.mark.parametrize(("policy", "skipped"), [("skip", [2]), ("stop", None)])
def test_a_gradient_that_is_not_finite_is_treated_as_such_a_loss(
    trained_at: Callable[..., tuple[list[Any], Any]], monkeypatch: pytest.MonkeyPatch, policy: str, skipped: Any
) -> None:
    whole, calls = loop.accumulate, iter(range(10))

    def overflowing(model: Any, *rest: Any) -> Any:
        losses = whole(model, *rest)
        if next(calls) == 2:
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        return losses

    monkeypatch.setattr(loop, "accumulate", overflowing)
    if skipped is None:
        with pytest.raises(AssertionError, match=r"Diverged: gradient norm is inf in step 2: lower optimizer\.lr"):
            trained_at("--train.on-nonfinite", policy)
    else:
        records, weights = trained_at("--train.on-nonfinite", policy)
        assert [record.step for record in records if record.skipped] == skipped
        assert all(np.isfinite(w).all() for w in weights)


@pytest.fixture
def planned(data: Path, tmp_path: Path) -> tuple[RunDir, PlanSpec]:
    """The directory of a run of 6 steps, with its plan, and that."""
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec, directory = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5), RunDir(tmp_path / "run")
    directory.plan.mkdir(parents=True)
    rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
    pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
    return directory, spec


@pytest.fixture
def trained_at(
    on_ranks: Callable[..., list[Any]], data: Path, planned: tuple[RunDir, PlanSpec]
) -> Callable[..., tuple[list[Any], Any]]:
    """Train six steps alone with flags: (records, weights)."""

    def train(*flags: str) -> tuple[list[Any], Any]:
        directory, spec = planned
        config = cli.parse(RunConfig, [*tiny_argv(data, directory.path), *flags])

        def rank_main(rank: int, size: int) -> tuple[list[Any], Any]:
            records, model, _ = take_steps(directory, config, spec, rank, size)
            return records, [p.detach().numpy() for p in model.parameters()]

        return on_ranks(1, rank_main)[0]

    return train
