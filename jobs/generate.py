"""python jobs/generate.py --model RUN_DIR --prompt "def ": sample text from a run, a checkpoint or a model."""

from sparktrain import cli
from sparktrain.train.generate import Generate, generate


def main(argv: list[str]) -> None:
    for piece in generate(cli.parse(Generate, argv)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.main(main)
