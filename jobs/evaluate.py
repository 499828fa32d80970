"""spark-submit jobs/evaluate.py --model RUN_DIR [--data DIR]: loss and perplexity of a model on a split."""

from sparktrain import cli
from sparktrain.evaluation import Evaluate
from sparktrain.spark.evaluate import evaluate
from sparktrain.spark.session import session


def main(argv: list[str]) -> None:
    settings = cli.parse(Evaluate, argv)
    with session("sparktrain evaluate") as spark:
        print(evaluate(spark, settings).report())


if __name__ == "__main__":
    cli.main(main)
