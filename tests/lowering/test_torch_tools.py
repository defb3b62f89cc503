"""What torch's own tools do with `to_torch(model)` and with the same network by hand: the same.

The network is VGG11 with batch norm at 32x32 with a pooled head; by hand it is torchvision's
`features`, an average pool and an nn.Linear on the same weights.
"""

import copy
import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize, prune

from vggtorch.lowering import to_torch
from vggtorch.weights import keras_to_torchvision

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def group_bytes():
    """These networks run whole batches: no need to run each test twice, as conftest.py does."""


def by_keras():
    keras.utils.set_random_seed(0)
    vgg = vt.VGG11(weights=None, include_top=False, batch_norm=True, input_shape=(32, 32, 3))
    head = [keras.layers.GlobalAveragePooling2D(name="pool"), keras.layers.Dense(10, name="logits")]
    model = vt.stack(vgg, head)
    for variable in model.variables:  # so that the signal reaches the end, and no norm is trivial
        if variable.name in ("moving_variance", "gamma"):
            variable.assign(torch.rand(variable.shape) + 0.5)
        elif variable.name in ("moving_mean", "beta", "bias"):
            variable.assign(torch.rand(variable.shape) * 0.2)
    return model


def by_hand(model):
    features = torchvision.models.vgg11_bn(weights=None).features
    tensors = {
        key: v.value.detach()
        for key, v in vt.named_variables(model).items()
        if not key.startswith("logits")
    }
    state = keras_to_torchvision(tensors, "vgg11_bn")
    features.load_state_dict({k.removeprefix("features."): v.clone() for k, v in state.items()})
    linear = nn.Linear(512, 10)
    dense = model.get_layer("logits")
    with torch.no_grad():
        linear.weight.copy_(dense.kernel.value.T)
        linear.bias.copy_(dense.bias.value)
    for module in features.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which captum and hooks can't look through
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


@pytest.fixture
def pair():
    """(ours, by hand), in evaluation."""
    model = by_keras()
    return to_torch(model, data_format="channels_first").eval(), by_hand(model).eval()


