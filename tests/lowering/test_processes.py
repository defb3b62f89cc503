"""torch.compile; what several processes give is in test_torch_tools.py."""

from __future__ import annotations

import pytest
import torch
from small_vgg import assert_close, images, on_keras, small_vgg

pytestmark = pytest.mark.slow


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
