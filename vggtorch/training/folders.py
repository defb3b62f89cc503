"""What a folder of images holds: its splits, its classes, their files, and which can't be read."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vggtorch import files
from vggtorch.models import SUFFIXES, PixelGate, read_image

PIXELS_AT_ONCE = 2**26  # decoded at the same time while a folder is checked; about half a GB
NAMED = 10  # files that a message lists; it counts the others
SYSTEM_FILES = {".ds_store", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"}


class Labelled(NamedTuple):
    """A readable image file, the index of its class, and its SHA-256."""

    path: Path
    label: int
    digest: str


@dataclass(frozen=True)
class _Check:
    digest: str = ""
    problem: str = ""


class Splits(NamedTuple):
    """The folders of a data set: what trains, chooses the best epoch, and is scored at the end."""

    train: Path
    validation: Path | None = None
    test: Path | None = None


def find_splits(folder: Path) -> Splits:
    """FOLDER/train and the folders beside it that validate and test; else FOLDER itself.

    A folder `test` never validates: what chooses the best epoch can't test it too.
    """
    train, test = folder / "train", folder / "test"
    if not train.is_dir():
        return Splits(folder)
    held = next((folder / n for n in ("val", "valid", "validation") if (folder / n).is_dir()), None)
    if held or test.is_dir():
        return Splits(train, held, test if test.is_dir() else None)
    others = [p for p in folder.iterdir() if p.is_dir() and p.name[0] != "." and p != train]
    return Splits(folder) if others else Splits(train)


def count_images(folder: Path) -> tuple[int, int]:
    """How many images and classes a folder has, by the files' names; refuses as `read_classes`."""
    classes = _class_folders(folder)
    return len(_listed(folder, classes)[0]), len(classes)


def _class_folders(folder: Path) -> list[str]:
    """The names of the classes, sorted."""
    if not folder.is_dir():
        raise ValueError(f"{folder} isn't a folder. Expected one with a subfolder for each class.")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise ValueError(
            f"{folder} has no subfolders. Expected one for each class, with that class's images."
        )
    if len(classes) == 1:
        raise ValueError(
            f"{folder} has one class alone, {classes[0]!r}, and so nothing to tell apart. Expected "
            f"a subfolder for each of several classes; if they lie one level deeper, pass "
            f"{folder / classes[0]}."
        )
    return classes


def read_classes(
    folder: Path, on_unreadable: Literal["skip", "stop"]
) -> tuple[list[str], list[Labelled]]:
    """The classes of a folder, one for each subfolder, and their images, each of which was read.

    Warns of files that are left out, and of images that can't be read under `skip`.

    Raises:
        ValueError: no such folder, fewer than two classes, a class without images, or an image
            that can't be read under `stop`.
    """
    classes = _class_folders(folder)
    images, left_out = _listed(folder, classes)
    if left_out:
        warnings.warn(f"Left out of {folder}: {_counted(left_out)}.", stacklevel=3)
    checked = _checked([path for path, _ in images])
    bad = [check.problem for check in checked if check.problem]
    if bad:
        message = f"{len(bad)} of {len(images)} images in {folder} can't be read: {_first(bad)}"
        if on_unreadable == "stop":
            raise ValueError(f"{message} Mend or remove them, or train with on_unreadable='skip'.")
        warnings.warn(f"{message} Training goes on without them.", stacklevel=3)
    good = [
        Labelled(path, label, check.digest)
        for (path, label), check in zip(images, checked, strict=True)
        if not check.problem
    ]
    filled = {image.label for image in good}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise ValueError(
            f"No images for {', '.join(empty[:NAMED])}{', ...' if len(empty) > NAMED else ''} in "
            f"{folder}. Expected {', '.join(sorted(SUFFIXES))} files in every class's subfolder: "
            f"add some, or remove the subfolder."
        )
    return classes, good


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """The image files of each class with its index, and how many others there are of each kind."""
    images: list[tuple[Path, int]] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.is_dir() or path.name.lower() in SYSTEM_FILES:
                continue
            suffix = path.suffix.lower()
            if path.name.startswith("."):
                left_out["hidden"] += 1
            elif not path.is_file():
                left_out["no regular file, or a link to nothing"] += 1
            elif suffix in SUFFIXES:
                images.append((path, label))
            else:
                left_out[suffix[:20] or "without an ending"] += 1
    beside = sum(p.suffix.lower() in SUFFIXES and p.is_file() for p in folder.iterdir())
    if beside:
        left_out["images beside the classes' folders"] = beside
    return images, left_out


def _counted(left_out: Counter[str]) -> str:
    """How many files of which kind, the most frequent first."""
    kinds = left_out.most_common(NAMED)
    more = left_out.total() - sum(count for _, count in kinds)
    parts = [f"{count} {kind}" for kind, count in kinds] + ([f"{more} others"] if more else [])
    return f"{left_out.total()} files ({', '.join(parts)})"


def _first(problems: Sequence[str]) -> str:
    """The first of many sentences, and how many more there are."""
    more = f" And {len(problems) - NAMED} more." if len(problems) > NAMED else ""
    return " ".join(problems[:NAMED]) + more


def _checked(paths: Sequence[Path]) -> list[_Check]:
    """Decode every image once, few of the large ones at a time."""
    gate = PixelGate(PIXELS_AT_ONCE)

    def check(path: Path) -> _Check:
        try:
            read_image(path, gate)
            return _Check(digest=files.sha256(path))
        except (OSError, ValueError) as error:
            reason = files.first_line(error).removeprefix("Can't read ").rstrip(".")
            return _Check(problem=f"{reason}.")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(check, paths))
