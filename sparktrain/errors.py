"""What can go wrong by no fault of ours: one line for the user, one exit code each.

Everything a user can mend is raised as one of these; :func:`sparktrain.cli.main` prints its message as a single
line and exits with its code. Any other exception is our bug and keeps its traceback.
"""


class SparktrainError(Exception):
    """A failure with a one-line message for the user; ``exit_code`` becomes the process's."""

    exit_code = 1


class ConfigError(SparktrainError, ValueError):
    """A setting is wrong: the message names the key, what was expected and what to do."""

    exit_code = 2


class DataError(SparktrainError, ValueError):
    """Token data is missing, torn or does not fit the run: the message names the file."""

    exit_code = 3


class ModelError(SparktrainError, ValueError):
    """A model directory or checkpoint cannot be used: the message names it."""

    exit_code = 4


class RunDirBusy(SparktrainError):
    """The run directory belongs to another process or another run."""

    exit_code = 5


class Diverged(SparktrainError):
    """Ranks ended with different parameters, or the loss is no longer a number."""

    exit_code = 6


class LaunchError(SparktrainError):
    """The cluster could not run the ranks, or a rank failed: the message names the rank and its cause.

    ``transient``: the same may go well when it is tried again, as when a process was killed.
    """

    exit_code = 7
    transient = False


class Orphaned(SparktrainError):
    """What started a rank of this attempt, or its executor, is gone: the ranks saved a checkpoint and ended."""

    exit_code = 7


class Superseded(SparktrainError):
    """A newer attempt of the same run has started: this one must not write any more."""

    exit_code = 75


class Changed(SparktrainError):
    """Settings were changed that ranks read when they start: they are to start again."""

    exit_code = 76


class Stopped(SparktrainError):
    """The run was asked to stop, and did; it can go on."""

    exit_code = 130
