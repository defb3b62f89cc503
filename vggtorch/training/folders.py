"""What a folder or a table of images holds: classes, files, and which can't be read."""

from __future__ import annotations

import contextlib
import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from vggtorch import files
from vggtorch.models import ADVICE_IF_DARK, BRIGHTEST, DARK, SEVERAL_FRAMES, PixelGate, read_image
from vggtorch.paths import SUFFIXES, as_path, check_data
from vggtorch.telling import tell
from vggtorch.training.config import checked_pattern
from vggtorch.training.tables import SPLITS, TablePart, is_table, ordered, read_rows
from vggtorch.weights import shortened

PIXELS_AT_ONCE = 2**26  # decoded at the same time while a folder is checked; about half a GB
NAMED = 10  # files that a message lists; it counts the others
SYSTEM_FOLDERS = {  # of macOS's archives, of Synology's drives, of the drives of Linux and Windows
    "__macosx", "@eadir", "#recycle", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
OURS = (".lock", "_manifest.json")  # which folders have that a run, or features, went into
SYSTEM_FILES = {".ds_store", ".gitignore", ".gitkeep", "desktop.ini", "thumbs.db"}


class Labelled(NamedTuple):
    """A readable image file, the index of its class, its SHA-256, and its size and time."""

    path: Path
    label: int
    digest: str
    stamp: tuple[int, int]


class _Check(NamedTuple):
    """An image that was read, or why it could not be."""

    path: Path
    image: Labelled | None = None
    problem: str = ""
    is_missing: bool = False
    has_frames: bool = False
    brightest: int | None = None  # of 0 ... 255, where the file has 16 bits


def has_images(folder: Path) -> bool:
    """Whether files of images stand in a folder itself."""
    return any(path.suffix.lower() in SUFFIXES and path.is_file() for path in folder.iterdir())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, but for hidden ones, the system's and vggtorch's results."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir()
        and path.name[0] != "."
        and path.name.lower() not in SYSTEM_FOLDERS
        and not _holds_results(path)
    )


def _holds_results(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in OURS)  # also of a folder that is closed


def check_apart(data: object, output_dir: str) -> None:
    """See that a run doesn't go into a folder of images, where it would be taken for a class."""
    if not isinstance(data, str | Path):
        return
    root, output = as_path(data).resolve(), Path(output_dir).resolve()
    if not output.is_dir():
        return
    inside = output == root or root in output.parents
    if inside and not _holds_results(output) and images_under(output)[0]:
        raise ValueError(
            f"Received output_dir={output_dir!r}, which holds images of the data. Choose another "
            f"with output_dir='run', say."
        )


def images_by_class(part: Path | TablePart, label_pattern: str | None = None) -> dict[str, int]:
    """How many images each class has, by the files' names; refuses as `read_classes`."""
    classes, images, _ = _found(part, label_pattern)
    counts = Counter(label for _, label in images)
    _check_filled(part, classes, set(counts))
    return {name: counts[label] for label, name in enumerate(classes)}


Found = tuple[list[str], list[tuple[Path, int]], Counter[str]]  # classes, images, what is left out


def _found(part: Path | TablePart, label_pattern: str | None) -> Found:
    """The classes, the images with the indices of theirs, and what was left out, of each kind."""
    if isinstance(part, TablePart):
        if label_pattern is not None:
            raise ValueError(
                f"Received label_pattern={label_pattern!r} with {part.path}, which has the labels "
                f"itself. Leave one of them out."
            )
        return _of_table(part)
    if label_pattern is not None:
        return _of_names(part, label_pattern)
    classes = _class_folders(part)
    return classes, *_listed(part, classes)


def _of_table(part: TablePart) -> Found:
    """What a part of a table holds; its classes are those of the whole table."""
    rows = read_rows(part.path)
    classes = _several(ordered(row.label for row in rows), f"{part.path} has")
    if not part.split and (splits := {row.split for row in rows} - {""}) and len(splits) > 1:
        raise ValueError(
            f"{part.path} has several splits, {', '.join(sorted(splits))}, where one is expected. "
            f"Pass it alone, as the whole of the data, or a table of one split."
        )
    chosen = [row for row in rows if part.split in ("", row.split)]
    index = {name: i for i, name in enumerate(classes)}
    return classes, [(row.path, index[row.label]) for row in chosen], Counter()


