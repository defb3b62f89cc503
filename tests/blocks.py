"""The code blocks of Markdown pages, run in order as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

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
    result = subprocess.run(
        [sys.executable, "-m", "vggtorch", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
