"""python jobs/merge.py --base DIR --candidates DIR --candidates DIR --output DIR: merge models of one base."""

from sparktrain import cli
from sparktrain.train.merge import Merge, merge


def main(argv: list[str]) -> None:
    print(merge(cli.parse(Merge, argv)).report())


if __name__ == "__main__":
    cli.main(main)
