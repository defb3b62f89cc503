"""torch.compile, and several processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from small_vgg import assert_close, images, on_keras, small_vgg
from torch import nn

pytestmark = pytest.mark.slow


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


def _gradients(rank: int, port: int, out: object) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    grads: list[np.ndarray] = []
    for checkpoint in (False, True):
        model = small_vgg()
        model.get_layer("block2_bn1").trainable = False
        module = on_keras(model, checkpoint=checkpoint).train()
        parallel = nn.parallel.DistributedDataParallel(module)
        half = images(model)[rank * 2 : rank * 2 + 2]
        parallel(half).square().sum(1).mean().backward()
        grads += [v.value.grad.numpy() for v in model.trainable_variables]
    if rank == 0:
        np.savez(out, *grads)  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = f"{tmp_path}/gradients.npz"
    torch.multiprocessing.spawn(_gradients, (port, out), nprocs=2)
    model = small_vgg()
    model.get_layer("block2_bn1").trainable = False
    on_keras(model).train()(images(model)).square().sum(1).mean().backward()
    variables = model.trainable_variables * 2  # without checkpointing, and with it
    for variable, grad in zip(variables, np.load(out).values(), strict=True):
        np.testing.assert_allclose(variable.value.grad.numpy(), grad, rtol=1e-4, atol=1e-6)
