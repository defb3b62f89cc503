"""The steps of a compression, each of which is written down once it is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vggtorch.compression.choice import Option, choose
from vggtorch.compression.clocks import ratio_of, seconds_of
from vggtorch.compression.deletion import Pair, giving, numbers_of, order_of, reading
from vggtorch.compression.factors import (
    LANES,
    METHODS,
    SHARES,
    Factors,
    Part,
    multiply_adds,
    ranks_for,
)
from vggtorch.compression.joint import State, descend_
from vggtorch.compression.networks import BATCH, Networks
from vggtorch.compression.photographs import Photographs
from vggtorch.compression.resuming import Notebook
from vggtorch.compression.rows import Rows
from vggtorch.compression.sites import Site
from vggtorch.compression.statistics import Seen, change, look, look_again

PIXELS = 160 * 112 * 112  # of the crops that the closed forms see
FEWEST = 64  # of these crops, however large they are
CHECKED = 16  # crops of images that nothing is fitted to
ROWS = 4096  # positions of each layer, at most
MEMORY = 1 << 28  # bytes of the patches at these positions, of all layers
CALIBRATED = 0.26  # of a layer's cost, at which its effect on the last map is measured
SPARE = 0.02  # of a budget, which may be left over
ROUNDS = 4  # of a choice for a time, each corrected by what the one before it took
Options = dict[str, list[Option]]


class Progress:
    """A bar for one step after the other."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._task = bars, None

    def begin(self, text: str, total: float) -> None:
        """A new bar, of so many parts; where there is nothing to draw it in, a line."""
        if not (self._bars.console.is_terminal or self._bars.console.is_jupyter):
            self._bars.console.print(text)
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total, note="")

    def advance(self, parts: float = 1, note: str = "") -> None:
        """So many more parts are done."""
        self._bars.update(self._task, advance=parts, note=note)

    def reach(self, parts: float, note: str = "") -> None:
        """So many parts are done in all."""
        self._bars.update(self._task, completed=parts, note=note)


