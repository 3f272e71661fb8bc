"""One exception type per kind of mistake. The command line prints the message, without a traceback."""

from __future__ import annotations


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