@pytest.fixture
def x():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def alike(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


def linears(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def convolutions(network):
    return [m for m in network.modules() if isinstance(m, nn.Conv2d)]


def needs(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


def test_they_are_the_same_network(pair, x):
    alike(pair[0](x), pair[1](x))
    assert pair[0](x).std(0).min() > 1e-4  # one that tells its inputs apart


# Changing it


def test_prune_masks_and_removes(pair, x):
    dense = pair[0](x)
    for network in pair:
        for module in convolutions(network):
            prune.l1_unstructured(module, "weight", amount=0.5)
    alike(pair[0](x), pair[1](x))
    assert not torch.equal(pair[0](x), dense)
    for network in pair:
        for module in convolutions(network):
            prune.remove(module, "weight")
    alike(pair[0](x), pair[1](x))
    assert (convolutions(pair[0])[0].weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_an_adapter_on_a_frozen_network_learns(pair, x):
    class Adapter(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.scale = nn.Parameter(torch.full((*shape[:1], 1, 1, 1), 0.1))

        def forward(self, weight):
            return weight * (1 + self.scale)

    gradients = []
    for network in pair:
        network.requires_grad_(False)
        module = convolutions(network)[2]
        parametrize.register_parametrization(module, "weight", Adapter(module.weight.shape))
        network(x)[:, 0].sum().backward()
        gradients.append(module.parametrizations.weight[0].scale.grad)
    alike(gradients[0], gradients[1], 1e-4)
    alike(pair[0](x), pair[1](x))


def test_quantize_dynamic_finds_the_linear(pair, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (
            torch.ao.quantization.quantize_dynamic(copy.deepcopy(n), {nn.Linear}, torch.qint8)
            for n in pair
        )
    assert not any(type(m) is nn.Linear for m in ours.modules())
    alike(ours(x), theirs(x), 1e-3)


def test_torchao_quantizes_weights(pair, x):
    torchao = needs("torchao.quantization")
    plain = pair[0](x)
    for network in pair:
        torchao.quantize_(network, torchao.Int8WeightOnlyConfig())
    alike(pair[0](x), pair[1](x))
    assert not torch.equal(pair[0](x), plain)


def test_torchao_pt2e_quantizes_for_x86(pair, x):
    pt2e = needs("torchao.quantization.pt2e.quantize_pt2e")
    x86 = needs("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    results = []
    for network in pair:
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        program = torch.export.export(network, (x,)).module()
        prepared = pt2e.prepare_pt2e(program, quantizer)
        prepared(x)
        results.append(pt2e.convert_pt2e(prepared)(x))
    alike(results[0], results[1], 5e-2)  # a value on a boundary may fall to either side
    assert not torch.equal(results[0], pair[0](x))


def test_torch_pruning_removes_channels(pair, x):
    pruning = needs("torch_pruning")
    for network in pair:
        pruner = pruning.pruner.MagnitudePruner(
            network, x, pruning.importance.MagnitudeImportance(), pruning_ratio=0.25,
            ignored_layers=linears(network),
        )  # fmt: skip
        pruner.step()
    assert convolutions(pair[0])[0].weight.shape == (48, 3, 3, 3)
    alike(pair[0](x), pair[1](x), 1e-4)


def test_sync_batch_norm_conversion_finds_every_norm(pair):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pair[0])
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == 8


# Looking at it


def test_captum_attributes_alike(pair, x):
    attr = needs("captum.attr")
    for name in ("GuidedBackprop", "Saliency", "DeepLift"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = (
                getattr(attr, name)(copy.deepcopy(n)).attribute(x, target=1) for n in pair
            )
        alike(ours, theirs, 2e-2)  # rounding turns single ReLUs on and off
    ours, theirs = (attr.LayerGradCam(n, convolutions(n)[-1]).attribute(x, target=1) for n in pair)
    alike(ours, theirs, 1e-4)


def test_grad_cam_alike(pair, x):
    cam = needs("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    maps = []
    for network in pair:
        with cam.GradCAM(network, [convolutions(network)[-1]]) as tool:
            maps.append(torch.from_numpy(tool(x, [targets.ClassifierOutputTarget(1)] * len(x))))
    alike(maps[0], maps[1], 1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_every_module_see_what_they_see_by_hand(pair, x, training):
    seen = []
    for network in pair:
        kept: list[torch.Tensor] = []
        network.train(training)

        def forward_hook(_, __, output, kept=kept):
            kept.append(output)

        def backward_hook(_, __, gradients, kept=kept):
            kept.append(gradients[0].clone())

        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d):
                module.register_forward_hook(forward_hook)
                module.register_full_backward_hook(backward_hook)
        network(x)[:, 0].sum().backward()
        seen.append(kept)
    assert len(seen[0]) == len(seen[1]) == 2 * (3 * 8 + 5)
    for ours, theirs in zip(*seen, strict=True):
        alike(ours.detach(), theirs.detach(), 1e-3)


def test_feature_extraction_before_and_after_each_relu(pair, x):
    extract = importlib.import_module("torchvision.models.feature_extraction")
    nodes = ["block1_conv1", "block1_bn1", "block1_relu1", "block5_pool"]
    found = extract.create_feature_extractor(pair[0], nodes)(x)
    conv, norm, relu = (pair[1][:i](x) for i in (1, 2, 3))
    for name, expected in zip(nodes, (conv, norm, relu, pair[1][:-3](x)), strict=True):
        alike(found[name], expected)


# Running it elsewhere


def test_it_is_traced_scripted_by_trace_exported_and_compiled(pair, x):
    network = pair[0]
    expected = network(x)
    alike(torch.fx.symbolic_trace(network)(x), expected)
    alike(torch.jit.trace(network, x)(x), expected)
    batch = {"x": {0: torch.export.Dim("batch")}}
    name = next(iter(network.graph.nodes)).target
    program = torch.export.export(network, (x,), dynamic_shapes={name: batch["x"]})
    alike(program.module()(x[:3]), expected[:3])
    explained = torch._dynamo.explain(network)(x)
    assert explained.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    for n in (4, 2, 3):
        alike(compiled(x[:n]), expected[:n])


def test_torch_func_alike(pair, x):
    def gradients(network):
        parameters = {k: p.detach() for k, p in network.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(network, parameters, image[None])[0, 1]

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return list(found.values())

    for ours, theirs in zip(gradients(pair[0]), gradients(pair[1]), strict=True):
        alike(ours, theirs, 1e-3)


# Training it


def test_averaged_models_and_update_bn(pair, x):
    averaged = [torch.optim.swa_utils.AveragedModel(n) for n in pair]
    for network, average in zip(pair, averaged, strict=True):
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.5)
        average.update_parameters(network)
        torch.optim.swa_utils.update_bn([x, x * 2], average)
    for ours, theirs in zip(averaged[0].parameters(), averaged[1].parameters(), strict=True):
        alike(ours, theirs)
    n = x.numel() // 3  # torch keeps the unbiased variance, Keras the biased one
    norms = [next(m for m in a.modules() if isinstance(m, nn.BatchNorm2d)) for a in averaged]
    alike(norms[0].running_mean, norms[1].running_mean, 1e-4)
    alike(norms[0].running_var, norms[1].running_var * ((n - 1) / n), 1e-3)


def test_unfreezing_all_parameters_leaves_evaluation_working(pair, x):
    for p in pair[0].parameters():
        p.requires_grad = True
    pair[0](x).sum().backward()


def test_lbfgs_and_vectors_of_parameters(pair, x):
    losses = []
    for network in pair:
        vector = nn.utils.parameters_to_vector(network.parameters())
        nn.utils.vector_to_parameters(vector * 1.01, network.parameters())
        optimizer = torch.optim.LBFGS(network.parameters(), lr=0.01, max_iter=3)

        def closure(network=network, optimizer=optimizer):
            optimizer.zero_grad()
            loss = network(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        losses.append(network(x).square().mean().detach())
    alike(losses[0], losses[1], 1e-3)


def test_two_gradients_of_one_forward(pair, x):
    ours, theirs = (n(x) for n in pair)
    for k in range(2):
        a, b = (
            torch.autograd.grad(y[:, k].sum(), list(n.parameters()), retain_graph=True)
            for y, n in zip((ours, theirs), pair, strict=True)
        )
        for p, q in zip(a, b, strict=True):
            alike(p, q, 2e-2)


def test_initialisers_by_class_name(pair):
    def initialise(module):
        if "Conv" in type(module).__name__:
            nn.init.constant_(module.weight.data, 0.5)

    pair[0].apply(initialise)
    assert all((m.weight == 0.5).all() for m in convolutions(pair[0]))


# Keeping it


def test_safetensors_saves_and_loads(pair, x, tmp_path):
    safetensors = importlib.import_module("safetensors.torch")
    expected = pair[0](x)
    safetensors.save_model(pair[0], str(tmp_path / "m.safetensors"))
    safetensors.save_file(pair[0].state_dict(), tmp_path / "s.safetensors")
    torch.save(pair[0].state_dict(), tmp_path / "s.pt")
    for load in (
        lambda n: safetensors.load_model(n, str(tmp_path / "m.safetensors")),
        lambda n: n.load_state_dict(safetensors.load_file(tmp_path / "s.safetensors")),
        lambda n: n.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True)),
    ):
        model = by_keras()
        other = to_torch(model, data_format="channels_first").eval()
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        load(other)
        assert torch.equal(other(x), expected)
        alike(model(x.permute(0, 2, 3, 1), training=False), expected)


# Training loops of others


def test_ddp_and_fsdp_on_two_processes_have_the_gradients_of_one():
    script = Path(__file__).with_name("two_processes_network.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [sys.executable, *launch, script],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(script.parents[2])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("is done") == 2


def batches(x):
    labels = torch.ones(len(x), dtype=torch.long)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=2)


def test_lightning_fits_it(pair, x, tmp_path):
    lightning = needs("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self, network):
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    for network in pair:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Task(network), batches(x))
        network.eval()
    for ours, theirs in zip(convolutions(pair[0]), convolutions(pair[1]), strict=True):
        alike(ours.weight.detach(), theirs.weight.detach(), 1e-3)


def test_accelerate_trains_it(pair, x):
    accelerate = importlib.import_module("accelerate")
    for network in pair:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        prepared, optimizer, loader = accelerator.prepare(network.train(), optimizer, batches(x))
        for image, label in loader:
            accelerator.backward(nn.functional.cross_entropy(prepared(image), label))
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(convolutions(pair[0]), convolutions(pair[1]), strict=True):
        alike(ours.weight.detach(), theirs.weight.detach(), 1e-3)
