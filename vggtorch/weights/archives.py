"""Zip archives as PyTorch and Keras write them: plain, whole, no larger inside than outside."""

from __future__ import annotations

import zipfile
from pathlib import Path

from vggtorch.weights.state_dicts import UnsupportedError

LARGEST_TEXT = 1 << 24  # bytes of a configuration; that of VGG19 has 20,000


def check_members(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """The names of an archive's members.

    Raises:
        UnsupportedError: others write such archives, which are whole and hold no plain weights.
        ValueError: two parsers could understand the archive differently, or it unpacks to more than
            it is.
    """
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise ValueError("a member of the archive is there twice")
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        raise UnsupportedError(
            "it is a TorchScript program. Load its weights: "
            "vt.load_weights(model, torch.jit.load(path).state_dict())"
        )
    if "archive_format" in last:
        raise UnsupportedError(
            "it is a program of torch.export. Load its weights: "
            "vt.load_weights(model, torch.export.load(path).state_dict)"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UnsupportedError(
            "it holds NumPy's arrays. Load them under the names of the model's weights: "
            "vt.load_weights(model, {'block1_conv1/kernel': numpy.load(path)[name], ...})"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UnsupportedError(
            "its members are compressed, which neither PyTorch nor Keras does. Unpack it, and load "
            "what was in it"
        )
    with path.open("rb") as file:
        file.seek(-22, 2)
        if file.read(4) != b"PK\x05\x06":
            raise ValueError("more stands behind the end of the archive")
    return names


def check_archive(path: Path) -> list[str]:
    """The names of the members of an archive, all of which match their checksums.

    Raises:
        ValueError: it is damaged, not written plainly, or its configuration is beyond reason.
        zipfile.BadZipFile: it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        names = check_members(path, archive)
        for member in archive.infolist():
            if member.filename.endswith(".json") and member.file_size > LARGEST_TEXT:
                raise ValueError(f"{member.filename} has {member.file_size} bytes")
        if broken := archive.testzip():
            raise ValueError(f"{broken} does not match its checksum")
    return names
