"""Cheaper layers at each site, in closed form: what could be done, and what was chosen done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace

from vggtorch.compression.choice import Option, Options, from_plain, plain
from vggtorch.compression.deletion import Pair, numbers_of, order_of, reading
from vggtorch.compression.factors import (
    METHODS,
    SHARES,
    Factors,
    Part,
    multiply_adds,
    ranks_for,
)
from vggtorch.compression.sites import Site
from vggtorch.compression.statistics import look_again
from vggtorch.compression.work import Work

CALIBRATED = 0.26  # of a layer's cost, at which its effect on the last map is measured


def options_of(work: Work, methods: Sequence[str]) -> Options:
    """What each layer could become, the first to stay, and by the name of a pair its deletions."""
    if (known := work.notes["options"]) is not None:
        return from_plain(known)
    options: Options = {}
    seen = work.seen  # whose progress is shown before that of what follows
    work.progress.begin("trying layers", len(seen))
    for site in work.networks.sites:
        stay = Option(None, (), work.cost(site, work.networks), 0.0)
        options[site.name] = [stay, *_replacements(work, site, methods)]
        work.progress.advance()
    for pair in work.pairs:
        for site in pair.between:
            options[site.name] = [Option(None, (), work.cost(site, work.networks), 0.0)]
        options[pair.name] = _deletions(work, pair)
    work.notes["options"] = plain(options)
    return options


def _replacements(work: Work, site: Site, methods: Sequence[str]) -> list[Option]:
    """Layers in the place of one.

    What the metric expects of errors that don't meet is corrected by one measurement for each
    method and number of layers.
    """
    rows = work.rows(site)
    tried = [
        (method, ranks)
        for method in methods
        for share in SHARES
        for ranks in ranks_for(site, method, share)
    ]
    costs = [work.cost_of(site, *one) for one in tried]
    made = [METHODS[method](rows, *ranks) for method, ranks in tried]
    expected = [rows.error(factors(rows.patches)) for factors in made]
    distances = [abs(multiply_adds(site, *one) / site.multiply_adds - CALIBRATED) for one in tried]
    kinds: dict[tuple[str, int], list[int]] = {}
    for i, (method, ranks) in enumerate(tried):
        kinds.setdefault((method, len(ranks)), []).append(i)
    corrections = {}
    for kind, places in kinds.items():
        one = min(places, key=distances.__getitem__)
        now = work.change({site: made[one].module(site)})
        corrections[kind] = now / max(expected[one], 1e-30)
    return [
        Option(method, ranks, cost, corrections[method, len(ranks)] * error)
        for (method, ranks), cost, error in zip(tried, costs, expected, strict=True)
    ]


def _deletions(work: Work, pair: Pair) -> list[Option]:
    """Fewer channels between two layers, by how many stay; costs are those of all that have them.

    One measurement, of the number in the middle, corrects what the metric expects.
    """
    rows = work.rows(pair.second)
    order, numbers = order_of(rows), numbers_of(pair)
    found, correction = [], 1.0
    for number in numbers:
        kept, share = order[:number].sort().values, number / pair.first.outputs
        gives, reads = work.giving(pair.first, kept), reading(rows, kept)
        modules = {pair.first: gives.module(pair.first), pair.second: reads.module(pair.second)}
        cost = share * sum(work.cost(site, work.networks) for site in pair.between)
        if work.by == "seconds":
            cost += sum(work.seconds(site, module) for site, module in modules.items())
        else:
            cost += share * sum(site.multiply_adds for site in modules)
        found.append(Option("channels", (number,), cost, rows.error(reads(rows.patches))))
        if number == numbers[len(numbers) // 2]:
            correction = work.change(modules) / max(found[-1].error, 1e-30)
    return [replace(option, error=correction * option.error) for option in found]


def closed_forms_(work: Work, chosen: Mapping[str, Option]) -> dict[str, Factors]:
    """Fit layers one after the other, each on what those before it give, and install them."""
    sites = [site for site in work.networks.sites if chosen[site.name].method]
    made = {
        name: Factors(method, tuple(Part(end, w, tuple(axes)) for end, w, axes in parts), *others)
        for name, (method, parts, *others) in (work.notes["factors"] or {}).items()
    }
    work.progress.begin("fitting layers", len(sites))
    for site in sites:
        if site.name not in made:
            made[site.name] = _fitted(work, site, chosen[site.name])
            work.notes["factors"] = {name: astuple(factors) for name, factors in made.items()}
        work.networks.install_({site: made[site.name].module(site)})
        work.progress.advance()
    vars(work).pop("seen", None)  # the training needs the memory
    return made


def _fitted(work: Work, site: Site, option: Option) -> Factors:
    """Layers for a site, fitted to what it sees behind those that are installed."""
    reader = next((pair.second for pair in work.pairs if pair.first is site), None)
    if option.method == "channels" and reader is not None:
        order = order_of(work.rows(reader))
        return work.giving(site, order[: option.ranks[0]].sort().values)
    patches = look_again(work.networks.work, site, work.fitted, work.seen[site.name].places)
    rows = work.rows(site, patches)
    if option.method in METHODS:
        return METHODS[option.method](rows, *option.ranks)
    giver = next(pair.first for pair in work.pairs if pair.second is site)
    kept = getattr(work.networks.work, giver.child)[-1].kept
    return reading(rows, kept.cpu())
