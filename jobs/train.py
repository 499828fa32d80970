"""spark-submit jobs/train.py CONFIG.toml [--section.key value ...] [--dry-run]: train on this Spark cluster."""

from pydantic_settings import CliImplicitFlag

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.spark import driver
from sparktrain.spark.session import session


class TrainJob(RunConfig):
    """Train a causal language model on this Spark cluster."""

    dry_run: CliImplicitFlag[bool] = False
    """Check everything and print the plan, but train nothing."""


def main(argv: list[str]) -> None:
    job = cli.parse(TrainJob, argv)
    config = RunConfig.model_validate(job.model_dump(exclude={"dry_run"}))
    with session("sparktrain") as spark:
        print(driver.dry_run(spark, config) if job.dry_run else driver.run(spark, config).report())


if __name__ == "__main__":
    cli.main(main)
