"""Secrets taken out of what is said and written: errors name things, and the names of some hold passwords.

Taken out is what looks like one, and whatever an environment variable called so holds. Settings that would be written
down with a secret in them are refused where they are read (``tokens/sources``); this is for the words of libraries.
"""

import os
import re

HIDDEN = "…"
_LOOKS = re.compile(
    r"(?<=://)[^/\s@:]*:[^/\s@]*@"  # user:password@
    r"|(?<=[\w/.~-])\?[\w.~%-]+=[^\s'\"]+"  # ?signature=...
    r"|\b(?:hf_|AKIA|ASIA|dapi|ghp_|github_pat_)\w{8,}"
    r"|\b(?:Bearer|Basic)\s+[\w+/=.~-]{8,}"
)
_NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|ACCESS_KEY|API_KEY|SAS)(?:_|$)")
# A shorter one would be found in words that are none.
_SHORTEST = 6


def hidden(text: str) -> str:
    """``text`` without what looks like a secret or is the value of a variable that is called one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return _LOOKS.sub(HIDDEN, text)
