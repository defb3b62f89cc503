"""What backward keeps, and the network as torch differentiates it."""

from __future__ import annotations

import torch


def kept_for_backward(extractor, x, weights=None):
    """The values, and the bytes of activations that are kept for backward beside them."""
    kept: list[torch.Tensor] = []
    weights = weights or {p.data_ptr() for p in extractor.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values = extractor(x)
    returned = {value.untyped_storage() for value in values.values()}
    storages = {t.untyped_storage() for t in kept} - returned
    return values, sum(storage.nbytes() for storage in storages)


def plain_network(extractor, x):
    """The same network's modules one by one, as torch differentiates them."""
    one_by_one = torch.fx.GraphModule(extractor.network, extractor.network.graph)
    dtype = next(extractor.parameters()).dtype
    return one_by_one(extractor.pixels.normalise(x).to(dtype))