def _of_names(folder: Path, pattern: str) -> Found:
    """What a folder holds at any depth, labelled by the first group of a pattern in files' names.

    As fastai's `from_name_re` has it.
    """
    expression = checked_pattern(pattern)
    check_data(folder)
    files_there, left_out = images_under(folder)
    labels = [(path, expression.search(path.name)) for path in files_there]
    unlabelled = [path.name for path, match in labels if not (match and match[1])]
    if unlabelled or not labels:
        raise ValueError(
            f"label_pattern={pattern!r} finds no label in {len(unlabelled)} of {len(labels)} "
            f"images in {folder}: {', '.join(unlabelled[:NAMED])}. Expected that its first group "
            f"is the label, as in '^(.+)_[0-9]+' for cat_12.jpg."
        )
    names = ordered(match[1] for _, match in labels if match)
    classes = _several(names, f"label_pattern={pattern!r} finds")
    index = {name: i for i, name in enumerate(classes)}
    return classes, [(path, index[match[1]]) for path, match in labels if match], left_out


def _several(classes: list[str], who: str) -> list[str]:
    if len(classes) == 1:
        raise ValueError(f"{who} one class alone, {classes[0]!r}, and so nothing to tell apart.")
    return classes


def _class_folders(folder: Path) -> list[str]:
    """The names of the classes, sorted."""
    check_data(folder)
    classes = [path.name for path in subfolders(folder)]
    if not classes:
        raise ValueError(
            f"{folder} has no subfolders. Expected one for each class, with that class's images. "
            f"Where files' names have the labels, label_pattern='^(.+)_[0-9]+' takes them there."
            f"{_table_near(folder)}{_unlabelled(folder)}"
        )
    if len(classes) == 1:
        inside = folder / classes[0]
        deeper = any(p.is_dir() and p.name[0] != "." for p in inside.iterdir())
        raise ValueError(
            f"{folder} has one class alone, {classes[0]!r}, and so nothing to tell apart. Expected "
            f"a subfolder for each of several classes"
            f"{f'; if the folders in it are classes, pass {inside}' if deeper else ''}."
            f"{_unlabelled(folder)}"
        )
    if all(_has_parts(folder / name) for name in classes):
        parts = ", ".join(path.name for path in subfolders(folder / classes[0]))
        raise ValueError(
            f"Each class in {folder} has the folders {parts}. Expected them outside, with the "
            f"classes in them: train/{classes[0]}. Move them, or pass a table with a column split."
        )
    return classes


def _has_parts(folder: Path) -> bool:
    """Whether the folders in a folder are parts of the data by their names."""
    names = [entry.name.lower() for entry in os.scandir(folder) if entry.is_dir()]
    return all(name in SPLITS for name in names) and "train" in map(SPLITS.get, names)


def _unlabelled(folder: Path) -> str:
    """A hint where a part of the data that only judges may have no labels at all."""
    train = [name for name, part in SPLITS.items() if part == "train"]
    beside = [p for p in folder.parent.glob("*") if p.name.lower() in train and p.is_dir()]
    if SPLITS.get(folder.name.lower(), "train") == "train" or not beside:
        return ""
    return f" Images without labels can't judge anything: pass {beside[0]} alone."


def _table_near(folder: Path) -> str:
    """A hint at a table in a folder without classes, or beside it."""
    tables: list[Path] = []
    with contextlib.suppress(OSError):  # the folder around it may be closed to this user
        for place in (folder, folder.resolve().parent):
            tables += [path for path in sorted(place.iterdir()) if is_table(path)]
    return f" Perhaps {tables[0]} has them, and can be passed itself." if tables else ""


