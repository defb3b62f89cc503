"""Which layers are replaced, by what, with which ranks: the least error for a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any, TypeVar

from torch import nn

from vggtorch.compression.deletion import Pair
from vggtorch.compression.factors import LANES, METHODS, multiply_adds, ranks_for
from vggtorch.compression.sites import Site
from vggtorch.compression.work import Work

SPARE = 0.02  # of a budget, which may be left over
ROUNDS = 4  # of a choice for a time, each corrected by what the one before it took


@dataclass(frozen=True)
class Option:
    """One way to have a layer.

    Attributes:
        method: None for the layer as it is.
        ranks: channels between the layers in its place.
        cost: multiply-adds or seconds.
        error: expected change of the last map, squared and relative to its size.
    """

    method: str | None
    ranks: tuple[int, ...]
    cost: float
    error: float


Options = dict[str, list[Option]]


@dataclass(frozen=True)
class Bundle:
    """Options of layers that are chosen together, by the layers' names; their cost and error."""

    layers: Mapping[str, Option]
    cost: float
    error: float


Choice = TypeVar("Choice", Option, Bundle)


def choice_of(work: Work, options: Options, times: float) -> tuple[dict[str, Option], float]:
    """What each layer becomes, and what the whole costs, of which 1/times is to be left.

    It is written down, because what was measured won't be the same again.
    """
    if (known := work.notes["choice"]) is not None:
        return {name: option for name, (option,) in from_plain(known[0]).items()}, known[1]
    total, now = (work.total(networks) for networks in (work.whole, work.networks))
    fixed = max(0.0, now - sum(options[site.name][0].cost for site in work.sites))
    bundles = _bundles(work.pairs, options)
    least = fixed + sum(min(b.cost for b in choices) for choices in bundles.values())
    if total < times * least:
        raise ValueError(
            f"Received times={times:g}; this network can cost {total / least:.2f} times less "
            f"at most, in {work.by}, with these methods: {fixed / total:.0%} of what it costs "
            f"is in layers that stay as they are."
        )

    def chosen_for(budget: float) -> dict[str, Option]:
        bundled = choose(bundles, budget - fixed).values()
        chosen = {name: option for bundle in bundled for name, option in bundle.layers.items()}
        return {site.name: chosen[site.name] for site in work.sites}

    chosen = chosen_for(total / times)
    if work.by == "multiply-adds":
        _fill_(work, chosen, total / times)
    else:
        wanted = times
        for _ in range(ROUNDS):
            ratio = _speed(work, chosen)
            if ratio >= times:
                break
            wanted *= 1.02 * times / ratio
            if total / wanted < least:
                raise ValueError(
                    f"Received times={times:g}; measured on this machine, this network gets "
                    f"{ratio:.2f} times as fast with the cheapest layers that were tried."
                )
            chosen = chosen_for(total / wanted)
    work.notes["choice"] = [plain({name: [one] for name, one in chosen.items()}), total]
    return chosen, total


def _bundles(pairs: Sequence[Pair], options: Options) -> dict[str, list[Bundle]]:
    """What can be chosen: an option of a layer, or for a pair one of each of both or a deletion."""
    paired = {name for pair in pairs for name in (pair.name, *(s.name for s in pair.sites))}
    found = {
        name: [Bundle({name: option}, option.cost, option.error) for option in choices]
        for name, choices in options.items()
        if name not in paired
    }
    for pair in pairs:
        names = [site.name for site in pair.sites]
        now = [options[name][0] for name in names]
        bundles = []
        for deletion in options[pair.name]:
            layers = {}
            for name, stay in zip(names, now, strict=True):
                share = deletion.cost * stay.cost / sum(option.cost for option in now)
                error = deletion.error / len(names)
                layers[name] = Option("channels", deletion.ranks, share, error)
            bundles.append(Bundle(layers, deletion.cost, deletion.error))
        between = sum(option.cost for option in now[1:-1])
        for x, y in product(options[names[0]], options[names[-1]]):
            layers = dict(zip(names, (x, *now[1:-1], y), strict=True))
            bundles.append(Bundle(layers, x.cost + y.cost + between, x.error + y.error))
        found[pair.name] = bundles
    return found


