"""torch.compile, and batch norm over processes; DDP and FSDP are in test_torch_tools.py."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import assert_close, images, on_keras, randomise, small_vgg

from vggtorch.lowering import to_torch
from vggtorch.lowering.batch_norm import synchronize_


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("training", [True, False])
def test_no_graph_breaks(training: bool) -> None:
    model = small_vgg()
    x = images(model)
    lowered = on_keras(model).train(training)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        assert torch._dynamo.explain(lowered)(x).graph_break_count == 0
        compiled = torch.compile(
            on_keras(small_vgg()).train(training), backend="aot_eager", fullgraph=True
        )
        assert_close(compiled(x).detach(), on_keras(small_vgg()).train(training)(x).detach())


@pytest.mark.parametrize("shape", [(3,), (4, 4, 3)])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_batch_norm_over_two_processes_is_that_of_all_their_images(
    options: dict[str, bool], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have the same images here, so that the sum over processes is twice what one has."""
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: sums.append(x.mul_(2)))
    image = keras.Input(shape)
    model = randomise(keras.Model(image, layers.BatchNormalization(**options)(image)))
    x, weight = torch.randn(5, *shape), torch.randn(5, *shape)
    results = []
    for count in (1, 2):
        network: Any = to_torch(model, share=False).train()
        synchronize_(network, count == 1)
        mine: Any = x.repeat(count, *(1 for _ in shape)).requires_grad_()
        y = network(mine)
        (y * weight.repeat(count, *(1 for _ in shape))).sum().backward()
        assert len(sums) == 5  # three forward and two backward, by one of the two networks
        grads = [2 / count * p.grad for p in network.parameters()]
        results.append([y[:5], mine.grad[:5], *network.buffers(), *grads])
    torch.testing.assert_close(*results)
