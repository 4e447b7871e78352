"""Errors that a user can mend: one line that says what, where and what is allowed."""

import difflib
import re
from collections.abc import Iterable

# What a line cannot hold: control characters, line separators, and halves of characters, which cannot be written.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class UserError(ValueError):
    """Something the user can mend. The command lines print its message alone, without a traceback.

    It is one line, whatever the files that it quotes hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(CONTROL.sub(" ", message).strip())


def nearest(name: str, allowed: Iterable[str], label: str = "allowed") -> str:
    """The tail of an error line about an unknown name: the nearest spelling, then all that is allowed."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}{label}: {', '.join(allowed)}"


def short_of_memory(error: Exception) -> str:
    """torch's OutOfMemoryError in a few words: how much it wanted, on which GPU."""
    return f"GPU memory is used up ({str(error).partition(' of which')[0]})"
