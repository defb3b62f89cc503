"""What users pass to several functions, refused in the same words everywhere."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int = 1) -> int:
    """An argument that is a whole number, as an int.

    >>> from vggtorch.checks import whole
    >>> whole("repeats", 5)
    5

    Raises:
        ValueError: it is none, or is less than `least`.
    """
    if not is_whole(value) or value < least:
        raise ValueError(f"Received {name}={value!r}; expected a whole number from {least}.")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """An argument that is True or False, or the number 1 or 0, Python's or NumPy's, as a bool.

    >>> from vggtorch.checks import switch
    >>> switch("partial", True)
    True

    Raises:
        ValueError: it is none of these.
    """
    plain = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(plain, int) or plain not in (0, 1):
        raise ValueError(f"Received {name}={value!r}; expected True or False.")
    return bool(plain)
