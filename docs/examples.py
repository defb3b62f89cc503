"""Lets mkdocstrings see what it wouldn't: VGG16, and examples under "Example:" and in the text."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

import vggtorch as vt


class Examples(griffe.Extension):
    """Renames the section "Example:", and puts a fence around what stands in the text."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe for vggtorch: VGG16 is made at run time, where griffe doesn't look."""
        parameters = (
            griffe.Parameter(
                parameter.name,
                annotation=parameter.annotation,
                kind=griffe.ParameterKind[parameter.kind.name.lower()],
                default=repr(parameter.default),
            )
            for parameter in inspect.signature(vt.VGG16).parameters.values()
        )
        made = griffe.Function(
            "VGG16", parameters=griffe.Parameters(*parameters), returns="keras.Model"
        )
        made.docstring = griffe.Docstring(inspect.getdoc(vt.VGG16) or "", parent=made)
        self.on_instance(obj=made)
        pkg["models.vgg"].set_member("VGG16", made)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n").split("\n\n")
            obj.docstring.value = "\n\n".join(
                f"```pycon\n{p}\n```" if p.startswith(">>> ") else p for p in paragraphs
            )
