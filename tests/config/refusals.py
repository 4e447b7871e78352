"""The one line that a mistake gets."""

from collections.abc import Callable
from typing import Any

import pytest

from blipds.errors import UserError


def error(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message of the UserError that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