def read_classes(
    part: Path | TablePart,
    on_unreadable: Literal["skip", "stop"],
    label_pattern: str | None = None,
) -> tuple[list[str], list[Labelled]]:
    """The classes of a part of the data and their images, each of which was read.

    Warns of files that are left out, and of images that can't be read under `skip`.

    Raises:
        ValueError: no such folder or table, fewer than two classes, a class without images, or an
            image that can't be read under `stop`.
    """
    classes, images, left_out = _found(part, label_pattern)
    tell_left_out(part, left_out)
    _check_filled(part, classes, {label for _, label in images})
    _tell_alike(part, classes)
    if isinstance(part, Path) and label_pattern is None:
        _tell_nested(part, classes)
    checked = _checked(images)
    bad = [check.problem for check in checked if check.problem]
    if bad:
        message = f"{len(bad)} of {len(images)} images in {part} can't be read: "
        more = f" And {len(bad) - NAMED} more." if len(bad) > NAMED else ""
        message += " ".join(bad[:NAMED]) + more
        missing = [check.path for check in checked if check.is_missing]
        if isinstance(part, TablePart) and missing:
            message += (
                f" Paths in {part.path.name} are relative to its folder, "
                f"{part.path.parent.absolute()}."
                f"{_written_otherwise(missing[0], part.path.parent)}"
            )
        if on_unreadable == "stop":
            raise ValueError(f"{message} Mend or remove them, or pass on_unreadable='skip'.")
        tell(f"{message} They are left out.")
    if frames := sum(check.has_frames for check in checked):
        tell(
            f"{_number(frames, 'file')} in {part} with several frames or pages: of each the first "
            f"is read.",
        )
    deep = [check.brightest for check in checked if check.brightest is not None]
    if deep and max(deep) < DARK:
        tell(
            f"{_number(len(deep), 'image')} of 16 bits in {part}, with no value above "
            f"{max(deep) * 257}. {ADVICE_IF_DARK}"
        )
    good = [check.image for check in checked if check.image]
    _check_filled(part, classes, {image.label for image in good})
    _tell_contradictions(part, good, classes)
    return classes, good


def _written_otherwise(path: Path, folder: Path) -> str:
    """A hint at the file that is meant: with slashes, its ending, its folder or the home folder."""
    slashed = Path(str(path).replace("\\", "/"))
    if slashed != path and slashed.is_file():
        return f" {slashed} is there: write slashes instead of backslashes."
    with contextlib.suppress(OSError):
        ended = [p for p in sorted(path.parent.glob(f"{glob.escape(path.name)}.*")) if p.is_file()]
        if ended:
            return f" {ended[0]} is there: write the files' endings."
        name = os.path.relpath(path, folder)
        if inside := next(folder.glob(f"*/{glob.escape(name)}"), None):
            return f" {inside} is there: write that folder before the names."
    if "~" in path.parts:
        return " Write the home folder's path instead of ~."
    return ""


def _check_filled(part: Path | TablePart, classes: Sequence[str], filled: set[int]) -> None:
    """See that every class has images; before any is read, and for those that could be."""
    empty = [name for label, name in enumerate(classes) if label not in filled]
    # A rare class may be missing from a part of a table that doesn't train.
    if empty and not (isinstance(part, TablePart) and part.split in ("validation", "test")):
        raise ValueError(
            f"No images for {shortened(empty, NAMED)} in "
            f"{part}. Expected {', '.join(sorted(SUFFIXES))} files of every class: add some, or "
            f"remove the {'class' if isinstance(part, TablePart) else 'subfolder'}."
        )


