"""Docstrings name things as Sphinx does, :class:`Thing`; here the name alone is left."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with each page."""
    return re.sub(r":(?:class|func|meth|attr|mod):(?=<code>)", "", html)