@contextmanager
def open_progress() -> Iterator[Progress]:
    """Show progress on stderr."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        yield Progress(shown)


@dataclass
class Work:
    """What the steps of a compression have in common.

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

    def rows(self, site: Site, patches: Tensor) -> Rows:
        """What a layer is to give for patches that it sees at the places that were drawn."""
        found = self.seen[site.name]
        weight = getattr(self.networks.original, site.child).weight.detach().cpu()
        weight = weight if weight.ndim == 4 else weight[:, :, None, None]
        return Rows(patches, torch.cat(found.outputs), found.metric, weight)

    # What could be done

    def options(self, methods: Sequence[str]) -> Options:
        """What each layer could become, and what each option costs; the first is to stay."""
        if (known := self.notes["options"]) is not None:
            return _options(known)
        sites, seen = self.networks.sites, self.seen
        options: Options = {}
        self.progress.begin("trying layers", len(seen))
        for site in sites:
            tried: list[tuple[str | None, tuple[int, ...]]] = [(None, ())]
            tried += [
                (method, ranks)
                for method in methods
                for share in SHARES
                for ranks in ranks_for(site, method, share)
            ]
            costs = [self._cost(site, *one) for one in tried]
            errors = self._errors(site, tried)
            options[site.name] = [
                Option(method, ranks, cost, error)
                for (method, ranks), cost, error in zip(tried, costs, errors, strict=True)
            ]
            self.progress.advance()
        for pair in self.pairs:
            for site in pair.between:
                options[site.name] = [Option(None, (), self.cost(site, self.networks), 0.0)]
            options[pair.name] = self._deletions(pair)
        self.notes["options"] = _plain(options)
        return options

    def _deletions(self, pair: Pair) -> list[Option]:
        """What it costs and changes if channels between two layers go, by how many stay."""
        networks, first, second = self.networks, pair.first, pair.second
        rows = self.rows(second, torch.cat(self.seen[second.name].patches))
        order, numbers = order_of(rows), numbers_of(pair)
        costs, expected, correction = [], [], 1.0
        for number in numbers:
            kept = order[:number].sort().values
            gives, reads = self._giving(first, kept), reading(rows, kept)
            modules = {first.child: gives.module(first), second.child: reads.module(second)}
            share = number / first.outputs
            cost = share * sum(self.cost(site, networks) for site in pair.between)
            if self.by == "seconds":
                cost += sum(self._seconds(site, modules[site.child]) for site in (first, second))
            else:
                cost += share * (first.multiply_adds + second.multiply_adds)
            costs.append(cost)
            expected.append(rows.error(reads(rows.patches)))
            if number == numbers[len(numbers) // 2]:
                networks.install_(modules)
                now = change(networks.work, self.checked, self.base)
                correction = now / max(expected[-1], 1e-30)
                networks.remove_(first)
                networks.remove_(second)
        return [
            Option("channels", (number,), cost, correction * error)
            for number, cost, error in zip(numbers, costs, expected, strict=True)
        ]

    def _giving(self, site: Site, kept: Tensor) -> Factors:
        layer = getattr(self.networks.original, site.child)
        bias = None if layer.bias is None else layer.bias.detach().cpu()
        return giving(layer.weight.detach().cpu(), bias, kept)

    def cost(self, site: Site, networks: Networks) -> float:
        """What a layer of these networks costs as it is."""
        if self.by == "seconds":
            return self._seconds(site, getattr(networks.original, site.child))
        return float(site.multiply_adds)

    def _cost(self, site: Site, method: str | None, ranks: Sequence[int]) -> float:
        if method is None:
            return self.cost(site, self.networks)
        if self.by == "seconds":
            return self._seconds(site, self._module(site, method, ranks))
        return float(multiply_adds(site, method, ranks))

    def _seconds(self, site: Site, module: nn.Module) -> float:
        return seconds_of(module, site.entering, self.networks.device)

    def _module(self, site: Site, method: str, ranks: Sequence[int]) -> nn.Module:
        """Layers of these ranks in a site's place, with random weights."""
        if method == "channels":
            kept = torch.arange(ranks[0])
            if any(site is pair.first for pair in self.pairs):
                return self._giving(site, kept).module(site)
            weight = torch.randn(site.outputs, len(kept), *site.kernel)
            parts = (Part("", weight, (0, 1)),)
            return Factors(method, parts, weight[:, 0, 0, 0], reads=kept).module(site)
        return Factors.random(site, method, ranks).module(site)

    def _errors(self, site: Site, tried: Sequence[tuple[str | None, Sequence[int]]]) -> list[float]:
        """How much each option changes the network's outputs, squared and relative.

        What the metric expects of errors that don't meet is corrected by one measurement for each
        method and number of layers.
        """
        networks = self.networks
        rows = self.rows(site, torch.cat(self.seen[site.name].patches))
        made = [METHODS[m](rows, *ranks) if m else None for m, ranks in tried]
        expected = [0.0 if f is None else rows.error(f(rows.patches)) for f in made]
        share = [
            multiply_adds(site, m, ranks) / site.multiply_adds if m else 1.0 for m, ranks in tried
        ]
        kinds = [(m, len(ranks)) for m, ranks in tried]
        correction = {}
        for kind in dict.fromkeys(kinds):
            if kind[0] is None:
                continue
            one = min(
                (i for i, k in enumerate(kinds) if k == kind),
                key=lambda i: abs(share[i] - CALIBRATED),
            )
            factors = made[one]
            assert factors is not None
            networks.install_({site.child: factors.module(site)})
            now = change(networks.work, self.checked, self.base)
            correction[kind] = now / max(expected[one], 1e-30)
            networks.remove_(site)
        return [e * correction.get(k, 1.0) for e, k in zip(expected, kinds, strict=True)]

    # What is done

    def choice(self, options: Options, times: float) -> tuple[dict[str, Option], float]:
        """What each layer becomes, and what the whole costs, of which 1/times is to be left.

        It is written down, because what was measured won't be the same again.

        Raises:
            ValueError: no choice is so cheap; says how cheap one can be.
        """
        if (known := self.notes["choice"]) is not None:
            chosen, total = known
            return {name: option for name, (option,) in _options(chosen).items()}, total
        chosen, total = self._choice(options, times)
        if self.by == "multiply-adds":
            self._fill_(chosen, total / times)
        self.notes["choice"] = [_plain({name: [one] for name, one in chosen.items()}), total]
        return chosen, total

    def _choice(self, options: Options, times: float) -> tuple[dict[str, Option], float]:
        if self.by == "multiply-adds":
            total, now = float(self.whole.total), float(self.networks.total)
        else:
            total, now = (
                seconds_of(networks.original, networks.entering, self.networks.device)
                for networks in (self.whole, self.networks)
            )
        fixed = max(0.0, now - sum(options[site.name][0].cost for site in self.sites))
        grouped = self._grouped(options)
        least = fixed + sum(min(o.cost for o in choices) for choices in grouped.values())
        if total < times * least:
            raise ValueError(
                f"Received times={times:g}; this network can cost {total / least:.2f} times less "
                f"at most, in {self.by}, with these methods: {fixed / total:.0%} of what it costs "
                f"is in layers that stay as they are."
            )
        chosen = self._single(options, choose(grouped, total / times - fixed))
        if self.by == "seconds":
            wanted = times
            for _ in range(ROUNDS):
                ratio = self._measured(chosen)
                if ratio >= times:
                    break
                wanted *= 1.02 * times / ratio
                budget = total / wanted - fixed
                if budget < least - fixed:
                    raise ValueError(
                        f"Received times={times:g}; measured on this machine, this network gets "
                        f"{ratio:.2f} times as fast with the cheapest layers that were tried."
                    )
                chosen = self._single(options, choose(grouped, budget))
        return chosen, total

    def _fill_(self, chosen: dict[str, Option], budget: float) -> None:
        """Give layers the ranks that the budget still has room for, those of most error first.

        Where few layers have few channels, the next of the ranks that were tried may be far away.
        """
        room = budget - self.left(chosen)
        order = sorted(self.networks.sites, key=lambda site: -chosen[site.name].error)
        for lanes, site in product((LANES, 1), order):
            method, ranks, cost, error = vars(chosen[site.name]).values()
            if room < SPARE * budget or method not in METHODS:
                continue
            most = (cost + room) / site.multiply_adds
            for more in ranks_for(site, method, most, lanes):
                if len(more) == len(ranks) and (now := multiply_adds(site, method, more)) > cost:
                    chosen[site.name] = Option(method, more, float(now), error)
                    room -= now - cost

    def _grouped(self, options: Options) -> Options:
        """Options of pairs, each of which is either one for each of both or a deletion."""
        grouped = dict(options)
        for pair in self.pairs:
            a, *others, b = (grouped.pop(site.name) for site in pair.sites)
            between = sum(stay.cost for (stay,) in others)
            grouped[pair.name] = options[pair.name] + [
                Option("both", (i, j), x.cost + y.cost + between, x.error + y.error)
                for i, x in enumerate(a)
                for j, y in enumerate(b)
            ]
        return grouped

    def _single(self, options: Options, chosen: Mapping[str, Option]) -> dict[str, Option]:
        """What was chosen for pairs as options of each layer."""
        found = dict(chosen)
        for pair in self.pairs:
            both = found.pop(pair.name)
            if both.method == "both":
                places = (both.ranks[0], *(0 for _ in pair.between), both.ranks[1])
                for site, i in zip(pair.sites, places, strict=True):
                    found[site.name] = options[site.name][i]
                continue
            costs = [options[site.name][0].cost for site in pair.sites]
            for site, cost in zip(pair.sites, costs, strict=True):
                share = both.cost * cost / sum(costs)
                found[site.name] = Option("channels", both.ranks, share, both.error / len(costs))
        return {site.name: found[site.name] for site in self.sites}

    def left(self, chosen: Mapping[str, Option]) -> float:
        """Multiply-adds of the whole network with these layers."""
        fixed = self.networks.total - sum(site.multiply_adds for site in self.sites)
        return fixed + sum(option.cost for option in chosen.values())

    def _measured(self, chosen: Mapping[str, Option]) -> float:
        """How many times as fast the network is with these layers."""
        sites = {site.name: site for site in self.networks.sites}
        new = {name: option for name, option in chosen.items() if option.method and name in sites}
        modules = {
            sites[name].child: self._module(sites[name], str(option.method), option.ranks)
            for name, option in new.items()
        }
        self.networks.install_(modules)
        ratio = self.speed(self.networks.work)
        for name in new:
            self.networks.remove_(sites[name])
        return ratio

    def speed(self, network: nn.Module) -> float:
        """How many times as fast a network is as the whole one."""
        networks = self.networks
        return ratio_of(self.whole.original, network, networks.entering, networks.device)

    def closed_forms_(self, chosen: Mapping[str, Option]) -> dict[str, Factors]:
        """Fit layers one after the other, each on what those before it give, and install them."""
        sites = [site for site in self.networks.sites if chosen[site.name].method]
        made = _factors(self.notes["factors"] or {})
        self.progress.begin("fitting layers", len(sites))
        for site in sites:
            if site.name not in made:
                made[site.name] = self._fitted(site, chosen[site.name])
                self.notes["factors"] = {
                    name: [
                        f.method,
                        [[p.suffix, p.weight, list(p.axes)] for p in f.parts],
                        *(f.bias, f.reads, f.gives),
                    ]
                    for name, f in made.items()
                }
            self.networks.install_({site.child: made[site.name].module(site)})
            self.progress.advance()
        vars(self).pop("seen", None)  # the training needs the memory
        return made

    def _fitted(self, site: Site, option: Option) -> Factors:
        """Layers for a site, fitted to what it sees behind those that are installed."""
        assert option.method is not None
        reader = next((pair.second for pair in self.pairs if pair.first is site), None)
        if option.method == "channels" and reader is not None:
            rows = self.rows(reader, torch.cat(self.seen[reader.name].patches))
            return self._giving(site, order_of(rows)[: option.ranks[0]].sort().values)
        patches = look_again(self.networks.work, site, self.fitted, self.seen[site.name].places)
        rows = self.rows(site, patches)
        if option.method != "channels":
            return METHODS[option.method](rows, *option.ranks)
        giver = next(pair.first for pair in self.pairs if pair.second is site)
        kept = getattr(self.networks.work, giver.child)[-1].kept
        return reading(rows, kept.cpu())

    def train_(self, sites: Sequence[Site], steps: int, seconds: float) -> State:
        """Train the new layers at all sites, installed before; `seconds` are for the whole run."""
        if not sites:  # composing layers was enough
            return State()
        self.progress.begin("training", 1.0)
        modules = [getattr(self.networks.work, site.child) for site in sites]
        known = None if (noted := self.notes["state"]) is None else State(**noted)
        before = self.notes.seconds - (0.0 if known is None else known.seconds)

        def save(state: State) -> None:
            self.notes["state"] = dict(vars(state))

        return descend_(
            self.networks.work,
            [p for module in modules for p in module.parameters()],
            self.networks.maps,
            self.images.crops,
            self.checked,
            steps=steps,
            seconds=seconds - before,
            seed=self.seed + 2,
            state=known,
            save=save,
            show=lambda done, error: self.progress.reach(done, f"held-out error {error:.4f}"),
        )


def _plain(options: Options) -> dict[str, list[list[Any]]]:
    """Options as they are written down."""
    return {
        name: [[o.method, list(o.ranks), o.cost, o.error] for o in choices]
        for name, choices in options.items()
    }


def _options(known: Mapping[str, Any]) -> Options:
    return {
        name: [Option(method, tuple(ranks), cost, error) for method, ranks, cost, error in choices]
        for name, choices in known.items()
    }


def _factors(known: Mapping[str, Any]) -> dict[str, Factors]:
    return {
        name: Factors(method, tuple(Part(end, w, tuple(axes)) for end, w, axes in parts), *others)
        for name, (method, parts, *others) in known.items()
    }
