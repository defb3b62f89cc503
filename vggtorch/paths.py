"""What a name stands for, and what to say where there is nothing of the name.

Nothing heavy is imported here, so that a command refuses a misspelt path at once.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vggtorch.architectures import ARCHITECTURES
from vggtorch.weight_sets import WEIGHT_SETS

TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson"})  # of paths and labels
OTHER_TABLES = frozenset({".json", ".parquet", ".feather", ".arrow", ".xlsx", ".xls", ".txt"})
PACKED = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})
HUB = "hf://"  # as Keras writes it
_HUB_ELSEWHERE = re.compile(  # how others write it
    r"(?:hf[-_]hub:|hub:|huggingface:|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)(.+)"
)
# What weights are called elsewhere: by torchvision, timm and Keras.
_WEIGHTS_ELSEWHERE = {
    "IMAGENET1K_V1": "imagenet", "IMAGENET1K_FEATURES": "features", "DEFAULT": "imagenet",
    "tv_in1k": "imagenet", "caffe": "oxford", "keras": "oxford", "True": "imagenet",
}  # fmt: skip
# Forms of file by their endings: checkpoints and models, exported models, predictions.
CONVERTED = (".safetensors", ".pth", ".bin", ".weights.h5", ".keras", ".h5")
EXPORTED = (".onnx", ".pt2")
PREDICTIONS = (".csv", ".jsonl")
# The formats of images that are read, by PIL's names, and the endings of their files. PIL knows
# more, but for some it starts another program (EPS), and some have no mark by which a damaged file
# is known.
IMAGES = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heif"),  # where pillow-heif is installed
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = frozenset(suffix for suffixes in IMAGES.values() for suffix in suffixes)
_NAMED = 5  # files that a message lists


def as_path(value: object, option: str = "") -> Path:
    """What a user gives as a path.

    Args:
        value: the name of a file or a folder.
        option: how the argument is called; empty for one that has no name.

    Raises:
        ValueError: no path, or an empty one, which would be the folder that one is in.
    """
    if not isinstance(value, str | Path | os.PathLike) or isinstance(os.fspath(value), bytes):
        received = f"{option}={value!r}" if option else f"a {type(value).__name__}"
        raise ValueError(f"Received {received}; expected a path.")
    if not os.fspath(value):
        received = f"{option}=''" if option else "an empty name"
        raise ValueError(f"Received {received}; expected a path. This folder's is '.'.")
    return Path(value)


def is_on_hub(source: object) -> bool:
    """Whether a source is an address on the hub.

    Raises:
        ValueError: it is one in the spelling of another tool.
    """
    text = str(source)
    if text.startswith(HUB):
        return True
    if found := _HUB_ELSEWHERE.fullmatch(text):
        raise ValueError(f"Received {text!r}; expected hf://{found[1]}, as Keras writes it.")
    return False


def missing_model(source: str | os.PathLike) -> str:
    """What is said of a model that isn't there."""
    on_hub = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        on_hub = f" On the Hugging Face hub it would be hf://{source}."
    return (
        f"There is no {source}.{near(source)} Expected the folder of a run that has ended, a "
        f".keras file, or hf://owner/name.{on_hub}"
    )


def missing_network(source: str | os.PathLike) -> str:
    """The same, where a network's name would have done."""
    return f"{missing_model(source)} Or one of {', '.join(ARCHITECTURES)}."


def check_model(name: str) -> None:
    """See that a name can be that of a model: a network's, an address on the hub, a path.

    Raises:
        ValueError: there is nothing of this name.
    """
    as_path(name)
    if not (name in ARCHITECTURES or is_on_hub(name) or Path(name).exists()):
        raise ValueError(missing_network(name))


def check_weights(source: str | os.PathLike, option: str = "weights") -> None:
    """See that weights can be had by a name: a weight set's, an address on the hub, a path.

    Args:
        source: the name.
        option: how the argument is called; empty for one that has no name.

    Raises:
        ValueError: there is nothing of this name.
    """
    as_path(source, option)
    if source in WEIGHT_SETS or is_on_hub(source) or Path(source).exists():
        return
    last = str(source).rpartition(".")[2]  # of VGG16_Weights.IMAGENET1K_V1, vgg16.tv_in1k
    is_called = last in _WEIGHTS_ELSEWHERE and not str(source).endswith(CONVERTED)
    hint = f" {last} is called {_WEIGHTS_ELSEWHERE[last]} here." if is_called else ""
    if source in ARCHITECTURES:
        hint = f" {source} is a network (architecture={str(source)!r}) that has such weights."
    if re.match("[a-z]+://", str(source)):
        hint = " An address isn't fetched: download the file first."
    alike = difflib.get_close_matches(str(source), WEIGHT_SETS, 1)
    raise ValueError(
        f"Received {_named(source, option)}; expected one of {', '.join(WEIGHT_SETS)} or the path "
        f"of an existing file.{hint or (f' Perhaps {alike[0]}?' if alike else near(source))}"
    )


