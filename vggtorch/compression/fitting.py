"""The layers that were chosen, fitted in closed form, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

from vggtorch.compression.choice import Option
from vggtorch.compression.deletion import order_of, reading
from vggtorch.compression.factors import METHODS, Factors, Part
from vggtorch.compression.sites import Site
from vggtorch.compression.statistics import look_again
from vggtorch.compression.work import Work


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
