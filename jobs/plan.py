"""spark-submit jobs/plan.py CONFIG.toml [--section.key value ...], or --audit RUN_DIR: plan a run, audit a run."""

from pydantic_settings import CliImplicitFlag

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.config.place import Place
from sparktrain.spark import audit, driver, session


class PlanJob(RunConfig):
    """Write the plan of a run and train nothing, or audit a run: plan, receipts, checkpoints and shards must agree."""

    audit: Place | None = None
    """Run directory to audit."""
    reread: CliImplicitFlag[bool] = True
    """Audit: read what was trained on again, and compare its bytes."""


def main(argv: list[str]) -> None:
    job = cli.parse(PlanJob, argv)
    config = RunConfig.model_validate(job.model_dump(exclude={"audit", "reread"}))
    with session.session("sparktrain plan") as spark:
        for line in audit.audit(spark, job.audit, job.reread) if job.audit else driver.plan(spark, config):
            print(line, flush=True)


if __name__ == "__main__":
    cli.main(main)