def _fill_(work: Work, chosen: dict[str, Option], budget: float) -> None:
    """Give layers the ranks that the budget still has room for, those of most error first.

    Where few layers have few channels, the next of the ranks that were tried may be far away.
    """
    room = budget - left(work, chosen)
    order = sorted(work.networks.sites, key=lambda site: -chosen[site.name].error)
    for lanes, site in product((LANES, 1), order):
        option, method = chosen[site.name], chosen[site.name].method
        if room < SPARE * budget or method not in METHODS:
            continue
        most = (option.cost + room) / site.multiply_adds
        for more in ranks_for(site, method, most, lanes):
            cost = float(multiply_adds(site, method, more))
            if len(more) == len(option.ranks) and cost > option.cost:
                chosen[site.name] = replace(option, ranks=more, cost=cost)
                room -= cost - option.cost


def left(work: Work, chosen: Mapping[str, Option]) -> float:
    """Multiply-adds of the whole network with these layers."""
    fixed = work.networks.total - sum(site.multiply_adds for site in work.sites)
    return fixed + sum(option.cost for option in chosen.values())


def _speed(work: Work, chosen: Mapping[str, Option]) -> float:
    """How many times as fast the network is with these layers."""
    modules: dict[Site, nn.Module] = {}
    for site in work.networks.sites:
        if method := chosen[site.name].method:
            modules[site] = work.random(site, method, chosen[site.name].ranks)
    with work.networks.trying(modules) as network:
        return work.speed(network)


def choose(options: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """The options, one of each row, whose errors have the least sum for a budget of costs.

    Errors of layers are taken to add up. Along the lower convex hulls of all layers the steps that
    save most for their error are taken first (Lagrange's multiplier, as in Shoham and Gersho 1988);
    what the last step saves too much is given back where it helps most. The cheapest options
    together must not cost more than the budget.
    """
    hulls = {name: _hull(choices) for name, choices in options.items()}
    place = dict.fromkeys(hulls, 0)
    cost = sum(hull[0].cost for hull in hulls.values())
    while cost > budget:

        def price(name: str) -> float:
            here, there = hulls[name][place[name]], hulls[name][place[name] + 1]
            return (there.error - here.error) / (here.cost - there.cost)

        name = min((n for n in hulls if place[n] + 1 < len(hulls[n])), key=price)
        cost -= hulls[name][place[name]].cost - hulls[name][place[name] + 1].cost
        place[name] += 1
    chosen = {name: hull[place[name]] for name, hull in hulls.items()}
    while True:  # give back
        room = budget - sum(option.cost for option in chosen.values())
        better = [
            (chosen[name].error - option.error, name, option)
            for name, choices in options.items()
            for option in choices
            if option.cost - chosen[name].cost <= room and option.error < chosen[name].error
        ]
        if not better:
            return chosen
        _, name, option = max(better, key=lambda item: item[0])
        chosen[name] = option


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The options on the lower convex hull of error over cost, dearest first."""
    best: list[Choice] = []
    for option in sorted(options, key=lambda o: (-o.cost, o.error)):
        while best and option.error <= best[-1].error:
            best.pop()
        while len(best) > 1 and _slope(best[-2], best[-1]) >= _slope(best[-2], option):
            best.pop()
        if not best or option.cost < best[-1].cost:
            best.append(option)
    return best


def _slope(a: Choice, b: Choice) -> float:
    return (b.error - a.error) / (a.cost - b.cost)


def plain(options: Options) -> dict[str, list[tuple[Any, ...]]]:
    """Options as they are written down."""
    return {name: [astuple(option) for option in choices] for name, choices in options.items()}


def from_plain(known: Mapping[str, Any]) -> Options:
    """The inverse of `plain`."""
    return {
        name: [Option(method, tuple(ranks), cost, error) for method, ranks, cost, error in choices]
        for name, choices in known.items()
    }
