"""Closed forms against what they must find, counts against torch's, the choice against all."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.compression.choice import Option, choose
from vggtorch.compression.factors import METHODS, SHARES, Factors, multiply_adds, ranks_for
from vggtorch.compression.rows import Rows
from vggtorch.compression.sites import Site

pytestmark = pytest.mark.usefixtures("one_thread")
SITES = {
    "3x3": Site("a", "a", 20, 12, (3, 3), (1, 1), (1, 1), False, 81, (12, 9, 9), (12, 9, 9)),
    "strided": Site("a", "a", 20, 12, (3, 5), (2, 1), (1, 2), False, 45, (12, 9, 9), (12, 9, 9)),
    "1x1": Site("a", "a", 20, 12, (1, 1), (2, 2), (0, 0), False, 25, (12, 9, 9), (12, 9, 9)),
    "Dense": Site("a", "a", 20, 300, (1, 1), (1, 1), (0, 0), True, 1, (300,), (300,)),
}
KERNELS = {  # kernels that the methods can give exactly, with the ranks for it
    ("low rank", (4,)): lambda g: torch.einsum("or,rihw->oihw", _r(g, 20, 4), _r(g, 4, 12, 3, 3)),
    ("separated", (5,)): lambda g: torch.einsum("orw,rih->oihw", _r(g, 20, 5, 3), _r(g, 5, 12, 3)),
    ("separated", (5, 4)): lambda g: torch.einsum(
        "os,srw,rih->oihw", _r(g, 20, 4), _r(g, 4, 5, 3), _r(g, 5, 12, 3)
    ),
    ("bottleneck", (4, 6)): lambda g: torch.einsum(
        "os,srhw,ri->oihw", _r(g, 20, 6), _r(g, 6, 4, 3, 3), _r(g, 4, 12)
    ),
}


def _r(generator, *shape):
    return torch.randn(shape, generator=generator)


def rows(weight, generator, number=2000):
    inputs = weight[0].numel()
    mix = _r(generator, inputs, inputs)  # correlated, as pixels are
    patches = (_r(generator, number, inputs) @ mix).reshape(number, *weight.shape[1:])
    outputs = patches.flatten(1) @ weight.flatten(1).T + _r(generator, len(weight))
    metric = _r(generator, len(weight), len(weight))
    return Rows(patches, outputs, metric @ metric.T, weight)


@pytest.mark.parametrize(("kind", "kernel"), KERNELS.items(), ids=map(str, KERNELS))
def test_a_kernel_of_the_form_is_found_exactly(kind, kernel):
    method, ranks = kind
    generator = torch.Generator().manual_seed(0)
    given = rows(kernel(generator), generator)
    factors = METHODS[method](given, *ranks)
    assert tuple(len(part.weight) for part in factors.parts[:-1]) == ranks
    error = given.error(factors(given.patches)) / given.error(given.outputs.mean(0))
    assert error < 1e-6
    unseen = torch.randn(50, *given.patches.shape[1:], generator=generator)
    bias = given.outputs.mean(0) - given.patches.mean(0).flatten() @ given.weight.flatten(1).T
    wanted = unseen.flatten(1) @ given.weight.flatten(1).T + bias
    torch.testing.assert_close(factors(unseen), wanted, rtol=0.01, atol=0.05)


def test_no_pair_of_the_rank_is_better_in_the_metric():
    generator = torch.Generator().manual_seed(1)
    given = rows(_r(generator, 8, 6, 1, 1), generator)
    found = METHODS["low rank"](given, 3)
    # Descent from there leads nowhere.
    a, b = (p.weight.flatten(1).clone().requires_grad_() for p in found.parts)
    assert found.bias is not None
    bias = found.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([a, b, bias], max_iter=100, line_search_fn="strong_wolfe")

    def error():
        optimizer.zero_grad()
        y = given.patches.flatten(1) @ a.T @ b.T + bias
        value = ((y - given.outputs) @ given.roots[0]).square().sum(1).mean()
        value.backward()
        return value

    before = error().item()
    optimizer.step(error)
    assert error().item() > 0.97 * before  # what stands for unseen images costs a little


@pytest.mark.parametrize(("kind", "kernel"), KERNELS.items(), ids=map(str, KERNELS))
def test_what_replaced_layers_give_is_made_up_for(kind, kernel):
    method, ranks = kind
    generator = torch.Generator().manual_seed(2)
    given = rows(kernel(generator), generator)
    given.patches = 0.8 * given.patches  # a layer before it gives too little
    plain = given.error(given.patches.flatten(1) @ given.weight.flatten(1).T)
    assert given.error(METHODS[method](given, *ranks)(given.patches)) < 0.05 * plain


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("method", METHODS)
def test_costs_are_torchs_count_and_maps_have_the_layers_shape(site, method):
    tried = [r for share in (*SHARES, 0.9) for r in ranks_for(site, method, share)]
    assert tried or method != "low rank"
    layer: torch.nn.Module
    if site.is_dense:
        layer = torch.nn.Linear(site.inputs, site.outputs)
    else:
        layer = torch.nn.Conv2d(site.inputs, site.outputs, site.kernel, site.stride, site.padding)
    x = torch.randn(1, *site.entering)
    for ranks in tried:
        module = Factors.random(site, method, ranks).module(site)
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        assert y.shape == layer(x).shape
        assert counter.get_total_flops() // 2 == multiply_adds(site, method, ranks)
        assert multiply_adds(site, method, ranks) <= 0.9 * site.multiply_adds


def test_ranks_fill_vectors():
    site = Site("a", "a", 200, 100, (3, 3), (1, 1), (1, 1), False, 81, (100, 9, 9), (100, 9, 9))
    for method in METHODS:
        for share in SHARES:
            for ranks in ranks_for(site, method, share):
                assert all(rank < 16 or rank % 16 == 0 for rank in ranks)
                assert multiply_adds(site, method, ranks) <= share * site.multiply_adds
        assert len({ranks_for(site, method, share)[0] for share in SHARES}) > 4
    small = Site("a", "a", 20, 12, (3, 3), (1, 1), (1, 1), False, 81, (12, 9, 9), (12, 9, 9))
    assert ranks_for(small, "separated", 0.3) == [(6,), (7, 8)]


def test_a_module_computes_what_its_factors_give_at_each_patch():
    site, generator = SITES["strided"], torch.Generator().manual_seed(3)
    x = _r(generator, 1, *site.entering)
    patches = F.unfold(x, site.kernel, 1, site.padding, site.stride)  # (1, I H W, positions)
    patches = patches[0].T.reshape(-1, site.inputs, *site.kernel)
    for method in METHODS:
        factors = Factors.random(site, method, ranks_for(site, method, 0.6)[-1])
        y = factors.module(site)(x)[0].flatten(1).T
        torch.testing.assert_close(y, factors(patches), rtol=1e-4, atol=1e-3)


def test_the_choice_is_near_the_best_of_all():
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        options = {}
        for name in "abcd":
            cost = 1 + 9 * torch.rand(1, generator=generator).item()
            shares = torch.rand(5, generator=generator).tolist()
            options[name] = [Option(None, (), cost, 0.0)] + [
                Option(
                    "m", (i,), cost * s, torch.rand(1, generator=generator).item() * (1 - s) ** 2
                )
                for i, s in enumerate(shares)
            ]
        total = sum(choices[0].cost for choices in options.values())
        least = sum(min(o.cost for o in choices) for choices in options.values())
        budget = least + 0.5 * (total - least)
        found = choose(options, budget)
        every = [
            sum(o.error for o in combination)
            for combination in itertools.product(*options.values())
            if sum(o.cost for o in combination) <= budget
        ]
        assert sum(o.cost for o in found.values()) <= budget
        error = sum(o.error for o in found.values())
        assert error <= min(every) + 0.12
        assert sum(e < error for e in every) <= 0.01 * len(every)
