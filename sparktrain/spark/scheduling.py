"""Spark's own settings under which ranks cannot be run as they should."""

from pyspark.sql import SparkSession

from sparktrain.errors import ConfigError
from sparktrain.spark import context


def check_executors_settings(spark: SparkSession) -> None:
    """Raises :class:`ConfigError` for settings under which Spark cannot run a barrier stage, would run a rank twice, or
    promises an encryption that ranks do not have."""
    forbidden = {
        "spark.dynamicAllocation.enabled": "ranks need all their executors from start to end",
        "spark.speculation": "it would start a second copy of a slow rank",
    }
    for key, reason in forbidden.items():
        if is_on(spark, key):
            raise ConfigError(f"{key} is true, but {reason}: submit with --conf {key}=false")
    # TorchDistributor's own rule, before anything is started.
    if is_on(spark, "spark.ssl.enabled") and not is_on(spark, "pytorch.spark.distributor.ignoreSsl"):
        raise ConfigError(
            "spark.ssl.enabled is true, but gradients cross the network unencrypted, as TorchDistributor warns: "
            "accept that with --conf pytorch.spark.distributor.ignoreSsl=true"
        )
    amount = conf(spark, "spark.task.resource.gpu.amount", "0")
    if not amount.isdigit() or int(amount) > 1:
        raise ConfigError(
            f"spark.task.resource.gpu.amount is {amount}, expected 1 (one GPU per rank) or unset: "
            "submit with --conf spark.task.resource.gpu.amount=1"
        )


def check_drivers_gpus(spark: SparkSession, ranks: int) -> None:
    """Raises :class:`ConfigError` where ranks on the driver's machine are to have GPUs that are not there, or fewer
    than ranks: TorchDistributor would start as many ranks as there are GPUs without a word."""
    key = "spark.driver.resource.gpu.amount"
    amount = conf(spark, key, "0") or "0"
    if amount == "0":
        return
    if not context.drivers_gpus(spark):
        raise ConfigError(
            f"{key} is {amount}, but Spark found no GPU on the driver: set spark.driver.resource.gpu.discoveryScript, "
            f"or leave {key} out"
        )
    if ranks > int(amount):
        raise ConfigError(f"launch.ranks is {ranks}, but {key} is {amount}: set launch.ranks to at most {amount}")


def is_on(spark: SparkSession, key: str) -> bool:
    return conf(spark, key, "false").strip().lower() == "true"


def conf(spark: SparkSession, key: str, default: str) -> str:
    return str(spark.conf.get(key, default))
