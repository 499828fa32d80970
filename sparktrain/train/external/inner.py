"""One round of inner steps by a user's own program: job in, trained parameters and metrics out."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from sparktrain.errors import ConfigError, LaunchError, ModelError
from sparktrain.train import parameter_pack as packs
from sparktrain.train.external.blob import StateBlob
from sparktrain.train.external.process import environment_of, run

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Command:
    """How to start the trainer.

    Args:
        argv: program and arguments; ``{job_manifest}`` and ``{result_manifest}`` are replaced anywhere in them.
        env: set over everything else in its environment.
        module_search_roots: directories put first on its ``PYTHONPATH``.
        timeout: seconds a round may take.
        require_exact_steps: a result with another number of steps than asked for is an error; one with none always is.
        state_dict_filter: which tensors it trains; the others stay the base's.

    Raises :class:`ConfigError` for what cannot be a command.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    module_search_roots: tuple[str, ...] = ()
    timeout: float = 3600.0
    require_exact_steps: bool = True
    state_dict_filter: packs.StateDictFilter = packs.ALL

    def __post_init__(self) -> None:
        if isinstance(self.argv, str) or not self.argv or not self.argv[0].strip():
            raise ConfigError(f"inner_loop.command is {self.argv!r}: expected a list, the program first")
        texts = [*self.argv, *self.env, *self.env.values(), *self.module_search_roots]
        if any("\0" in text for text in texts) or not all(key.strip() and "=" not in key for key in self.env):
            raise ConfigError("inner_loop.command and its env take no NUL bytes and no empty names: remove them")
        if not self.timeout > 0:
            raise ConfigError(f"inner_loop.timeout is {self.timeout}: expected seconds above 0")


@dataclass(frozen=True)
class InnerRound:
    """What a rank is to do in a round.

    Args:
        batches: references to its data (:func:`cached_microshard_group`, :func:`micro_epoch`), never tensors. The
            trainer cycles through them where there are fewer than steps.
        model_schema_hash: says which model the parameters belong to; the trainer hands it on.
        inner_optimizer_state: what the round before returned.
    """

    run_id: str
    rank: int
    round: int
    num_inner_steps: int
    batches: Sequence[Mapping[str, Any]]
    model_schema_hash: str
    inner_optimizer_state: StateBlob | None = None

    def __str__(self) -> str:
        return f"inner_loop.command of rank {self.rank} in round {self.round}"


@dataclass(frozen=True)
class InnerResult:
    """What a round gave. ``state``: every tensor of the base, new where the trainer had it, in the base's dtypes and
    on its devices. ``metrics``: the trainer's, a NaN among them kept as one. ``seconds``: all of it, with files."""

    state: dict[str, Tensor]
    steps_completed: int
    metrics: dict[str, int | float | bool | str]
    inner_optimizer_state: StateBlob | None
    seconds: float


def run_inner(base: Mapping[str, Tensor], command: Command, round: InnerRound, workspace: Path) -> InnerResult:
    """Have ``command`` train from ``base``, a model's whole ``state_dict``, which is left as it is.

    Works in a directory of its own under ``workspace``, which is removed however the round ends. Raises
    :class:`ConfigError` for a command that cannot be run and :class:`LaunchError`, naming rank and round, for one
    that fails, hangs or returns something else than was asked for. Nothing of a failed round is returned.
    """
    started = time.monotonic()
    if round.num_inner_steps < 1:
        raise ConfigError(f"{round} is asked for {round.num_inner_steps} steps: set sync_every to 1 or more")
    if not round.batches:
        raise ConfigError(f"{round} requires at least one batch: give the rank some data")
    directory = workspace.absolute() / f"inner-rank{round.rank:05d}-round{round.round:06d}"
    shutil.rmtree(directory, ignore_errors=True)  # of an attempt that was killed
    directory.mkdir(parents=True)
    try:
        job = _write_job(directory, base, command, round)
        manifests = {"job_manifest": str(directory / "job.json"), "result_manifest": job["result_manifest_path"]}
        environment = environment_of(
            command.module_search_roots,
            {f"BURN_P2P_DILOCO_{name.upper()}": path for name, path in manifests.items()} | dict(command.env),
        )
        run(
            [_fill(arg, manifests) for arg in command.argv], environment, command.timeout, directory / "err", str(round)
        )
        result = _read_result(Path(job["result_manifest_path"]), round)
        steps = result["steps_completed"]
        if steps != round.num_inner_steps and (command.require_exact_steps or not steps):
            raise LaunchError(f"{round} completed {steps} step(s), requested {round.num_inner_steps}")
        state = _trained(
            Path(result.get("local_parameter_pack_path") or directory / "local-parameters"), base, command, round
        )
        return InnerResult(state, steps, result["metrics"], _blob(result, round), time.monotonic() - started)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def cached_microshard_group(
    shard_paths: Sequence[str], microshard_ids: Sequence[str], ordinals: Sequence[int], bytes_len: int
) -> dict[str, Any]:
    """A batch that is some microshards in files of this machine."""
    return {
        "kind": "cached_microshard_group",
        "shard_paths": list(shard_paths),
        "microshard_ids": list(microshard_ids),
        "ordinals": list(ordinals),
        "bytes_len": bytes_len,
    }


