"""One model, one order of data, one number of tokens, under several strategies: which loss, for which bytes and time.

Every run is an ordinary run directory below the compare's own, so what was interrupted goes on where it was, and a
strategy that is added to the list later is trained alone. How runs are started is the caller's:
``compare(config, functools.partial(driver.run, spark))``.
"""

from sparktrain.compare.comparison import Comparison
from sparktrain.compare.running import compare
from sparktrain.compare.settings import Compare, Contender

__all__ = ["Compare", "Comparison", "Contender", "compare"]
