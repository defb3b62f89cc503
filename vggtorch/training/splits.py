"""The parts of the data: what trains, what chooses the best epoch, what is scored at the end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vggtorch.paths import TABLES, as_path
from vggtorch.telling import tell
from vggtorch.training.folders import NAMED, has_images, subfolders
from vggtorch.training.tables import SPLITS, TablePart, is_table, read_rows
from vggtorch.weights import shortened

# What parts of the data are called elsewhere, of which it isn't plain what they are for.
_OTHERS = ("eval", "evaluation", "holdout")


class Splits(NamedTuple):
    """Where a data set's images stand: what trains, chooses the best epoch, is scored at the end.

    Each is a folder, a part of a table, or what a user passes for it.
    """

    train: Any
    validation: Any = None
    test: Any = None


def are_files(part: Any) -> bool:
    """Whether a part of the data is a folder or a table, and no Dataset."""
    return isinstance(part, str | Path | TablePart)


def find_splits(data: Path) -> Splits:
    """DATA/train and what stands beside it that validates and tests; else DATA itself.

    What is named `test` never validates: what chooses the best epoch can't test it too. The names
    are those of a table's column `split`, in upper or lower case; a table is split by that column,
    and in a folder, `train.csv` and its like do as the folder `train`.

    Raises:
        ValueError: a table that can't be read, or one without rows that train; two folders for one
            part; folders that would be classes, and look like parts by their names.
    """
    if is_table(data):
        return _table_splits(data)
    found, others = _parts_in(data)
    train, held, test = (found.get(part) for part in ("train", "validation", "test"))
    if train is None:
        names = {part: [n for n, of in SPLITS.items() if of == part] for part in SPLITS.values()}
        tables = {part: _table_in(data, called) for part, called in names.items()}
        if tables["train"] is None:
            _check_classes(data, found, others)
            return Splits(data)
        return Splits(tables["train"], tables["validation"], tables["test"])
    if held is None and test is None:
        _check_classes(data, found, others)
        return Splits(data) if others else Splits(train)
    return Splits(train, held, test)


def splits_of(given: Any) -> Splits:
    """What trains, validates and tests of what the user passed as one."""
    # A list of paths, or of images and labels as Keras takes them, is no Dataset.
    first = given[0] if isinstance(given, list | tuple) and given else None
    if (paths := isinstance(first, str | Path)) or hasattr(first, "__array__"):
        raise ValueError(
            f"Received a {type(given).__name__} of {'paths' if paths else 'arrays'}; expected "
            + (
                "one folder, or a table of the paths and their labels."
                if paths
                else "a Dataset of pairs: torch.utils.data.TensorDataset(images, labels)."
            )
        )
    if isinstance(given, str | Path):
        return find_splits(as_path(given))
    if not isinstance(given, Mapping):
        return Splits(given)
    called = {name: SPLITS.get(str(name).lower()) for name in given}
    unknown = [name for name, part in called.items() if part is None]
    parts = {part: given[name] for name, part in called.items() if part is not None}
    if unknown or "train" not in parts or len(parts) < len(given):
        raise ValueError(
            f"Received a dictionary of {', '.join(map(repr, given))}; expected train, and perhaps "
            f"validation and test, each once."
        )
    return Splits(**parts)


def _check_classes(data: Path, found: Mapping[str, Path], others: Sequence[str]) -> None:
    """Refuse folders that would be classes, and are parts of the data by their names.

    They are if of two names one says train, the other what it doesn't train, and the other letters
    are the same: training_set and test_set, 1_train and 2_test. train_station and test_tube aren't.
    """
    names = [*(path.name for path in found.values()), *others]
    parts: dict[str, dict[str, str]] = {}  # rest of a name -> the part -> the name
    for name in names:
        for word in sorted((*SPLITS, *_OTHERS), key=len, reverse=True):
            if word in name.lower():
                part = "train" if SPLITS.get(word) == "train" else "other"
                rest = re.sub(r"[\W\d_]+", "", name.lower().replace(word, "", 1))
                parts.setdefault(rest, {}).setdefault(part, name)
                break
    for alike in parts.values():
        if len(alike) == 2:
            raise ValueError(
                f"{data} has the folders {alike['train']} and {alike['other']}, which would be "
                f"classes and look like parts of the data. Rename them to train, val and test, or "
                f"pass the one that trains and the one that validates by themselves "
                f"(vt.finetune(model, train_folder, validation_folder))."
            )
    if len(found) > 1 and not others:
        raise ValueError(
            f"{data} has {' and '.join(path.name for path in found.values())}, and nothing to "
            f"train on. Expected a folder train beside them."
        )


def tell_beside(data: Path) -> None:
    """Warn of what stands beside the parts of the data and is none of them, or might be one."""
    found, others = _parts_in(data)
    train = found.get("train")
    if train and (len(found) > 1 or not others) and has_images(data):
        tell(
            f"Left out of {data}: the images beside {train.name}, which are in no folder of it.",
        )
    if others and train and len(found) > 1:
        tell(
            f"Left out of {data}: the folders {shortened(others, NAMED)}, which are neither for "
            f"training, nor for validation, nor for testing by their names ({', '.join(SPLITS)}).",
        )
    elif others and train and len(inside := subfolders(train)) > 1 and not has_images(train):
        tell(
            f"{train} is taken for a class, as {others[0]} beside it is. If the folders in it are "
            f"the classes ({shortened([path.name for path in inside], NAMED)}), pass {train}.",
        )


def _parts_in(data: Path) -> tuple[dict[str, Path], list[str]]:
    """The subfolders that are parts of the data by their names, and the names of the others."""
    found: dict[str, Path] = {}
    others: list[str] = []
    for path in subfolders(data) if data.is_dir() else []:
        part = SPLITS.get(path.name.lower())
        if part is None:
            others.append(path.name)
        elif part in found:
            raise ValueError(
                f"{data} has two folders for one part, {found[part].name} and {path.name}. "
                f"Expected one; or pass the parts by themselves (vt.finetune(model, train_folder, "
                f"validation_folder))."
            )
        else:
            found[part] = path
    return found, others


def _table_in(folder: Path, names: Sequence[str]) -> TablePart | None:
    """The table of one of these names in a folder."""
    paths = [folder / f"{name}{suffix}" for name in names for suffix in sorted(TABLES)]
    return next((TablePart(path) for path in paths if path.is_file()), None)


def _table_splits(table: Path) -> Splits:
    found = {row.split for row in read_rows(table)}
    if found == {""}:
        return Splits(TablePart(table))
    if "train" not in found:
        raise ValueError(
            f"No row of {table} has the split train, only {', '.join(sorted(found))}. Expected "
            f"images to train on."
        )
    rest = [TablePart(table, n) if n in found else None for n in ("validation", "test")]
    return Splits(TablePart(table, "train"), *rest)


def test_part(data: Path) -> Path | TablePart:
    """Of data with splits the part that tests, which has to be there; else all of it."""
    if is_table(data):
        found = {row.split for row in read_rows(data)}
        if found >= {"train", "validation"} and "test" not in found:
            raise ValueError(
                f"{data} has rows to train on and to validate with, and none of the split test. "
                f"Pass a table of the images to evaluate on, without the others."
            )
        return TablePart(data, "test" if "test" in found else "")
    folders, _ = _parts_in(data)
    if "test" in folders and len(folders) > 1:
        return folders["test"]
    splits = find_splits(data)
    if splits.validation and not splits.test:
        raise ValueError(
            f"{data} has {_name(splits.train)} and {_name(splits.validation)}, and no test. Pass "
            f"the one to evaluate on by itself: {splits.validation}, say."
        )
    return splits.test or splits.train


def _name(part: Path | TablePart) -> str:
    return (part.path if isinstance(part, TablePart) else part).name


def as_part(given: str | Path | TablePart) -> Path | TablePart:
    """What a user names as one part of the data: a folder, or a whole table."""
    if isinstance(given, TablePart):
        return given
    path = as_path(given)
    return TablePart(path) if is_table(path) else path
