"""One exception type per kind of mistake. The command line prints the message, without a traceback."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # what the Hub's access tokens look like
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# What stands before an @, or after a question mark: where addresses carry passwords and tokens.
_ADDRESSES = (
    re.compile(r"(://)[^\s'\"]*@"),
    re.compile(r"(://[^\s'\"/]*):[^\s'\"/@]+(?=/|\s|['\"]|$)"),
    re.compile(r"(://[^\s'\"?]*\?)[^\s'\"]+"),
)


class BadInput(ValueError):
    """What the user gave is wrong: a recipe, a file, a shape, a number. Exit code 2."""


class RecipeError(BadInput):
    """The recipe is wrong; the message has one line per problem."""


class BrokenFile(BadInput):
    """A file is not what it should be. The message names it and what was found."""


class Refused(BadInput):
    """The folder holds the results of something else, which is never overwritten."""


class Locked(BadInput):
    """Another live process works in the folder."""


class Failed(RuntimeError):
    """A run failed for a reason that is not the user's. Exit code 1."""


def redacted(text: str) -> str:
    """The text without secrets: access tokens of the Hub, and what may be a password or a token within an address."""
    text = _without_tokens(text)
    for pattern in _ADDRESSES:
        text = pattern.sub(lambda found: f"{found[1]}***{'@' if found[0].endswith('@') else ''}", text)
    return text


def has_token(text: str) -> bool:
    """Whether an access token of the Hub is in a text: one of the environment, or what looks like one."""
    return _without_tokens(text) != text


def _without_tokens(text: str) -> str:
    for name in _VARIABLES:
        if len(token := os.environ.get(name, "").strip()) >= 8:  # a shorter one would be found in words
            text = text.replace(token, "hf_***")
    return _TOKEN.sub("hf_***", text)


def shown(text: str) -> str:
    """A text as a terminal or a log may have it: without secrets, and with control characters but line breaks written out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in redacted(text))


def meant(found: object, known: Iterable[str], before: str = "") -> str:
    """A suggestion to end a message with, where what was found is much like one that is known.

    What stands before each of those is left out of them, such as the dashes of options, which would make all alike.
    """
    close = difflib.get_close_matches(str(found), list(known), n=1)
    return f"; did you mean {before}{close[0]}?" if close else ""
