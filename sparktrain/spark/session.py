"""The Spark session of a job."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

from pyspark import SparkConf
from pyspark.sql import SparkSession

from sparktrain.errors import ConfigError
from sparktrain.parent import follow_parent

_HOW = (
    "install it (Debian, Ubuntu: apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17) "
    "and set JAVA_HOME to it if it is not on the PATH"
)


@contextlib.contextmanager
def session(name: str) -> Iterator[SparkSession]:
    """The active session, as in a notebook or on Databricks, which is left running; else a new one, stopped at the end.

    Master and settings are spark-submit's (or ``spark-defaults.conf``'s); none is set here, as it would override them.
    With ``SPARK_REMOTE`` it is a Spark Connect client's, which needs no Java where the server is there already.
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        yield active
        return
    if not os.environ.get("SPARK_REMOTE", "").startswith("sc:"):
        _check_java()
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        follow_parent(signal.SIGTERM)  # spark-submit's JVM, without which nobody could stop us
    if SparkConf().get("spark.master", "local").startswith("local"):
        # Without it Spark takes the first python3 of the PATH, which need not be the one that runs this.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.appName(name).getOrCreate()
    try:
        yield spark
    finally:
        spark.stop()


def _check_java() -> None:
    """Raises :class:`ConfigError` where there is no Java 17: pyspark would say JAVA_GATEWAY_EXITED after a while."""
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if "SPARK_CONNECT_MODE_ENABLED" in os.environ or "PYSPARK_GATEWAY_PORT" in os.environ:
        return  # spark-submit has started the JVM already
    if not java or not os.path.exists(java):
        raise ConfigError(f"Spark needs Java 17 or newer and none was found{' at JAVA_HOME' if home else ''}: {_HOW}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if not version or int(version.group(1)) < 17:
        raise ConfigError(
            f"Spark needs Java 17 or newer, {java} is {version.group(1) if version else 'not Java'}: {_HOW}"
        )
