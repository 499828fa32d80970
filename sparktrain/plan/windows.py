"""How shards are cut into microshards.

A **microshard** is one sequence's window of tokens in a shard. The window rule says how a shard of N tokens is cut:
``overlap1`` reads S+1 tokens at stride S, all but the first are predicted, and as windows overlap by one token only a
shard's first token is never a target; ``psyche`` reads S tokens at stride S, of which S-1 are predicted, as Psyche's
local provider does. Both find floor((N-1)/S) windows. A file of rows was cut by whoever wrote it: a row is a window.
"""

from sparktrain.tokens.shard import Shard

# Tokens read beyond S.
WINDOWS = {"overlap1": 1, "psyche": 0}


def window_length(window: str, sequence_length: int) -> int:
    """Tokens of a window under the rule ``window``."""
    return sequence_length + WINDOWS[window]


def stride_of(shard: Shard, sequence_length: int) -> int:
    """Tokens from one window of ``shard`` to the next."""
    return shard.row_length or sequence_length


def count_microshards(shard: Shard, sequence_length: int) -> int:
    """Windows in ``shard``, by either rule."""
    if shard.row_length:
        return shard.num_tokens // shard.row_length
    return max(0, (shard.num_tokens - 1) // sequence_length)
