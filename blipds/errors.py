"""Errors that a user can mend: one line that says what, where and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The command lines print its message alone, without a traceback."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The tail of an error line about an unknown name: the nearest spelling, then all that is allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"
