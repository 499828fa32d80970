"""sparktrain: train causal language models on the Spark cluster you have, over the network it has.

Three floors and one door (see the README):

* ``sparktrain``        plain data: config, tokens, plan, run directory, results
* ``sparktrain.train``  torch: one rank's view
* ``sparktrain.spark``  Spark: the driver's view
* ``sparktrain.worker`` the door: ``run_rank(run_dir)``
"""

__version__ = "0.1.0"
