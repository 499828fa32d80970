"""Which sequence is trained on when, and by whom: pure arithmetic on arrays, the same in driver, ranks and tests.

Microshards, windows of one sequence each (``windows.py``), are numbered 0..N-1 through the shards in order.
**Positions** p = 0, 1, 2, ... are the order of training. **Step** s is the next ``batch_of(s)`` of them and **slot**
j its j-th (``steps.py``). What a position holds: its place in the order, which also counts what is passed over
(``skip.py``); the source drawn from there and how often it was before (``mixture.py``); the epoch of that source, and
the microshard by a keyed bijection of that epoch (``order.py``, ``shuffle.py``). With one source, nothing skipped:
epoch ``p // N`` and microshard ``permute(p % N)``.

Nothing here but ``slots_of`` knows the number of ranks, so the global batch of a step cannot depend on it, and the
loader's whole state is one integer.
"""

from sparktrain.plan.mixture import Source
from sparktrain.plan.order import Order
from sparktrain.plan.share import Range, Share
from sparktrain.plan.shuffle import Ints
from sparktrain.plan.spec import Assignment, PlanSpec
from sparktrain.plan.steps import runs_of_steps, slots_of
from sparktrain.plan.table import rows, spread_windows, windows_at
from sparktrain.plan.windows import WINDOWS, count_microshards, stride_of, window_length

__all__ = [
    "WINDOWS",
    "Assignment",
    "Ints",
    "Order",
    "PlanSpec",
    "Range",
    "Share",
    "Source",
    "count_microshards",
    "rows",
    "runs_of_steps",
    "slots_of",
    "spread_windows",
    "stride_of",
    "window_length",
    "windows_at",
]
