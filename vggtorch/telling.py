"""Warnings, which name the line of the user's that asked for what is done."""

from __future__ import annotations

import sys
import warnings

# Packages whose lines aren't the user's, though they may be what calls vggtorch.
INSIDE = "vggtorch", "torch", "keras"


def tell(text: str) -> None:
    """Warn, as from the nearest caller outside of vggtorch, torch and Keras."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and _package(frame.f_globals) in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
