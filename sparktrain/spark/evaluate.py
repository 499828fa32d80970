"""The loss of a trained model, measured by Spark tasks: each starts one process, which takes its share of the
micro-batches. No barrier and no collective: Spark may run them in any order, and again where an executor is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import TaskContext
from pyspark.sql import SparkSession

from sparktrain import tokens, trained
from sparktrain.config import Data
from sparktrain.errors import ConfigError, DataError, LaunchError, ModelError
from sparktrain.evaluation import Evaluate, Evaluation, Share, Work
from sparktrain.spark import index, preflight
from sparktrain.tokens.sources import absolute
from sparktrain.tokens.sources.reach import opener

_LONGEST = 1024


def evaluate(spark: SparkSession, settings: Evaluate) -> Evaluation:
    """Measure what ``settings`` ask for; the same number, to the bit, for any number of ranks.

    Raises a subclass of :class:`sparktrain.errors.SparktrainError` for a model that is none, data that do not fit it,
    and for what went wrong in a task.
    """
    model = trained.find(settings.model)
    values = _config_of(model.directory)
    data = _data_of(settings, model, values)
    located = tokens.locate_shards(data.path or (), opener(data, {}))
    open_ = opener(data, located)
    shards = [tokens.inspect(path, data.token_size, open_, known) for path, known in located.items()]
    # Token ids are compared with the vocabulary where they are read, which is for the first time by the model.
    index.check_shards([(shard, 0) for shard in shards], data, "data")
    work = Work(
        model=model.directory,
        data=data,
        shards=tuple(shards),
        sequences=settings.sequences,
        seed=settings.seed,
        micro_batch=settings.micro_batch,
        autocast=settings.autocast,
        world=settings.ranks or preflight.count_slots(spark),
    )
    return Evaluation.add_up(work, _measured(spark, work))


def _measured(spark: SparkSession, work: Work) -> Iterator[Share]:
    ask = partial(_ask, work.model_dump_json(), spark.conf.get("spark.task.cpus", "1"))
    rows = spark.range(0, work.world, 1, work.world).mapInArrow(ask, "rank long, said string, code long").collect()
    for row in sorted(rows, key=lambda r: int(r.rank)):
        if row.code:
            kinds = (ConfigError, DataError, ModelError)
            kind = next((kind for kind in kinds if kind.exit_code == row.code), LaunchError)
            raise kind(row.said)
        yield Share.model_validate_json(row.said)


def _ask(work: str, threads: str | None, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs in executors: what a process of its own says of this task's share."""
    gpus = TaskContext.get().resources().get("gpu")  # type: ignore[union-attr]
    imports = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": imports, "OMP_NUM_THREADS": threads or "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.addresses)
    for batch in batches:
        for rank in batch.column(0).to_pylist():
            asked = subprocess.run(
                [sys.executable, "-m", "sparktrain.worker", "--evaluate"],
                input=json.dumps(json.loads(work) | {"rank": rank}),
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            lines = (asked.stderr if asked.returncode else asked.stdout).strip().splitlines()
            said = lines[-1].removeprefix("error: ") if lines else ""
            if asked.returncode < 0:
                said = f"a process was ended by {signal.Signals(-asked.returncode).name}: lower micro_batch"
            row = {"rank": [rank], "said": [said], "code": [asked.returncode]}
            yield pa.RecordBatch.from_pydict(row)


def _config_of(directory: Path) -> dict[str, Any]:
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        values = values.get("text_config", values)
        return {"vocab_size": int(values["vocab_size"]), "positions": values.get("max_position_embeddings")}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{directory} is no language model: its config.json has no vocab_size") from None


def _data_of(settings: Evaluate, model: trained.Trained, values: dict[str, Any]) -> Data:
    """The split and how it is cut and reached: as ``settings`` say, else as the run does; paths absolute."""
    run = model.run.config().data if model.run else None
    places = settings.data or (run.heldout if run else None)
    if not places:
        whose = "its run has no data.heldout" if run else f"{settings.model} comes from no run"
        raise ConfigError(f"data is not set, and {whose}: say which split to measure, --data DIRECTORY")
    positions = values["positions"]
    length = settings.sequence_length or (run.sequence_length if run else min(_LONGEST, positions or _LONGEST))
    if positions and length > positions:
        raise ConfigError(
            f"sequence_length is {length}, more than the model's {positions} positions: set it to at most {positions}"
        )
    kept = ("window", "token_size", "mirrors", "cache_dir", "cache_bytes")
    of_run = {name: getattr(run, name) for name in kept if run}
    said = {name: value for name in ("window", "token_size") if (value := getattr(settings, name))}
    path = tuple(absolute(place) for place in places)
    return Data.model_validate({"path": path, "sequence_length": length} | of_run | said)
