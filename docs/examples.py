"""Lets mkdocstrings see the examples in our docstrings, under "Example:" and in the text."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section, and puts a fence around what stands in the text."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n").split("\n\n")
            obj.docstring.value = "\n\n".join(
                f"```pycon\n{p}\n```" if p.startswith(">>> ") else p for p in paragraphs
            )