def _tell_alike(part: Path | TablePart, classes: Sequence[str]) -> None:
    """Warn of classes that are one by their names, but for capitals or how accents are coded."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    if several:
        first, second = map(ascii, several[0][:2])
        tell(
            f"{part} has classes whose names differ in capitals or in how letters are coded alone: "
            f"{first} and {second}{', say' if len(several) > 1 else ''}. They are taken for "
            f"different classes; rename one if they are the same.",
        )


def _tell_nested(folder: Path, classes: Sequence[str]) -> None:
    """Warn where all classes have the same folders and no images beside them: folds, say."""
    inside = {tuple(path.name for path in subfolders(folder / name)) for name in classes}
    if len(inside) > 1 or any(has_images(folder / name) for name in classes):
        return
    (same,) = inside
    if len(same) > 1:
        tell(
            f"{classes[0]} and {classes[1]} in {folder} are taken for classes, and have the same "
            f"folders: {', '.join(same[:NAMED])}. If these are the classes, pass one of the outer "
            f"folders, {folder / classes[0]}, say.",
        )


def _tell_contradictions(
    part: Path | TablePart, images: Sequence[Labelled], classes: Sequence[str]
) -> None:
    """Warn of files with the same content and different labels, of which one must be wrong."""
    first: dict[str, Labelled] = {}
    pairs = [
        (image, same)
        for image in images
        if (same := first.setdefault(image.digest, image)).label != image.label
    ]
    if pairs:
        image, same = pairs[0]
        tell(
            f"{_number(len(pairs), 'image')} in {part} of the same content as one of another "
            f"class: {image.path} ({classes[image.label]}) is {same.path} ({classes[same.label]}), "
            f"say. One of the two labels is wrong.",
        )


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[tuple[Path, int]], Counter[str]]:
    """The image files of each class with its index, and how many others there are of each kind."""
    images: list[tuple[Path, int]] = []
    left_out: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found, others = images_under(folder / name)
        images += [(path, label) for path in found]
        left_out += others
    if results := sum(p.is_dir() and _holds_results(p) for p in folder.iterdir()):
        left_out["folder of a run or of features"] = results
    if beside := sum(p.suffix.lower() in SUFFIXES and p.is_file() for p in folder.iterdir()):
        left_out["images beside the classes' folders"] = beside
    if lost := sum(p.is_symlink() and not p.exists() for p in folder.iterdir()):
        left_out["link to nothing beside the classes' folders"] = lost
    return images, left_out


def images_under(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The image files at any depth, sorted, and how many others there are of each kind.

    Raises:
        OSError: a folder that can't be looked into.
    """
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if name.lower() not in SYSTEM_FOLDERS]
        # They may lead round in a circle.
        left_out["linked folder"] += sum(Path(place, name).is_symlink() for name in folders)
        for name in names:
            path = Path(place, name)
            suffix = path.suffix.lower()
            if name.lower() in SYSTEM_FILES:
                continue
            if any(part.startswith(".") for part in path.relative_to(folder).parts):
                left_out["hidden"] += 1
            elif not path.is_file():
                left_out["no regular file, or a link to nothing"] += 1
            elif suffix in SUFFIXES:
                images.append(path)
            else:
                left_out[suffix[:20] or "without an ending"] += 1
    return sorted(images), +left_out


def _refuse(error: OSError) -> None:
    raise error


def tell_left_out(part: object, left_out: Counter[str]) -> None:
    """Warn of files that aren't read."""
    if left_out:
        tell(f"Left out of {part}: {_counted(left_out)}.")


def _counted(left_out: Counter[str]) -> str:
    """How many files of which kind, the most frequent first."""
    kinds = left_out.most_common(NAMED)
    more = left_out.total() - sum(count for _, count in kinds)
    parts = [f"{count} {kind}" for kind, count in kinds] + ([f"{more} others"] if more else [])
    return f"{_number(left_out.total(), 'file')} ({', '.join(parts)})"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def stamp_of(path: Path) -> tuple[int, int]:
    """A file's size and the time of its last change, which another content would change."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _checked(images: Sequence[tuple[Path, int]]) -> list[_Check]:
    """Decode every image once, few of the large ones at a time."""
    gate = PixelGate(PIXELS_AT_ONCE)

    def check(path: Path, label: int) -> _Check:
        try:
            info = read_image(path, gate).info
            stamp = stamp_of(path)
            image = Labelled(path, label, files.sha256(path), stamp)
            return _Check(
                path, image, has_frames=info[SEVERAL_FRAMES], brightest=info.get(BRIGHTEST)
            )
        except FileNotFoundError:
            return _Check(path, problem=f"{path}: there is no such file.", is_missing=True)
        except (OSError, ValueError) as error:
            reason = files.first_line(error).removeprefix("Can't read ").rstrip(".")
            return _Check(path, problem=f"{reason}.")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda image: check(*image), images))