def micro_epoch(
    lease_id: str,
    microshard_ids: Sequence[str],
    ordinals: Sequence[int],
    bytes_len: int,
    pipeline_kind: Literal["sharded-static", "indexed-dataset", "generated-dataset", "custom"],
    payload: Any,
) -> dict[str, Any]:
    """A batch that the trainer makes itself of ``payload``, any JSON."""
    return {
        "kind": "micro_epoch",
        "lease_id": lease_id,
        "microshard_ids": list(microshard_ids),
        "ordinals": list(ordinals),
        "bytes_len": bytes_len,
        "pipeline_kind": pipeline_kind,
        "payload": payload,
    }


def _write_job(directory: Path, base: Mapping[str, Tensor], command: Command, round: InnerRound) -> dict[str, Any]:
    packs.write(directory / "base-parameters", dict(base), round.model_schema_hash, command.state_dict_filter)
    job: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        # Of the round and not of the clock, so that a round done again is the same job.
        "job_id": f"diloco-inner-{round.run_id}-{round.round}-{round.rank}",
        "model_schema_hash": round.model_schema_hash,
        "base_parameter_pack_path": str(directory / "base-parameters"),
        "output_parameter_pack_path": str(directory / "local-parameters"),
        "result_manifest_path": str(directory / "result.json"),
        "batches": [dict(batch) for batch in round.batches],
        "num_inner_steps": round.num_inner_steps,
        "require_exact_steps": command.require_exact_steps,
        "state_dict_filter": command.state_dict_filter.to_json(),
    }
    if round.inner_optimizer_state:
        round.inner_optimizer_state.check()
        job["inner_optimizer_state_path"] = str(directory / "inner-state-input.blob")
        (directory / "inner-state-input.blob").write_bytes(round.inner_optimizer_state.data)
    packs.write_json(directory / "job.json", job)
    return job


def _fill(argument: str, manifests: Mapping[str, str]) -> str:
    for name, path in manifests.items():
        argument = argument.replace(f"{{{name}}}", path)
    return argument


def _read_result(file: Path, round: InnerRound) -> dict[str, Any]:
    try:
        result = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise LaunchError(f"{round} ended with status 0, but wrote no result.json") from None
    except ValueError as error:
        raise LaunchError(
            f"{round} wrote a result.json that is not valid JSON: {error}; write it under another name, then rename it"
        ) from None
    if not isinstance(result, dict) or type(result.get("steps_completed")) is not int or result["steps_completed"] < 0:
        raise LaunchError(f"{round} wrote a result.json without steps_completed, the number of steps it did")
    for key in ("local_parameter_pack_path", "inner_optimizer_state_path", "inner_optimizer_state_encoding"):
        if not isinstance(result.get(key), str | None):
            raise LaunchError(
                f"{round} wrote {key} {result[key]!r} in its result.json: expected text, or to leave it out"
            )
    metrics = result.setdefault("metrics", {})
    if not isinstance(metrics, dict) or not all(isinstance(v, int | float | str) for v in metrics.values()):
        raise LaunchError(f"{round} wrote metrics {metrics!r}: expected names with a number, true, false or text each")
    return result


def _trained(path: Path, base: Mapping[str, Tensor], command: Command, round: InnerRound) -> dict[str, Tensor]:
    """The base with what is in the pack at ``path``, copied: the file is about to go."""
    try:
        pack = packs.read(path)
        tensors = packs.unpack(pack, dict(base), command.state_dict_filter)
    except ModelError as error:
        raise LaunchError(f"{round} returned parameters that cannot be used: {error}") from None
    if pack.model_schema_hash != round.model_schema_hash:
        raise LaunchError(
            f"{round} returned parameters of model schema {pack.model_schema_hash}, expected {round.model_schema_hash}"
        )
    if not np.isfinite(pack.values).all():
        odd = next(name for name, values in tensors.items() if not values.isfinite().all())
        raise LaunchError(f"{round} returned parameters that are not finite, first in {odd}: lower its learning rate")
    return {key: tensors[key].to(value, copy=True) if key in tensors else value for key, value in base.items()}


def _blob(result: Mapping[str, Any], round: InnerRound) -> StateBlob | None:
    path = result.get("inner_optimizer_state_path")
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LaunchError(f"{round} names inner_optimizer_state_path {path!r}, which cannot be read: {error}") from None
    return StateBlob.of(result.get("inner_optimizer_state_encoding") or "application/octet-stream", data)
