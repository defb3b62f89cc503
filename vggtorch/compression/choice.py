"""Which layers are replaced, by what, with which ranks: the least error for a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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


def choose(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """The options, one for each layer, whose errors have the least sum for a budget of costs.

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
        left = budget - sum(option.cost for option in chosen.values())
        better = [
            (chosen[name].error - option.error, name, option)
            for name, choices in options.items()
            for option in choices
            if option.cost - chosen[name].cost <= left and option.error < chosen[name].error
        ]
        if not better:
            return chosen
        _, name, option = max(better, key=lambda item: item[0])
        chosen[name] = option


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of error over cost, dearest first."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.cost, o.error)):
        while best and option.error <= best[-1].error:
            best.pop()
        while len(best) > 1 and _slope(best[-2], best[-1]) >= _slope(best[-2], option):
            best.pop()
        if not best or option.cost < best[-1].cost:
            best.append(option)
    return best


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (a.cost - b.cost)
