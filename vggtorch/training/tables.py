"""Labels that stand in a table: a CSV file or JSON lines, with an image's path and its label."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vggtorch.paths import SUFFIXES, TABLES, check_data
from vggtorch.telling import tell
from vggtorch.text import visible
from vggtorch.weights import shortened

JSON = frozenset({".jsonl", ".ndjson"})
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
IS_VALID = {"true": "validation", "1": "validation", "false": "train", "0": "train"}  # fastai's
COLUMNS = {  # what each column may be called; the first is the name in messages
    "path": ("path", "file", "file_name", "filename", "file_path", "filepath", "image",
             "image_path"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "set", "subset"),
    "is_valid": ("is_valid",),
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


class Row(NamedTuple):
    """An image, the name of its class, and of its split: train, validation, test or none."""

    path: Path
    label: str
    split: str


class TablePart(NamedTuple):
    """A table of labelled images, or one split of it."""

    path: Path
    split: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.split})" if self.split else str(self.path)


def is_table(path: Path) -> bool:
    """Whether a name is that of a table, by its ending."""
    return path.suffix.lower() in TABLES


def ordered(names: Iterable[str]) -> list[str]:
    """Class names in their order: that of numbers where all of them are."""
    names = set(names)
    if all(map(_NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def read_rows(path: Path) -> list[Row]:
    """The rows of a table; paths in it are relative to the table's folder, or absolute.

    Warns of columns that say nothing here, and of rows that stand there twice.

    Raises:
        ValueError: no such file, no columns of paths and labels, a row without one of them, an
            image that has two labels or is in two splits.
    """
    check_data(path)
    try:
        found = list((_json_rows if path.suffix.lower() in JSON else _csv_rows)(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't text in UTF-8 ({error.reason}). Save it so.") from error
    except csv.Error as error:
        raise ValueError(f"{path} can't be read as a table: {error}. Expected CSV.") from error
    rows: dict[Path, Row] = {}
    twice = 0
    for line, cells in found:
        row = _row(path, line, cells)
        before = rows.setdefault(row.path, row)
        if before != row:
            was, now = (f"{r.label!r}{r.split and f' ({r.split})'}" for r in (before, row))
            raise ValueError(
                f"{row.path} stands twice in {path}, as {was} and, in line {line}, {now}. Expected "
                f"one label and one split. Files of one name in several folders need the folder "
                f"before it: folder/{row.path.name}."
            )
        twice += before is not row
    if not rows:
        raise ValueError(f"{path} has no rows. Expected a path and a label in each.")
    _tell_of_quantities(path, {row.label for row in rows.values()})
    if twice:
        rows_do = "A row repeats another" if twice == 1 else f"{twice} rows repeat others"
        tell(f"{rows_do} in {path}; each counts once.")
    return list(rows.values())


def _tell_of_quantities(path: Path, labels: set[str]) -> None:
    """Warn of labels that are numbers and not whole, which may be meant as quantities."""
    if all(map(_NUMBER.fullmatch, labels)) and any("." in label for label in labels):
        shown = ordered(labels)
        tell(
            f"The labels in {path} are numbers ({shortened(shown, 3)}). Each of the {len(shown)} "
            f"becomes a class; a quantity isn't predicted here.",
        )


def _row(table: Path, line: int, cells: Mapping[str, Any]) -> Row:
    """One row from its cells by what they mean."""
    for meaning, value in cells.items():
        if isinstance(value, list | dict | float) or value is None or not str(value).strip():
            raise ValueError(
                f"Line {line} of {table} has {meaning}={value!r}; expected "
                f"{'the path of an image' if meaning == 'path' else 'one name'}. Fill it in, or "
                f"leave the line out."
            )
    split = str(cells.get("split", cells.get("is_valid", ""))).strip().lower()
    known = IS_VALID if "is_valid" in cells else SPLITS
    if split and split not in known:
        raise ValueError(
            f"Line {line} of {table} has the split {split!r}; expected one of {', '.join(known)}."
        )
    name = str(cells["path"]).strip()
    if re.match(r"[a-z]+://", name):
        raise ValueError(
            f"Line {line} of {table} has the address {name}, not a file. Download the images first."
        )
    path = table.parent / name
    return Row(path, str(cells["label"]).strip(), known.get(split, ""))


def _meanings(table: Path, names: Iterable[str]) -> dict[str, str]:
    """Name of a column -> what it means here."""
    names = list(names)
    found = _meanings_of(names)
    count = Counter(found.get(name) for name in names)
    if not count["path"] == count["label"] == 1 or count["split"] + count["is_valid"] > 1:
        raise ValueError(
            f"{table} has the columns {', '.join(map(repr, names))}; expected one of paths and "
            f"one of labels, named path and label (or {', '.join(COLUMNS['path'][1:])}; "
            f"{', '.join(COLUMNS['label'][1:])}), and perhaps one named split. "
            f"Rename them in the table; of one column for each class make one of names (in pandas, "
            f"table[classes].idxmax(axis=1))."
        )
    if others := [name for name in names if name not in found]:
        shown = [repr(name) if name.strip() else "one without a name" for name in others]
        tell(
            f"Columns of {table} that say nothing here: {', '.join(shown)}.",
        )
    return found


def _meanings_of(names: Iterable[str]) -> dict[str, str]:
    """The names that mean something here, and what."""
    plain = {name: name.strip().lower().replace(" ", "_") for name in names}
    known = {called: meaning for meaning, names in COLUMNS.items() for called in names}
    return {name: known[called] for name, called in plain.items() if called in known}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's line number and cells.

    Commas, semicolons, tabs or bars stand between cells; a header, or path and label, comes first.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        delimiter = max(",;\t|", key=first.count)
        rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        header: list[str] | None = None
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                is_image = Path(cells[0].strip()).suffix.lower() in SUFFIXES
                header = ["path", "label", "split"][: len(cells)] if is_image else cells
                meanings = _meanings(path, header)
                if not is_image:
                    continue
            if open_in := next((c for c in cells if "\n" in c or "\r" in c), None):
                raise ValueError(
                    f"A name in {path} goes on in another line, up to line {rows.line_num}: "
                    f"{open_in[:40]!r}... Expected names of one line; close the quotation mark "
                    f"before it."
                )
            if len(cells) != len(header):
                raise ValueError(
                    f"Line {rows.line_num} of {path} has {len(cells)} "
                    f"{'cell' if len(cells) == 1 else 'cells'}; expected {len(header)}. Put names "
                    f"that hold {delimiter!r} in quotes."
                )
            pairs = zip(header, cells, strict=True)
            yield rows.line_num, {meanings[n]: cell for n, cell in pairs if n in meanings}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and values: one JSON object in a line, all with the same names."""
    meanings: dict[str, str] | None = None
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:  # too many digits, or too many brackets
                raise ValueError(f"Line {number} of {path} isn't JSON: {error}.") from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"Line {number} of {path} is {visible(repr(values), 60)}; expected one object, "
                    f'{{"path": ..., "label": ...}}, in each line.'
                )
            if meanings is None:
                meanings = _meanings(path, values)
            if new := [n for n in _meanings_of(values) if n not in meanings]:
                raise ValueError(
                    f"Line {number} of {path} has {', '.join(new)}, which its first line lacks. "
                    f"Expected the same names in each line."
                )
            if missing := [name for name in meanings if name not in values]:
                raise ValueError(
                    f"Line {number} of {path} lacks {', '.join(missing)}, which its first line has."
                )
            yield number, {meaning: values[name] for name, meaning in meanings.items()}
