"""python jobs/verify.py RUN_DIR: is it what it says."""

from sparktrain import cli
from sparktrain.verify import Verify, verify


def main(argv: list[str]) -> None:
    flags = ["--run-dir", *argv] if argv and not argv[0].startswith("-") else argv
    for line in verify(cli.parse(Verify, flags)):
        print(line)


if __name__ == "__main__":
    cli.main(main)
