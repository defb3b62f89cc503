"""What new layers are trained on: maps that enter them, and those that are to come of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import keras
import numpy as np
import torch
from torch import Tensor, nn

from vggtorch.surgery.arguments import unfit_images
from vggtorch.surgery.coordinates import part

CROP = 96  # height and width of the crops that the new layers are trained on
BATCH = 16


@dataclass(frozen=True)
class Examples:
    """Maps that enter the new layers, and the original's maps that should come of them."""

    x: Tensor
    targets: list[Tensor]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """A batch drawn at random."""
        which = torch.randint(len(self.x), (BATCH,), generator=generator, device="cpu")
        which = which.to(self.x.device)
        return self.x[which], [t[which] for t in self.targets]


def in_batches(graph: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a graph without gradients, a batch at a time; one tensor for each of its outputs."""
    with torch.no_grad():
        made = [wide(graph(batch)) for batch in x.split(BATCH)]
        return [torch.cat(parts) for parts in zip(*made, strict=True)]


def wide(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps in float32 at least, because sums over those of a bfloat16 have three digits."""
    return [y.to(torch.promote_types(y.dtype, torch.float32)) for y in maps]


def crops(images: Tensor, which: Tensor, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Parts (number, C, *size) at random places of the images whose numbers are in `which`."""
    starts = [
        torch.randint(whole - part + 1, (len(which),), generator=generator, device="cpu").tolist()
        for whole, part in zip(images.shape[2:], size, strict=True)
    ]
    drawn = [
        images[(i, slice(None), *(slice(a, a + n) for a, n in zip(at, size, strict=True)))]
        for i, *at in zip(which.tolist(), *starts, strict=True)
    ]
    return packed(torch.stack(drawn))


def packed(x: Tensor) -> Tensor:
    """A batch in memory as convolutions like it best."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def held_out_of(
    images: np.ndarray, layout: str, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A tenth of the images, drawn at random, and the others; (N, C, H, W)."""
    pixels = torch.from_numpy(images).to(device)
    if pixels.ndim > 2 and layout == "channels_last":
        pixels = pixels.movedim(-1, 1)  # NHWC -> NCHW view
    order = torch.randperm(len(pixels), generator=generator, device="cpu")
    pixels = pixels[order.to(device)]
    return pixels[: len(pixels) // 10], pixels[len(pixels) // 10 :]


def sized_examples(
    original: keras.Model,
    begin: keras.KerasTensor,
    ends: Sequence[keras.KerasTensor],
    images: Tensor,
    generator: torch.Generator,
) -> tuple[Examples, Callable[[Tensor, int], Examples]]:
    """One example, and a function that makes so many of crops of images.

    The crops are whole images where the network can't take others, such as one with a Dense layer
    behind Flatten.
    """
    reference = part(begin, ends)
    enter = None if begin is original.inputs[0] else part(original.inputs[0], [begin])

    def examples(size: Sequence[int], images: Tensor, number: int) -> Examples:
        which = torch.randint(len(images), (number,), generator=generator, device="cpu")
        x = crops(images, which, size, generator)
        x = x if enter is None else in_batches(enter, x)[0]
        return Examples(x, in_batches(reference, x))

    whole = images.shape[2:]
    smaller = [min(CROP, n) for n in whole] if len(whole) == 2 else whole
    for size in (smaller, whole):
        try:
            return examples(size, images, 1), partial(examples, size)
        except (RuntimeError, ValueError) as error:
            failure = error
    raise unfit_images(original, images, failure) from failure


def check_maps(names: Sequence[str], targets: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Raise where the result's maps have other shapes than the original's."""
    for name, y, t in zip(names, outputs, targets, strict=True):
        if y.shape != t.shape:
            raise ValueError(
                f"The result gives maps of shape {tuple(y.shape[1:])} at {name!r}, where the "
                f"original gives {tuple(t.shape[1:])}: expected new layers that put out what "
                f"the replaced ones did."
            )


def check_targets(names: Sequence[str], targets: Sequence[Tensor]) -> None:
    """Raise where there is nothing to learn from the original's maps."""
    for name, t in zip(names, targets, strict=True):
        if not t.isfinite().all():
            raise ValueError(
                f"The original gives NaN or infinite values at {name!r} for these images: look at "
                f"its weights, and at whether the images are preprocessed as it expects."
            )
    if not any(t.any() for t in targets):
        raise ValueError(
            f"The original gives nothing but zeros at {', '.join(map(repr, names))} for these "
            f"images: nothing can be learned from that. Name other layers, match=..., or look at "
            f"its weights and at whether the images are preprocessed as it expects."
        )


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of maps, (N), 1 where both are 0; torch's own takes small ones for 0."""
    pair = [x.flatten(1) for x in (a, b)]
    sizes = [x.norm(dim=1, keepdim=True) for x in pair]
    units = [x / size.clamp_min(1e-30) for x, size in zip(pair, sizes, strict=True)]
    return torch.where(torch.cat(sizes, 1).amax(1) == 0, 1.0, (units[0] * units[1]).sum(1))
