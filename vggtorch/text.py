"""Text that others wrote, made harmless where people read it: terminal, HTML page, Markdown.

Names of classes and tensors, headers of files and answers of servers may hold anything: line
breaks, instructions for the terminal, marks of HTML, marks that turn the direction of writing.
"""

from __future__ import annotations

import html
import os
import re
import shlex
from collections.abc import Sequence

LONGEST_NAME = 200  # characters of a name that are shown
LONGEST_MESSAGE = 4000


def visible(text: object, most: int = LONGEST_NAME) -> str:
    r"""One line of text, in which all that can't be seen stands as an escape sequence.

    >>> from vggtorch.text import visible
    >>> visible("a cat\n\x1b[31m")
    'a cat\\n\\x1b[31m'

    Args:
        text: anything.
        most: characters that are kept; the middle of longer text is left out.
    """
    text = str(text)
    if len(text) > most:
        half = (most - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def visible_lines(text: object, most: int = LONGEST_MESSAGE) -> str:
    """The same of text of several lines, which stay lines; `most` characters of each."""
    return "\n".join(visible(line, most) for line in str(text).split("\n"))


def in_html(text: object) -> str:
    """Text for an HTML or SVG file, between tags or inside quotes."""
    return html.escape(visible(text))


def in_markdown(text: object) -> str:
    r"""Text for a Markdown file, which reads as it is.

    >>> from vggtorch.text import in_markdown
    >>> in_markdown("<b>*cat*</b>")
    '&lt;b&gt;\\*cat\\*&lt;/b&gt;'
    """
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$^-])", r"\\\1", visible(text).replace("&", "&amp;"))
    escaped = re.sub(r"^(\d+)\.", r"\1\.", escaped)  # would begin a numbered list
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def as_code(text: object) -> str:
    """Text as code in Markdown, between as many backticks as it takes."""
    shown = visible(text, LONGEST_MESSAGE)
    runs = [len(run) for run in re.findall("`+", shown)]
    fence = "`" * (max(runs, default=0) + 1)
    space = " " if runs else ""
    return f"{fence}{space}{shown}{space}{fence}"


def as_command(arguments: Sequence[str]) -> str:
    """A command line that others may see: absolute paths, which say whose machine it was, are cut.

    >>> from vggtorch.text import as_command
    >>> as_command(["/home/ann/.venv/bin/vggtorch", "finetune", "/data/two cats", "--seed", "1"])
    "vggtorch finetune 'two cats' --seed 1"
    """
    return shlex.join(map(without_folders, arguments))


def without_folders(value: object) -> str:
    """A value as text; of an absolute path, also behind `--option=`, only the last part."""
    option, equals, path = str(value).rpartition("=")
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        path = os.path.basename(path.rstrip(os.sep)) or os.sep
        return f"{option}{equals}{path}"
    return str(value)
