"""Numbered templates: ``https://host/x-{00000..00012}.ds`` is thirteen URIs."""

import re

from sparktrain.errors import DataError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 1_000_000


def expand(uri: str) -> list[str]:
    """The URIs that ``uri`` stands for: itself, or one per number where it has ``{first..last}``, both included.

    Numbers are as wide as ``first`` where that begins with a zero, as wide as they are otherwise.
    """
    if "{" not in uri and "}" not in uri:
        return [uri]
    ranges = _RANGE.findall(uri)
    if len(ranges) != 1 or uri.count("{") != 1 or uri.count("}") != 1:
        raise DataError(f"{uri} is no template: expected one {{first..last}}, such as {{00000..00012}}")
    first, last = ranges[0]
    padded = len(first) > 1 and first.startswith("0")
    if int(last) < int(first) or (padded and len(last) != len(first)) or int(last) - int(first) >= _MOST:
        raise DataError(
            f"{uri} is no template: expected numbers of the same width, the first not above the last, "
            f"at most {_MOST} of them"
        )
    width = len(first) if padded else 0
    before, after = _RANGE.split(uri)[0], _RANGE.split(uri)[3]
    return [f"{before}{number:0{width}}{after}" for number in range(int(first), int(last) + 1)]
