"""The code blocks of Markdown pages, run in order as they stand there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from vggtorch.cli import main

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_blocks(page: Path) -> set[str]:
    """Run a page's Python blocks, which share their names, and its commands; the languages."""
    names: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text())
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(page), "exec"), names)
        else:
            for command in block.replace("\\\n", " ").splitlines():
                _run(command)
    return {language for language, _ in blocks}


def _run(command: str) -> None:
    program, *arguments = shlex.split(command, comments=True) or [""]
    if not program:
        return
    assert program == "vggtorch", f"{command}: only vggtorch's own commands can be run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments) == 0, command
    assert printed.getvalue(), command
