"""Text where people read it: that others wrote, made harmless, and tables that fit a terminal.

Names of classes and tensors, headers of files and answers of servers may hold anything: line
breaks, instructions for the terminal, marks of HTML, marks that turn the direction of writing.
"""

from __future__ import annotations

import html
import os
import re
import shlex
import shutil
import sys
import textwrap
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


def visible_lines(text: object) -> str:
    """The same of text of several lines, which stay lines, each of LONGEST_MESSAGE characters."""
    return "\n".join(visible(line, LONGEST_MESSAGE) for line in str(text).split("\n"))


def figure_text(value: float) -> str:
    """A figure with four digits behind the point; with four in all where it is far from 1.

    >>> from vggtorch.text import figure_text
    >>> figure_text(0.91234), figure_text(4.567e24)
    ('0.9123', '4.567e+24')
    """
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.4g}"


def in_html(text: object) -> str:
    """Text for an HTML or SVG file, between tags or inside quotes."""
    return html.escape(visible(text))


def name_in_html(text: object) -> str:
    """A name as an HTML element: what isn't seen of a long one is its title; right to left or not.

    >>> from vggtorch.text import name_in_html
    >>> name_in_html("a & b")
    '<bdi class=name title="a &amp; b">a &amp; b</bdi>'
    """
    return f'<bdi class=name title="{in_html(text)}">{in_html(text)}</bdi>'


def in_markdown(text: object) -> str:
    r"""Text for a Markdown file, which reads as it is.

    >>> from vggtorch.text import in_markdown
    >>> in_markdown("<b>*cat*</b>")
    '&lt;b&gt;\\*cat\\*&lt;/b&gt;'
    """
    escaped = html.escape(visible(text), quote=False)
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~$^-])", r"\\\1", escaped)
    return re.sub(r"^(\d+)\.", r"\1\.", escaped)  # would begin a numbered list


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


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it goes to a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def columns_of(text: str) -> int:
    """How many columns of a terminal a line of text takes: Chinese characters take two each.

    >>> from vggtorch.text import columns_of
    >>> columns_of("cat"), columns_of("日本")
    (3, 4)
    """
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # which only some commands need

    return cell_len(text)


def shortened(text: object, columns: int) -> str:
    """A line of text in so many columns at most; the middle of longer text is left out.

    >>> from vggtorch.text import shortened
    >>> shortened("encoder_stage1_block2_conv", 16), shortened("日本の秋の紅葉", 9)
    ('encoder_…k2_conv', '日本…紅葉')
    """
    shown = visible(text)
    if columns_of(shown) <= columns:
        return shown
    for kept in range(len(shown) - 1, 1, -1):
        found = f"{shown[: (kept + 1) // 2]}…{shown[len(shown) - kept // 2 :]}"
        if columns_of(found) <= columns:
            return found
    return "…"


def wrapped(text: str, width: int | None) -> str:
    """Lines broken between words where they are longer than `width`, what follows indented.

    >>> from vggtorch.text import wrapped
    >>> print(wrapped("one two three", 8))
    one two
      three
    """
    if width is None:
        return text
    found: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        found += textwrap.wrap(
            line,
            width,
            subsequent_indent=indent or "  ",
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(found)


def table(lines: Sequence[Sequence[str]], left: int, width: int | None = None) -> str:
    """Columns as wide as their longest cell, the first `left` flush left, the rest right.

    Where that is wider than `width`, a row takes several lines, the first with the columns that are
    flush left.

    >>> from vggtorch.text import table
    >>> print(table([("name", "n"), ("a", "10")], left=1))
    name   n
    a     10
    """
    widths = [max(map(columns_of, column)) for column in zip(*lines, strict=True)]
    parts = [list(range(len(widths)))]
    if width is not None and sum(widths) + 2 * len(widths) - 2 > width:
        parts = [part for part in _broken(widths, left, width) if part]
    rows = []
    for line in lines:
        for part in parts:
            gaps = {i: " " * (widths[i] - columns_of(line[i])) for i in part}
            cells = [line[i] + gaps[i] if i < left else gaps[i] + line[i] for i in part]
            text = "  ".join(cells).rstrip()
            if text or part is parts[0]:
                rows.append(text if part is parts[0] else f"    {text}")
    return "\n".join(rows)


def _broken(widths: Sequence[int], left: int, width: int) -> list[list[int]]:
    """The columns of each line of a row that one line is too short for."""
    parts: list[list[int]] = [[]]
    room = width
    for i, needed in enumerate(widths):
        if i == left or (parts[-1] and needed > room):
            parts.append([])
            room = width - 4  # all lines but the first are indented
        parts[-1].append(i)
        room -= needed + 2
    return parts
