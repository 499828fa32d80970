"""python jobs/report.py RUN_DIR: a page about a finished run, RUN_DIR/report.html, that opens offline."""

from sparktrain import cli
from sparktrain.report.page import Report, write_report


def main(argv: list[str]) -> None:
    flags = ["--run-dir", *argv] if argv and not argv[0].startswith("-") else argv
    print(write_report(cli.parse(Report, flags)))


if __name__ == "__main__":
    cli.main(main)
