"""What layers see of images, and how much an error at each of them is at the end of the network.

Bounded in memory: a fixed number of positions of each layer is drawn from all images, and the
metrics are sums. Networks run on their own device; what is seen is kept by the processor, whose
linear algebra the closed forms are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.compression.rows import NEW
from vggtorch.compression.sites import Site


class _ReachedError(Exception):
    """Ends a forward pass once it has come as far as is needed."""


@contextmanager
def _removed_after(hooks: Iterable[Any]) -> Iterator[None]:
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Seen:
    """What was seen at one site.

    Attributes:
        places: positions of the output that were drawn, batch by batch.
        patches: (N, I, H, W), what met the kernel there.
        outputs: (N, O), what came of it.
        metric: (O, O); an error e at each position is e^T metric e at the end of the network,
            squared and relative to the size of the last maps, by image.
    """

    places: list[Any] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    metric: Any = 0.0


def _draw(site: Site, y: Tensor, count: int, generator: torch.Generator) -> Any:
    """Random positions of a map (N, O, H, W), or rows of a Dense layer's output; all if few."""
    size = y.shape[:-1] if site.is_dense else (len(y), *y.shape[2:])
    total = prod(size)
    drawn = torch.randint(total, (count,), generator=generator, device="cpu")
    flat = drawn if count < total else torch.arange(total, device="cpu")
    return flat if site.is_dense else torch.unravel_index(flat, size)


def _patches(site: Site, x: Tensor, places: Any) -> Tensor:
    if site.is_dense:
        return x.flatten(0, -2)[places][:, :, None, None]
    (top, left), (height, width) = site.padding, site.kernel
    padded = F.pad(x, (left, left, top, top))
    windows = padded.unfold(2, height, site.stride[0]).unfold(3, width, site.stride[1])
    image, row, column = places
    return windows[image, :, row, column].clone()


def _outputs(site: Site, y: Tensor, places: Any) -> Tensor:
    if site.is_dense:
        return y.flatten(0, -2)[places].clone()
    image, row, column = places
    return y[image, :, row, column].clone()


def look(
    network: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    *,
    ends: int,
    rows: int,
    seed: int,
    tick: Callable[[], None],
) -> dict[str, Seen]:
    """Rows and metrics of all sites of a network, from one pass forward and back over all images.

    The metric is the sum of g g^T over positions, where g is the gradient of a random combination
    of the last maps: the expectation of what the error at each position does to these, as if errors
    at different positions never met. They do: `change` measures what both do together.

    Args:
        network: returns its maps as a list.
        sites: where to look.
        batches: of images (N, C, H, W).
        ends: how many of the last maps are the network's outputs.
        rows: how many positions of each site.
        seed: decides the positions.
        tick: called after each batch.
    """
    seen = {site.name: Seen() for site in sites}
    places, noise = (torch.Generator().manual_seed(seed + i) for i in (0, 1))
    each, images = -(-rows // len(batches)), sum(map(len, batches))

    def watch(site: Site) -> Callable[..., None]:
        found = seen[site.name]

        def note(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            drawn = _draw(site, y, each, places)
            found.places.append(drawn)
            found.patches.append(_patches(site, args[0].detach(), drawn).cpu())
            found.outputs.append(_outputs(site, y.detach(), drawn).cpu())

            def back(gradient: Tensor) -> None:
                g = (gradient if site.is_dense else gradient.movedim(1, -1)).flatten(0, -2)
                found.metric = found.metric + (g.T @ g / images).cpu()

            y.register_hook(back)

        return note

    children = [network.get_submodule(site.child) for site in sites]
    pairs = zip(children, sites, strict=True)
    with _removed_after([child.register_forward_hook(watch(site)) for child, site in pairs]):
        for batch in batches:
            x = batch.detach().requires_grad_(True)
            total = x.new_zeros(())
            for y in network(x)[-ends:]:
                flat = y.flatten(1)
                drawn = torch.randn(flat.shape, generator=noise, **NEW).to(x.device)
                total = total + (flat * to_unit_size(y.detach()) * drawn).sum()
            total.backward()
            tick()
    return seen


@torch.no_grad()
def look_again(
    network: nn.Module, site: Site, batches: Sequence[Tensor], places: Sequence[Any]
) -> Tensor:
    """The patches (N, I, H, W) that a site sees now, at places that were drawn before."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor]) -> None:
        found.append(_patches(site, args[0], places[len(found)]).cpu())
        raise _ReachedError

    child = network.get_submodule(site.child)
    with _removed_after([child.register_forward_pre_hook(note)]):
        for batch in batches:
            with suppress(_ReachedError):
                network(batch)
    return torch.cat(found)


@torch.no_grad()
def change(network: nn.Module, batches: Sequence[Tensor], base: Sequence[list[Tensor]]) -> float:
    """How much the last maps differ from those they were, squared and relative, mean of images."""
    errors = []
    for batch, before in zip(batches, base, strict=True):
        for y, t in zip(network(batch)[-len(before) :], before, strict=True):
            # Scaled before they are squared: squares of small numbers would be zero.
            errors.append(((y - t).flatten(1) * to_unit_size(t)).norm(dim=1).square())
    return float(torch.cat(errors).mean())


def to_unit_size(maps: Tensor) -> Tensor:
    """The factor, (N, 1), by which the map of each image has length 1; 0 where all are zero.

    A map that is less than a tenth as long as the mean of all, such as one of zeros, gets the
    factor of such a tenth: what is seen of its image isn't worth more than that of all the others.
    """
    size = maps.flatten(1).norm(dim=1, keepdim=True)
    least = size.mean() / 10
    return torch.where(least > 1e-30, size.clamp_min(least).reciprocal(), 0.0)
