"""What torch's own tools do with `to_torch(model)` and with the same network by hand: the same.

The networks are VGG11 with batch norm, with an eighth of its channels, and the bottom of ResNet50,
with all of them, both with a pooled head; by_hand.py has both in torch.nn.
"""

import copy
import importlib
import logging
import warnings
from functools import partial

import pytest
import torch
import two_processes_network
from by_hand import KINDS
from fresh import as_two
from torch import nn
from torch.nn.utils import parametrize, prune

pytestmark = [pytest.mark.usefixtures("one_thread", "narrow_throughout"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def group_bytes():
    """These networks run whole batches: no need to run each test twice, as conftest.py does."""


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def pair(kind):
    """(ours, by hand), in evaluation."""
    model = kind.build()
    return kind.ours(model), kind.by_hand(model).eval()


@pytest.fixture
def x(kind):
    return torch.rand(4, 3, kind.size, kind.size, generator=torch.Generator().manual_seed(3))


def alike(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)


def linears(network):
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def convolutions(network):
    return [m for m in network.modules() if isinstance(m, nn.Conv2d)]


def norms(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def in_double(network):
    """The network in float64, in which no rounding turns ReLUs on and off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it parts from its Keras model
        return network.double()


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
    with pytest.warns(UserWarning, match="the Keras model keeps the weights that it had"):
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


@pytest.mark.filterwarnings("ignore:.*stand alone")  # the Keras model keeps all channels
def test_torch_pruning_removes_channels(pair, x):
    pruning = needs("torch_pruning")
    channels = len(convolutions(pair[0])[0].weight)
    for network in pair:
        pruner = pruning.pruner.MagnitudePruner(
            network, x, pruning.importance.MagnitudeImportance(), pruning_ratio=0.25,
            ignored_layers=linears(network),
        )  # fmt: skip
        pruner.step()
    assert len(convolutions(pair[0])[0].weight) == 0.75 * channels
    alike(pair[0](x), pair[1](x), 1e-4)


def test_sync_batch_norm_conversion_finds_every_norm(pair):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(pair[0])
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == len(norms(pair[1]))


# Looking at it


def test_captum_attributes_alike(pair, x):
    attr = needs("captum.attr")
    pair, x = [in_double(n) for n in pair], x.double()
    for name in ("GuidedBackprop", "Saliency", "DeepLift"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours, theirs = (
                getattr(attr, name)(copy.deepcopy(n)).attribute(x, target=1) for n in pair
            )
        alike(ours, theirs, 1e-9)
    ours, theirs = (attr.LayerGradCam(n, convolutions(n)[-1]).attribute(x, target=1) for n in pair)
    alike(ours, theirs, 1e-9)


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
    kinds = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d
    seen = []
    for network in pair:
        kept: dict[tuple[str, int], torch.Tensor] = {}
        in_double(network.train(training))
        watched = [m for m in network.modules() if isinstance(m, kinds)]

        def forward(i, kept, _, __, output):
            kept["forward", i] = output.detach()

        def backward(i, kept, _, __, gradients):
            kept["backward", i] = gradients[0].clone()

        for i, module in enumerate(watched):
            module.register_forward_hook(partial(forward, i, kept))
            module.register_full_backward_hook(partial(backward, i, kept))
        network(x.double())[:, 0].sum().backward()
        seen.append(kept)
    assert len(seen[0]) == 2 * len(watched)
    for key, ours in seen[0].items():
        alike(ours, seen[1][key], 1e-9)


def test_feature_extraction_before_and_after_each_relu(kind, pair, x):
    extract = importlib.import_module("torchvision.models.feature_extraction")
    found, expected = (
        extract.create_feature_extractor(network, nodes)(x)
        for network, nodes in zip(pair, (list(kind.taps), list(kind.taps.values())), strict=True)
    )
    for ours, theirs in kind.taps.items():
        alike(found[ours], expected[theirs], 1e-4)


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
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=True)
    for n in (4, 2, 3):
        alike(compiled(x[:n]), expected[:n])


def test_torch_func_alike(pair, x):
    def gradients(network):
        parameters = {k: p.detach() for k, p in network.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(network, parameters, image[None])[0, 1]

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.double())
        return list(found.values())

    for ours, theirs in zip(*(gradients(in_double(n)) for n in pair), strict=True):
        alike(ours, theirs, 1e-9)


# Training it


def test_averaged_models_and_update_bn(kind, pair, x):
    averaged = [torch.optim.swa_utils.AveragedModel(n) for n in pair]
    for network, average in zip(pair, averaged, strict=True):
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.5)
        average.update_parameters(network)
        torch.optim.swa_utils.update_bn([x, x * 2], average)
    for ours, theirs in zip(averaged[0].parameters(), averaged[1].parameters(), strict=True):
        alike(ours, theirs)
    n = len(x) * kind.first_size**2  # torch keeps the unbiased variance, Keras the biased one
    ours, theirs = (norms(average)[0] for average in averaged)
    alike(ours.running_mean, theirs.running_mean, 1e-4)
    alike(ours.running_var, theirs.running_var * ((n - 1) / n), 1e-3)


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
    ours, theirs = (in_double(n)(x.double()) for n in pair)
    for k in range(2):
        a, b = (
            torch.autograd.grad(y[:, k].sum(), list(n.parameters()), retain_graph=True)
            for y, n in zip((ours, theirs), pair, strict=True)
        )
        for p, q in zip(a, b, strict=True):
            alike(p, q, 1e-9)


def test_initialisers_by_class_name(pair):
    def initialise(module):
        if "Conv" in type(module).__name__:
            nn.init.constant_(module.weight.data, 0.5)

    pair[0].apply(initialise)
    assert all((m.weight == 0.5).all() for m in convolutions(pair[0]))


# Keeping it


def test_safetensors_saves_and_loads(kind, pair, x, tmp_path):
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
        model = kind.build()
        other = kind.ours(model)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        load(other)
        assert torch.equal(other(x), expected)
        alike(model(x.permute(0, 2, 3, 1), training=False), expected)


# Training loops of others


def test_ddp_and_fsdp_on_two_processes_have_the_gradients_of_one():
    as_two(two_processes_network.compare_as_one_of_two)


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
            trainer.fit(Task(in_double(network)), batches(x.double()))
        network.eval()
    for ours, theirs in zip(convolutions(pair[0]), convolutions(pair[1]), strict=True):
        alike(ours.weight.detach(), theirs.weight.detach(), 1e-9)


def test_accelerate_trains_it(pair, x):
    accelerate = importlib.import_module("accelerate")
    for network in map(in_double, pair):
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        data = batches(x.double())
        prepared, optimizer, loader = accelerator.prepare(network.train(), optimizer, data)
        for image, label in loader:
            accelerator.backward(nn.functional.cross_entropy(prepared(image), label))
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(convolutions(pair[0]), convolutions(pair[1]), strict=True):
        alike(ours.weight.detach(), theirs.weight.detach(), 1e-9)
