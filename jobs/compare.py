"""spark-submit jobs/compare.py CONFIG.toml [--section.key value ...]: train under several strategies and compare."""

from functools import partial

from sparktrain import cli
from sparktrain.compare import Compare, compare
from sparktrain.spark import driver, trackers
from sparktrain.spark.session import session


def main(argv: list[str]) -> None:
    config = cli.parse(Compare, argv)
    with session("sparktrain compare") as spark, trackers.together(config.run.trackers, config.run.dir):
        print(compare(config, partial(driver.run, spark)).markdown())


if __name__ == "__main__":
    cli.main(main)
