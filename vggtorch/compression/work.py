"""What the steps of a compression have in common: networks, images, what is seen, what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from vggtorch.compression.deletion import Pair, giving
from vggtorch.compression.factors import Factors, multiply_adds
from vggtorch.compression.networks import BATCH, Networks
from vggtorch.compression.photographs import Photographs
from vggtorch.compression.progress import Progress
from vggtorch.compression.resuming import Notebook
from vggtorch.compression.rows import NEW, Rows
from vggtorch.compression.sites import Site
from vggtorch.compression.statistics import Seen, change, look
from vggtorch.measuring import in_turns
from vggtorch.surgery import packed

PIXELS = 160 * 112 * 112  # of the crops that the closed forms see
FEWEST = 64  # of these crops, however large they are
CHECKED = 16  # crops of images that nothing is fitted to
ROWS = 4096  # positions of each layer, at most
MEMORY = 1 << 28  # bytes of the patches at these positions, of all layers
REPEATS = 5  # of what is timed


@dataclass
class Work:
    """A compression in work.

    Attributes:
        networks: the original, with layers composed that can be, and the network in work.
        whole: the same of the original as it came.
        images: those that layers are fitted to, and those held out.
        seed: decides the crops and positions.
        notes: what an interrupted run has left.
        progress: what is shown.
        by: what costs are, "multiply-adds" or "seconds".
        pairs: convolutions whose channels only the other one of the pair reads.
    """

    networks: Networks
    whole: Networks
    images: Photographs
    seed: int
    notes: Notebook
    progress: Progress
    by: str = "multiply-adds"
    pairs: Sequence[Pair] = ()

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        number = max(FEWEST, min(160, PIXELS // prod(self.images.size)))
        if len(self.images.size) < 2:  # no images, whose positions are many
            number = min(ROWS, len(self.images.shown))
        self.fitted = self.images.crops(number, generator).split(BATCH)
        self.checked = self.images.crops(CHECKED, generator, held_out=True).split(BATCH)

    @property
    def sites(self) -> list[Site]:
        """What may change: what can be replaced, and what gets narrower with the layers around."""
        return [*self.networks.sites, *(site for pair in self.pairs for site in pair.between)]

    # What is seen

    @cached_property
    def seen(self) -> dict[str, Seen]:
        """What the original's layers see of the images."""
        each = 4 * sum(site.patch for site in self.networks.sites)
        self.progress.begin("looking at what layers see", len(self.fitted))
        return look(
            self.networks.original,
            self.networks.sites,
            self.fitted,
            ends=self.networks.ends,
            rows=min(ROWS, MEMORY // max(each, 1)),
            seed=self.seed,
            tick=self.progress.advance,
        )

    @cached_property
    def base(self) -> list[list[Tensor]]:
        """The original's outputs for the held-out crops."""
        return [self.networks.maps(batch)[-self.networks.ends :] for batch in self.checked]

    def rows(self, site: Site, patches: Tensor | None = None) -> Rows:
        """What a layer is to give for the patches that the original's or another one sees."""
        found = self.seen[site.name]
        patches = torch.cat(found.patches) if patches is None else patches
        weight = getattr(self.networks.original, site.child).weight.detach().cpu()
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        return Rows(patches, torch.cat(found.outputs), found.metric, weight)

    def giving(self, site: Site, kept: Tensor) -> Factors:
        """The layer that gives only the channels `kept`."""
        layer = getattr(self.networks.original, site.child)
        bias = None if layer.bias is None else layer.bias.detach().cpu()
        return giving(layer.weight.detach().cpu(), bias, kept)

    def change(self, modules: Mapping[Site, nn.Module]) -> float:
        """How much the outputs for the held-out crops change with modules in layers' places."""
        with self.networks.trying(modules) as network:
            return change(network, self.checked, self.base)

    # What it costs

    def total(self, networks: Networks) -> float:
        """What the whole of these networks costs as it is."""
        if self.by == "seconds":
            return seconds_of(networks.original, networks.entering, self.networks.device)
        return float(networks.total)

    def cost(self, site: Site, networks: Networks) -> float:
        """What a layer of these networks costs as it is."""
        if self.by == "seconds":
            return self.seconds(site, getattr(networks.original, site.child))
        return float(site.multiply_adds)

    def cost_of(self, site: Site, method: str, ranks: Sequence[int]) -> float:
        """What layers of these ranks cost in a site's place."""
        if self.by == "seconds":
            return self.seconds(site, self.random(site, method, ranks))
        return float(multiply_adds(site, method, ranks))

    def seconds(self, site: Site, module: nn.Module) -> float:
        """What a module takes for what enters a site."""
        return seconds_of(module, site.entering, self.networks.device)

    def speed(self, network: nn.Module) -> float:
        """How many times as fast a network is as the whole one."""
        networks = self.networks
        return ratio_of(self.whole.original, network, networks.entering, networks.device)

    def random(self, site: Site, method: str, ranks: Sequence[int]) -> nn.Module:
        """Layers of these ranks in a site's place, with random weights."""
        if method != "channels":
            return Factors.random(site, method, ranks).module(site)
        kept = torch.arange(ranks[0], device="cpu")
        if any(site is pair.first for pair in self.pairs):
            return self.giving(site, kept).module(site)
        weight = torch.randn(site.outputs, len(kept), *site.kernel, **NEW)
        return Factors.of(method, [weight], torch.zeros(site.outputs, **NEW), kept).module(site)


@torch.no_grad()
def seconds_of(module: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """Median seconds of one image, after a warm-up; `shape` is what enters, without the batch."""
    x, module = packed(torch.randn(1, *shape, **NEW).to(device)), module.to(device)
    return statistics.median(in_turns({"": lambda: module(x)}, REPEATS, device)[""])


@torch.no_grad()
def ratio_of(slow: nn.Module, fast: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """How many times as fast one module is as another, measured in turns; the median."""
    x = packed(torch.randn(1, *shape, **NEW).to(device))
    times = in_turns({"slow": lambda: slow(x), "fast": lambda: fast(x)}, 2 * REPEATS, device)
    return statistics.median(a / b for a, b in zip(times["slow"], times["fast"], strict=True))