def check_data(path: str | os.PathLike) -> None:
    """See that there is a folder or a table of labelled images.

    Raises:
        ValueError: there is nothing of this name, or a file that is no table.
    """
    path = as_path(path)
    tables = ", ".join(sorted(TABLES))
    if path.is_dir() or (path.is_file() and path.suffix.lower() in TABLES):
        return
    if path.exists():
        what = f"{path} isn't a folder."
        if path.suffix.lower() in PACKED:
            what += " It's an archive: unpack it."
        if path.suffix.lower() in OTHER_TABLES:
            what += " It may be a table of another form: write it as CSV (pandas' `to_csv` does)."
    else:
        what = f"There is no {path}.{near(path)}"
    raise ValueError(
        f"{what} Expected a folder with a subfolder for each class, or a table of paths and labels "
        f"that ends in {tables}."
    )


def check_images(given: Iterable[str | os.PathLike]) -> None:
    """See that there are files, folders, or files that match patterns.

    Raises:
        ValueError: there is nothing of a name, or a pattern that nothing matches.
    """
    missing = []
    for one in given:
        if not isinstance(one, str | os.PathLike):
            raise ValueError(
                f"Received a {type(one).__name__}; expected the path of an image. (Arrays and PIL "
                f"images go through vt.preprocess into model.predict.)"
            )
        as_path(one)
        one = os.fspath(one)
        if re.match(r"[a-z]+://", one):
            raise ValueError(f"{one} is an address, not a file. Download it first.")
        if os.path.exists(one):
            continue
        if not glob.has_magic(one):
            missing.append(one)
        elif next(glob.iglob(one, recursive=True), None) is None:
            raise ValueError(f"No file matches {one}.")
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ValueError(f"There is no file {', '.join(missing[:_NAMED])}{more}.{near(missing[0])}")


def check_out(name: str | os.PathLike, endings: Sequence[str], option: str = "out") -> None:
    """See that a file can be written, before the work whose result it is to hold.

    Args:
        name: of the file.
        endings: of which it has to have one.
        option: how the argument is called; empty for one that has no name.

    Raises:
        ValueError: another ending, no such folder, or a folder of this name.
        OSError: the folder can't be written to.
    """
    as_path(name, option)
    received = _named(name, option)
    if endings and not str(name).endswith(tuple(endings)):
        listed = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
        raise ValueError(f"Received {received}; expected a name that ends in {listed}.")
    path = Path(os.path.realpath(name))  # of a link, where it leads
    if path.is_dir():
        raise ValueError(f"Received {received}, which is a folder; expected a file's name.")
    if not path.parent.exists():
        raise ValueError(
            f"Received {received}, and there is no folder {path.parent}.{near(path.parent)} Make "
            f"it, or choose another."
        )
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise OSError(f"Received {received}, and nothing can be written into {path.parent}.")


def check_run(folder: str, resume: bool) -> None:
    """See that a run may begin in a folder, or be carried on there.

    Raises:
        ValueError: the folder holds another run, or is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"Received output_dir={folder!r}, which is a file; expected a folder.")
    if (path / "last.pt").exists() and not resume:
        raise ValueError(
            f"{path / 'last.pt'} exists: the folder holds another run. Pass resume=True to carry "
            f"that on, or choose another folder with output_dir='run2', say."
        )


def _named(value: str | os.PathLike, option: str) -> str:
    """An argument with its value, as messages have it."""
    return f"{option}={os.fspath(value)!r}" if option else repr(os.fspath(value))


def near(path: str | os.PathLike) -> str:
    """` Perhaps ...?` with a path that is there and spelt much as one that isn't; or nothing."""
    path = Path(path)
    if path.parts[:1] == ("~",):  # which Python takes for a folder's name
        home = path.expanduser()
        return f" Perhaps {home}?" if home.exists() else ""
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    try:
        names = [entry.name for entry in os.scandir(missing.parent) if entry.name[0] != "."]
    except OSError:
        return ""
    for name in difflib.get_close_matches(missing.name, names):
        found = missing.parent / name / path.relative_to(missing)
        if found.exists():
            return f" Perhaps {found}?"
    return ""
