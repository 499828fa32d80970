"""Python objects of the user's: found by name, called, and what they give checked, in one line where it is wrong.

An item is L token ids, a list or a one-dimensional array or tensor, or a mapping of such::

    input_ids         the tokens
    labels            the token at its own place, or -100 where it is no target
    loss_mask         instead of labels: 1 where a token is a target, 0 where it is not
    position_ids      start again where a packed document begins, or
    sequence_lengths  tokens of each packed document, L in all

All items have the same of these. Other keys are not read, but an ``attention_mask`` that leaves tokens out is refused
where neither ``labels`` nor ``loss_mask`` say that they are no targets.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import numpy as np

from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, DataError, SparktrainError
from sparktrain.plan import window_length
from sparktrain.tokens.sequences import IGNORED, Ints, Sequences, Window, stack
from sparktrain.tokens.shard import Shard

T = TypeVar("T")
_KEYS = ("labels", "loss_mask", "position_ids", "sequence_lengths")


def find(name: str) -> Any:
    """The object called ``MODULE:ATTRIBUTE``. Raises :class:`ConfigError` where it is not there."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"data.dataset is {name}, but there is no module {error.name}: put its directory on PYTHONPATH, or "
                "ship it with --py-files"
            ) from None
        raise ConfigError(f"data.dataset is {name}, whose module lacks {error.name}: install that") from None
    except Exception as error:
        raise ConfigError(f"data.dataset is {name}, whose module cannot be imported: {_line(error)}") from error
    try:
        return reduce(getattr, attribute.split("."), module)
    except AttributeError:
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"data.dataset is {name}, but {module_name} has no {attribute}: it has {', '.join(public[:8])}"
        ) from None


def call(what: str, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """``function(...)``; what it raises in one line, as :class:`DataError`."""
    try:
        return function(*arguments, **named)
    except SparktrainError:
        raise
    except Exception as error:
        raise DataError(f"{what} fails: {_line(error)}") from error


@dataclass(frozen=True)
class Items:
    """What items must be.

    Args:
        name: of the object they come from, for errors.
        length: L, tokens of each.
        vocab_size: token ids are below it.
    """

    name: str
    length: int
    vocab_size: int

    @classmethod
    def of(cls, name: str, config: RunConfig, vocab_size: int) -> "Items":
        return cls(name, window_length(config.data.window, config.data.sequence_length), vocab_size)

    def shard(self, kind: str, count: int, first: Any, number: int = 0) -> Shard:
        """What stands in the plan for ``count`` items like ``first``, item ``number``."""
        self.window(first, number)
        columns = self._columns(first)
        return Shard(self.name, count * self.length, 8, kind, row_length=self.length, columns=columns)

    def sequences(self, items: Sequence[Any], numbers: Sequence[int], columns: tuple[str, ...]) -> Sequences:
        """``items`` numbered ``numbers``, all with ``columns``. Raises :class:`DataError` for one that is not so."""
        windows = []
        for item, number in zip(items, numbers, strict=True):
            if (found := self._columns(item)) != columns:
                raise self._wrong(number, f"has the columns {list(found)}, the first has {list(columns)}", "be alike")
            windows.append(self.window(item, number))
        return stack(windows)

    def window(self, item: Any, number: int) -> Window:
        """``item``, number ``number``, as a window. Raises :class:`DataError` where it is none."""
        given = item if isinstance(item, Mapping) else {"input_ids": item}
        if "input_ids" not in given:
            raise self._wrong(number, f"has the keys {list(given)}", "have input_ids")
        tokens = self._ints(given["input_ids"], number, "input_ids", 0, self.vocab_size)
        labels = positions = lengths = None
        if "labels" in given:
            labels = self._ints(given["labels"], number, "labels", 0, self.vocab_size, IGNORED)
        elif "loss_mask" in given:
            labels = np.where(self._ints(given["loss_mask"], number, "loss_mask", 0, 2) == 1, tokens, IGNORED)
        elif "attention_mask" in given and (self._ints(given["attention_mask"], number, "attention_mask") == 0).any():
            raise self._wrong(number, "has tokens that attention_mask leaves out", "have labels or a loss_mask as well")
        if {"position_ids", "sequence_lengths"} <= given.keys():
            raise self._wrong(number, "has position_ids and sequence_lengths", "have one of them")
        if "sequence_lengths" in given:
            lengths = np.asarray(given["sequence_lengths"])
            if (
                lengths.dtype.kind not in "iu"
                or lengths.ndim != 1
                or lengths.min(initial=1) < 1
                or lengths.sum() != self.length
            ):
                raise self._wrong(number, f"has sequence_lengths {lengths.tolist()}", f"sum to {self.length} tokens")
            lengths = lengths.astype(np.int64)
        if "position_ids" in given:
            positions = self._ints(given["position_ids"], number, "position_ids", 0, self.length)
        return Window(tokens, labels, positions, lengths)

    def _ints(self, values: Any, number: int, key: str, least: int = 0, end: int = 2, besides: int = 0) -> Ints:
        try:
            found = np.asarray(values)
        except Exception as error:  # a tensor on a GPU, rows of unequal length
            raise self._wrong(number, f"has {key} that are no array ({_line(error)})", "have one") from error
        if found.shape != (self.length,):
            raise self._wrong(
                number,
                f"has {key} of shape {list(found.shape)}",
                f"have shape [{self.length}] with data.sequence_length and data.window as they are",
            )
        if found.dtype.kind not in "iub":
            raise self._wrong(number, f"has {key} of type {found.dtype}", "be integers")
        found = found.astype(np.int64)
        wrong = np.flatnonzero(((found < least) | (found >= end)) & (found != besides))
        if wrong.size:
            at, limit = int(wrong[0]), f"be {least} to {end - 1}"
            if end == self.vocab_size:
                limit += f", as the model's vocab_size is {end}: use its tokenizer or set model.sizes.vocab_size"
            raise self._wrong(number, f"has {found[at]} at {at} of its {key}", limit)
        return found

    def _columns(self, item: Any) -> tuple[str, ...]:
        keys = [key for key in _KEYS if isinstance(item, Mapping) and key in item]
        return tuple(dict.fromkeys("labels" if key == "loss_mask" else key for key in keys))

    def _wrong(self, number: int, found: str, expected: str) -> DataError:
        return DataError(f"item {number} of {self.name} {found}: it must {expected}")


def _line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
