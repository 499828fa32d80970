"""Where a trained model is, given what a user names: a run, a checkpoint, or a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path

from sparktrain import storage
from sparktrain.errors import ModelError
from sparktrain.rundir import RunDir, is_run


@dataclass(frozen=True)
class Trained:
    """``directory``: a Hugging Face directory; ``run``: the run it comes from, where it lies in one."""

    directory: Path
    run: RunDir | None


def find(path: Path) -> Trained:
    """The model of the run at ``path``, or of its newest checkpoint where it is not finished; the checkpoint or model
    directory at ``path``.

    Raises :class:`ModelError` where there is none, and for a checkpoint that is not whole.
    """
    path = storage.place(path)
    if is_run(path):
        return Trained(_of_run(RunDir(path)), RunDir(path))
    above = next((parent for parent in path.parents[:2] if is_run(parent)), None)
    run = RunDir(above) if above else None
    saved = run.checkpoints if run and path.parent == run.checkpoints.path else None
    if saved and (damage := saved.damage(saved.read(path.name))):
        raise ModelError(f"checkpoint {path} is damaged: {damage}; use another one")
    if not (path / "config.json").exists():
        what = "holds no run, no checkpoint and no model" if path.is_dir() else "is no directory"
        raise ModelError(f"{path} {what}: give a run directory, a checkpoint or a Hugging Face model directory")
    return Trained(path, run)


def _of_run(run: RunDir) -> Path:
    if (run.model / "config.json").exists():
        return run.model
    newest, damages = run.checkpoints.newest()
    if newest is None:
        found = damages[0] if damages else "it is not finished and has no checkpoint"
        raise ModelError(f"run directory {run.path} has no model yet, {found}: train on, or give another one")
    return run.checkpoints.directory(newest.name)
