# Databricks notebook source
# MAGIC %md
# MAGIC # On Databricks
# MAGIC
# MAGIC On a cluster with a runtime for machine learning of Spark 4.0 or newer, in dedicated (single user) access mode, without
# MAGIC autoscaling and spot replacement. The run directory and the data are on a Volume, which driver and executors share.
# MAGIC Cluster settings and why: docs/databricks.md.

# COMMAND ----------

# MAGIC %pip install --no-deps /Volumes/main/default/sparktrain/sparktrain-0.1.0-py3-none-any.whl
# MAGIC %pip install "transformers>=5.10" "huggingface_hub>=1.5" "pydantic-settings>=2.10" tenacity

# COMMAND ----------

dbutils.library.restartPython()

# COMMAND ----------

volume = "/Volumes/main/default/sparktrain"
data = f"{volume}/data"
run_dir = f"{volume}/runs/first"
ranks = 0  # one per slot of the cluster
hidden_size = 512
steps = 1000
total_batch = 64
trackers = ["mlflow"]  # the notebook's own experiment

# COMMAND ----------

from pyspark.sql import SparkSession

from sparktrain.config import RunConfig
from sparktrain.spark import driver
from sparktrain.spark.planner import assignments

spark = SparkSession.builder.getOrCreate()  # the cluster's

# COMMAND ----------

# MAGIC %md
# MAGIC What must hold before ranks start is checked by `dry_run`: slots, packages on every executor, a run directory that
# MAGIC all of them see. Each failed check names the setting to change.

# COMMAND ----------

config = RunConfig.model_validate(
    {
        "run": {"dir": run_dir, "trackers": trackers},
        "data": {"path": f"{data}/train", "heldout": f"{data}/heldout", "sequence_length": 256},
        "model": {
            "sizes": {
                "hidden_size": hidden_size,
                "intermediate_size": 3 * hidden_size,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "max_position_embeddings": 256,
            }
        },
        "train": {"steps": steps, "total_batch": total_batch, "micro_batch": 4},
        "strategy": {"kind": "diloco"},
        "launch": {"ranks": ranks},
    }
)
print(driver.dry_run(spark, config))

# COMMAND ----------

# MAGIC %md
# MAGIC Cancelling the cell saves a checkpoint; running it again goes on from there, also on a cluster of another size.

# COMMAND ----------

result = driver.run(spark, config)
print(result.report())

# COMMAND ----------

# MAGIC %md
# MAGIC Metrics and the plan are Spark tables, to be joined, kept and charted as any other.

# COMMAND ----------

result.metrics_frame(spark).createOrReplaceTempView("steps")
spark.sql("SELECT step DIV 100 AS hundred, avg(loss), sum(bytes_sent) FROM steps GROUP BY 1 ORDER BY 1").show()

# COMMAND ----------

assignments(spark, run_dir, world_size=len(result.ranks)).groupBy("rank").count().show()
