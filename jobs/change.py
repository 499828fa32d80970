"""python jobs/change.py RUN_DIR --kind hot|warm|cold --section.key value ...: change settings of a run that goes on."""

from pydantic import Field

from sparktrain import cli
from sparktrain.changes import Changes, Kind, changed
from sparktrain.config import RunConfig
from sparktrain.rundir import RunDir


class ChangeJob(RunConfig):
    """Change settings of a run; it takes them at its next step, or when it goes on."""

    kind: Kind = Field()
    """What the change needs: hot, nothing; warm, the optimizer set anew; cold, ranks started again."""


def main(argv: list[str]) -> None:
    directory = RunDir(argv[0] if argv and not argv[0].startswith("-") else ".")
    changes = Changes(directory.path)
    before = changed(directory.config(), changes.all())
    job = cli.parse(ChangeJob, argv[1:], before.model_dump(mode="json"))
    after = RunConfig.model_validate(job.model_dump(exclude={"kind"}))
    for key, value in changes.ask(job.kind, before, after).values.items():
        print(f"{key} will be {value}")


if __name__ == "__main__":
    cli.main(main)
