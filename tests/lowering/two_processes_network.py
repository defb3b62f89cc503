"""Gradients by DDP and by FSDP2 on two processes are those of one."""

from __future__ import annotations

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import torch
import torch.distributed as dist
from small_vgg import images, on_keras, small_vgg
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vggtorch.lowering import TorchNetwork


def network() -> tuple[keras.Model, TorchNetwork]:
    keras.utils.set_random_seed(0)
    vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    vgg = vt.stack(vt.truncate(vgg, "block4_conv1"), keras.layers.GlobalAveragePooling2D())
    return vgg, vt.to_torch(vgg, data_format="channels_first")


def on_the_models_own_parameters(rank: int) -> None:
    """DDP on OnKeras, which fit runs, with checkpointing and without."""
    grads = []
    for run in ("whole", "half", "half, checkpointed"):
        model = small_vgg()
        model.get_layer("block2_bn1").trainable = False
        module = on_keras(model, checkpoint=run.endswith("checkpointed")).train()
        if run == "whole":
            module(images(model)).square().sum(1).mean().backward()
        else:
            half = images(model)[rank * 2 : rank * 2 + 2]
            parallel = DistributedDataParallel(module)  # which must live until the gradients do
            parallel(half).square().sum(1).mean().backward()
        grads.append([v.value.grad for v in model.trainable_variables])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-4, atol=1e-6)


def compare_as_one_of_two() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    on_the_models_own_parameters(rank)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mine = x[2 * rank : 2 * rank + 2]

    _, whole = network()
    whole(x).square().mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}

    keras_model, plain = network()
    parallel = DistributedDataParallel(plain)
    parallel(mine).square().mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)
    torch.optim.SGD(parallel.parameters(), 0.1).step()
    torch.testing.assert_close(
        keras_model(x.permute(0, 2, 3, 1), training=False), plain(x), rtol=1e-5, atol=1e-7
    )

    _, sharded = network()
    for module in (sharded.block2_conv1, sharded.block3_conv1):
        fully_shard(module)
    fully_shard(sharded)
    sharded(mine).square().mean().backward()
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor) and isinstance(p.grad, DTensor)
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-7)
    dist.destroy_process_group()
