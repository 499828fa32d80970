"""spark-submit jobs/tokenize.py [CONFIG.toml] [--key value ...]: turn a directory of text files into token shards."""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def main(argv: list[str]) -> None:
    from sparktrain.spark.session import session
    from sparktrain.spark.tokenize import TokenizeConfig, tokenize

    config = cli.parse(TokenizeConfig, argv)
    with session("sparktrain tokenize") as spark:
        print(tokenize(spark, config).report())


if __name__ == "tokenize":
    # A script's directory comes first on Python's path, so beside any job linecache and inspect find this file where
    # they import the standard library's tokenize: become that one.
    spec = PathFinder.find_spec("tokenize", [os.path.dirname(os.__file__)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tokenize"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    from sparktrain import cli

    if __name__ == "__main__":
        cli.main(main)
