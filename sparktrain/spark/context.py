"""What is asked of a SparkContext, and how a Spark Connect client, which has none, finds it out.

A Connect client may be on another machine than its server, and asks it in DataFrames and settings alone.
"""

import threading
from collections.abc import Callable
from typing import Any

from pyspark import InheritableThread, SparkContext
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sparktrain.errors import ConfigError
from sparktrain.spark.network import own_address

# More than there are cores anywhere: each partition of a range of so many has rows.
_MANY = 1 << 16


def is_connect(spark: Any) -> bool:
    """Whether ``spark`` is a Spark Connect client's session."""
    return not isinstance(spark, SparkSession)


def sparks_own(spark: Any, job: str, instead: str) -> SparkContext:
    """The SparkContext of ``spark``; raises :class:`ConfigError`, that ``job`` needs one and what to do ``instead``."""
    if is_connect(spark):
        raise ConfigError(f"{job} needs Spark's RDDs, which a Spark Connect client does not have: {instead}")
    own: SparkContext = spark.sparkContext
    return own


def parallelism(spark: SparkSession) -> int:
    """Spark's default number of tasks at once: all cores, unless ``spark.default.parallelism`` says otherwise."""
    if not is_connect(spark):
        return spark.sparkContext.defaultParallelism
    last = spark.range(_MANY).select(F.spark_partition_id().alias("part")).agg(F.max("part")).collect()
    return int(last[0][0]) + 1


def slots_and_executors(spark: SparkSession) -> tuple[int, int]:
    """Barrier tasks that the cluster can run at once, and executors that it has.

    To a Connect client its cores are the slots: it cannot see executors, nor their GPUs. Raises :class:`ConfigError`
    where a setting hides the cores from it.
    """
    if not is_connect(spark):
        jvm = spark.sparkContext._jsc.sc()
        profile = jvm.resourceProfileManager().defaultResourceProfile()
        return int(jvm.maxNumConcurrentTasks(profile)), int(jvm.getExecutorMemoryStatus().size()) - 1
    for key in ("spark.default.parallelism", "spark.sql.leafNodeDefaultParallelism"):
        if spark.conf.get(key, None) is not None:
            raise ConfigError(
                f"{key} is set, which hides the number of cores from a Spark Connect client: leave it out on the "
                "Connect server, or use spark-submit"
            )
    instances = int(str(spark.conf.get("spark.executor.instances", "1")))
    return parallelism(spark) // int(str(spark.conf.get("spark.task.cpus", "1"))), instances


def drivers_gpus(spark: Any) -> bool:
    """Whether Spark found GPUs where its driver is."""
    return "gpu" in (spark.client._resources() if is_connect(spark) else spark.sparkContext.resources)


def log_addresses(spark: Any) -> tuple[str, str]:
    """Where this process is to listen for ranks' lines, and as what ranks reach it."""
    driver = str(spark.conf.get("spark.driver.host"))
    if is_connect(spark):
        own = own_address(spark.client.host)
        if own and not own.startswith("127."):  # else server and client are on one machine
            return own, own
    return str(spark.conf.get("spark.driver.bindAddress", driver)), driver


class Jobs:
    """The Spark jobs of a thread, for another one to cancel: while it waits inside py4j its gateway is busy."""

    def __init__(self, spark: SparkSession, group: str, what: str) -> None:
        self._spark, self._group, self._what, self._connect = spark, group, what, is_connect(spark)

    def start(self, run: Callable[[], None]) -> None:
        """Call ``run`` in a thread of its own."""

        def named() -> None:
            if self._connect:
                self._spark.addTag(self._group)
            else:
                self._spark.sparkContext.setJobGroup(self._group, self._what, interruptOnCancel=True)
            run()

        thread: threading.Thread = (threading.Thread if self._connect else InheritableThread)(target=named, daemon=True)
        thread.start()

    def cancel(self) -> None:
        if self._connect:
            self._spark.interruptTag(self._group)
        else:
            self._spark.sparkContext.cancelJobGroup(self._group)
