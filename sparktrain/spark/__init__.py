"""The Spark floor: the driver's view of a run. The only importer of pyspark."""
