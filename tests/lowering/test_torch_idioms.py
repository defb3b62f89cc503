"""What torch users do with a network besides the tools of test_torch_tools.py, by hand and ours."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import assert_close, randomise, small_vgg
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from vggtorch.lowering import to_torch


@pytest.fixture(autouse=True)
def group_bytes() -> None:
    """No need to run each test twice, as conftest.py does."""


class ChannelsLast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


def by_hand() -> Any:
    """small_vgg as somebody who writes torch would write it."""
    network = nn.Sequential()
    for name, module in {
        "block1_conv1": nn.Conv2d(3, 8, 3, padding=1),
        "block1_conv1_relu": nn.ReLU(),
        "block1_pool": nn.MaxPool2d(2),
        "block2_conv1": nn.Conv2d(8, 16, 3, padding=1),
        "block2_bn1": nn.BatchNorm2d(16, 1e-3, 0.5),
        "block2_relu1": nn.ReLU(),
        "block2_pool": nn.MaxPool2d(2),
        "flatten_permute": ChannelsLast(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(256, 32),
        "fc1_relu": nn.ReLU(),
        "predictions": nn.Linear(32, 10),
        "predictions_softmax": nn.Softmax(-1),
    }.items():
        network.add_module(name, module)
    return network


@pytest.fixture
def model() -> keras.Model:
    return small_vgg()


@pytest.fixture
def network(model: keras.Model) -> Any:
    return to_torch(model, data_format="channels_first").eval()


@pytest.fixture
def hand(network: Any) -> Any:
    hand = by_hand().eval()
    hand.load_state_dict({k: v.clone() for k, v in network.state_dict().items()})
    return hand


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def keras_gives(model: keras.Model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x.permute(0, 2, 3, 1), training=False)


def trained(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What a step of training leaves: the output and the gradients."""
    network.zero_grad()
    y = network.train()(x)
    y.square().sum().backward()
    return [y, *(p.grad for p in network.parameters() if p.grad is not None)]


# What is done to a network, or with it: each gives the tensors that must be alike.


def fused(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
    network.block2_conv1 = nn.utils.fuse_conv_bn_eval(network.block2_conv1, network.block2_bn1)
    network.block2_bn1 = nn.Identity()
    return [network(x)]


def with_norm(norm: Callable[[nn.Module], Any], name: str) -> Callable[..., list[torch.Tensor]]:
    def run(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        norm(network.get_submodule(name))
        return [*trained(network, x), network.eval()(x)]

    return run


def pruned(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
    weights = [
        (network.get_submodule(n), "weight") for n in ("block1_conv1", "block2_conv1", "fc1")
    ]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.6)
    return [network.fc1.weight, *trained(network, x), network.eval()(x)]


def stepped(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Two optimizers, gradients added up and clipped."""
    kinds = [[p for n, p in network.named_parameters() if ("conv" in n) == conv] for conv in (1, 0)]
    optimizers = [torch.optim.SGD(kinds[0], 0.1, momentum=0.9), torch.optim.AdamW(kinds[1], 1e-3)]
    norms = []
    for i in range(4):
        for part in x.split(2):
            network.train()(part).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), 0.1))
        optimizers[i % 2].step()
        network.zero_grad()
    return [*norms, *network.parameters()]


def averaged(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        stepped(network, x)
        average.update_parameters(network)
    return [*average.module.parameters()]


def hooked(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    for module in (network, network.block2_bn1, network.block1_conv1_relu, network.fc1):
        module.register_full_backward_pre_hook(lambda _, grads: seen.append(grads[0].clone()))
    network.fc1.weight.register_hook(lambda grad: 3 * grad)
    network.fc1.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    return [*trained(network, x), *seen]


def checkpointed(reentrant: bool) -> Callable[..., list[torch.Tensor]]:
    def run(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        checkpoint(network.train(), x, use_reentrant=reentrant).square().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        return [x.grad, *gradients, network.block2_bn1.running_mean]  # type: ignore[list-item]

    return run


def under(context: Callable[[], Any]) -> Callable[..., list[torch.Tensor]]:
    def run(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        with context():
            return trained(network, x)

    return run


def ensemble(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    states = [{k: v.detach() * s for k, v in network.named_parameters()} for s in (1.0, 1.1, 1.2)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    call = torch.func.functional_call
    return [torch.func.vmap(lambda state: call(network, state, (x,)))(stacked)]


def jacobians(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.func.jacrev(network)(x[:1]), torch.func.jacfwd(network)(x[:1])]
    return [*found, torch.autograd.functional.jacobian(network, x[:1], vectorize=True)]


def traced_by_proxies(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return [make_fx(network)(x)(x + 1)]


def ahead_of_time(network: Any, x: torch.Tensor) -> list[torch.Tensor]:
    from functorch.compile import aot_module, min_cut_rematerialization_partition, nop

    cut = min_cut_rematerialization_partition
    compiled = aot_module(network.train(), fw_compiler=nop, bw_compiler=nop, partition_fn=cut)
    y = compiled(x)
    y.square().sum().backward()
    gradients = [p.grad for p in network.parameters()]
    return [y, *gradients, network.block2_bn1.running_mean]  # type: ignore[list-item]


def after_inference(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        network(x)
    network.requires_grad_(False)(x)
    return trained(network.requires_grad_(True), x)


def in_channels_last(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    network.to(memory_format=torch.channels_last)
    return trained(network, x.to(memory_format=torch.channels_last))


def in_other_default(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.set_default_dtype(torch.float64)
    try:
        return [*trained(network, x), network.eval()(x)]
    finally:
        torch.set_default_dtype(torch.float32)


DONE: dict[str, Callable[..., list[torch.Tensor]]] = {
    "fuse_conv_bn_eval": fused,
    "weight_norm": with_norm(parametrizations.weight_norm, "block1_conv1"),
    "spectral_norm": with_norm(parametrizations.spectral_norm, "block2_conv1"),
    "orthogonal": with_norm(parametrizations.orthogonal, "fc1"),
    "older spectral_norm": with_norm(nn.utils.spectral_norm, "fc1"),
    "global_unstructured": pruned,
    "two optimizers, accumulation, clipping": stepped,
    "EMA": averaged,
    "hooks of backward and of tensors": hooked,
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "save_on_cpu": under(torch.autograd.graph.save_on_cpu),
    "detect_anomaly": under(torch.autograd.detect_anomaly),
    "ensemble by vmap": ensemble,
    "Jacobians": jacobians,
    "make_fx": traced_by_proxies,
    "aot_module, min-cut": ahead_of_time,
    "inference_mode, frozen and thawed": after_inference,
    "channels_last": in_channels_last,
    "float64 by default": in_other_default,
    "DataParallel": lambda network, x: [nn.DataParallel(network)(x)],
}


@pytest.mark.slow
@pytest.mark.parametrize("done", DONE.values(), ids=DONE)
def test_it_does_what_the_same_network_by_hand_does(
    done: Any, network: Any, hand: Any, x: torch.Tensor
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of older functions, and of anomaly detection
        pairs = zip(done(network, x), done(hand, x), strict=True)
    for ours, theirs in pairs:
        assert_close(ours.detach(), theirs.detach(), 2e-3)


def test_the_children_of_a_chain_are_the_network(network: Any, x: torch.Tensor) -> None:
    getter = importlib.import_module("torchvision.models._utils").IntermediateLayerGetter
    expected = network(x)
    assert_close(nn.Sequential(*network.children())(x), expected)
    assert nn.Sequential(*list(network.children())[:3])(x).shape == (4, 8, 8, 8)
    taps = {"block1_pool": "a", "predictions_softmax": "b"}
    found = getter(network, taps)(x)
    assert_close(found["b"], expected)
    assert found["a"].shape == (4, 8, 8, 8)


class Backend:
    """One of torch.compile that keeps the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.slow
def test_a_network_that_is_compiled_in_place_runs_compiled(network: Any, x: torch.Tensor) -> None:
    backend = Backend()
    expected = network(x)
    network.compile(backend=backend)
    assert_close(network(x), expected)
    assert len(backend.graphs) == 1 and network.is_watched()
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            copied.predictions.bias[0] = -100.0
        assert copied(x)[:, 0].max() < 1e-30
    assert_close(copy.copy(network)(x), expected)
    assert_close(network(x), expected)


def test_a_module_around_it(model: keras.Model, network: Any, x: torch.Tensor) -> None:
    """Loads into it, with memory of its own too, and lists its parameters as Keras has them."""
    outer = nn.Sequential(network, nn.Linear(10, 2))
    state = {k: 1.5 * v if v.is_floating_point() else v for k, v in outer.state_dict().items()}
    outer.load_state_dict(state, assign=True)
    assert_close(keras_gives(model, x), network(x).detach())
    with torch.no_grad():
        outer.get_parameter("0.fc1.bias").add_(1.0)
    assert_close(keras_gives(model, x), network(x).detach())
    model.get_layer("fc1").trainable = False
    frozen = {name for name, p in outer.named_parameters() if not p.requires_grad}
    assert frozen == {"0.fc1.weight", "0.fc1.bias"}


def test_in_shared_memory(model: keras.Model, network: Any, x: torch.Tensor) -> None:
    network.share_memory()
    sent = pickle.loads(ForkingPickler.dumps(network))  # as torch.multiprocessing sends it
    with torch.no_grad():
        network.fc1.bias.add_(1.0)
    expected = network(x).detach()
    assert_close(sent(x).detach(), expected)
    assert_close(keras_gives(model, x), expected)


@pytest.mark.parametrize("convert", [
    lambda n: n.to(memory_format=torch.channels_last),
    lambda n: nn.utils.convert_conv2d_weight_memory_format(n, torch.channels_last),
])  # fmt: skip
def test_kernels_in_another_order_are_still_kerass(convert: Callable[[nn.Module], Any]) -> None:
    image = keras.Input((8, 8, 4))
    x = layers.Conv2D(6, 3)(layers.DepthwiseConv2D(3, depth_multiplier=2)(image))
    model = randomise(keras.Model(image, layers.Conv2DTranspose(3, 2)(x)))
    network = to_torch(model, data_format="channels_first")
    convert(network)
    x = torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
        assert_close(network(x).permute(0, 2, 3, 1), keras_gives(model, x))


def test_keras_has_what_a_removed_parametrization_left(
    model: keras.Model, network: Any, x: torch.Tensor
) -> None:
    parametrizations.spectral_norm(network.block2_conv1)
    torch.nn.utils.parametrize.remove_parametrizations(network.block2_conv1, "weight")
    prune.l1_unstructured(network.fc1, "weight", 0.5)
    prune.remove(network.fc1, "weight")
    with torch.no_grad():
        network.block2_conv1.weight.mul_(2.0)
    expected = network(x).detach()  # which carries over what torch has replaced
    assert_close(keras_gives(model, x), expected)


def test_state_dicts_of_torch_distributed(
    model: keras.Model, network: Any, x: torch.Tensor
) -> None:
    states = importlib.import_module("torch.distributed.checkpoint.state_dict")
    state = {
        k: 1.5 * v if v.is_floating_point() else v
        for k, v in states.get_model_state_dict(network).items()
    }
    states.set_model_state_dict(network, state)
    assert_close(keras_gives(model, x), network(x).detach())


@pytest.mark.parametrize("change", [lambda d: d.enable_lora(2), lambda d: d.quantize("int8")])
def test_new_variables_of_a_layer_that_keras_runs(change: Callable[[keras.Layer], None]) -> None:
    tokens = keras.Input((3,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.LSTM(3)(layers.Dense(4, name="fc")(x)))
    network = to_torch(model)
    x = torch.tensor([[1, 2, 0]])
    network(x)
    change(model.get_layer("fc"))
    with pytest.raises(ValueError, match=r"'fc' has \d variables now, .* Call to_torch again"):
        network(x)
    assert_close(to_torch(model)(x), model(x))


def with_lstm() -> keras.Model:
    keras.utils.set_random_seed(0)
    rows = keras.Input((5, 4))
    return keras.Model(rows, layers.Dense(2)(layers.LSTM(3, name="lstm")(rows)))


def test_what_is_assigned_to_a_layer_that_keras_runs_is_kerass_too() -> None:
    model, x = with_lstm(), torch.rand(2, 5, 4)
    network = to_torch(model)
    state = {k: 1.5 * v if v.is_floating_point() else v for k, v in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    assert_close(network(x), model(x))


@pytest.mark.filterwarnings("ignore:.*stand alone")
def test_a_layer_that_keras_runs_loads_from_no_values() -> None:
    model, x = with_lstm(), torch.rand(2, 5, 4)
    network = to_torch(model)
    expected, state = network(x), {k: v.clone() for k, v in network.state_dict().items()}
    network.to("meta").load_state_dict(state, assign=True)
    assert_close(network(x), expected)
    assert_close(model(x), expected)


def test_moving_a_layer_that_keras_runs_leaves_its_state_a_buffer() -> None:
    network = to_torch(with_lstm())
    names = [[n for n, _ in network.named_parameters()], [n for n, _ in network.named_buffers()]]
    network.to("cpu")
    assert names == [
        [n for n, _ in network.named_parameters()], [n for n, _ in network.named_buffers()]
    ]  # fmt: skip
    assert len(names[1]) == 1  # of the seed of its dropout


def test_scripting_says_why_not(network: Any) -> None:
    with pytest.raises(ValueError, match=r"batch norm by Keras's rules. Use torch.jit.trace"):
        torch.jit.script(network)
    with pytest.raises(ValueError, match=r"the Keras code of 'lstm' \(LSTM\). Use torch.jit.tr"):
        torch.jit.script(to_torch(with_lstm()))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_by_hand(network: Any, x: torch.Tensor, strict: bool) -> None:
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (x,), dynamic_shapes=sizes, strict=strict)
    assert_close(program.module()(x[:3]).detach(), network(x[:3]).detach())


@pytest.mark.slow
def test_onnx_by_hand(network: Any, x: torch.Tensor) -> None:
    runtime = importlib.import_module("onnxruntime")
    content: Any = io.BytesIO()
    program: Any = torch.onnx.export(network, (x,), dynamic_shapes=({0: "batch"},), verbose=False)
    program.save(content)
    session = runtime.InferenceSession(content.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    assert_close(torch.from_numpy(found), network(x[:3]).detach())


@pytest.mark.slow
def test_a_child_that_is_compiled_in_place_runs_compiled(
    network: Any, hand: Any, x: torch.Tensor
) -> None:
    """Where torch compiles one of its own modules by itself, which torch 2.11 doesn't."""
    ours, theirs = Backend(), Backend()
    expected = network(x)
    network.block2_conv1.compile(backend=ours)
    assert_close(network(x), expected)
    hand.block2_conv1.compile(backend=theirs)
    hand(x)
    assert len(ours.graphs) == len(theirs.graphs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantization_aware_training_with_torchs_own_norms(
    network: Any, hand: Any, x: torch.Tensor
) -> None:
    """In eager mode, once the norms are replaced as docs/torch.md shows."""
    quantization = torch.ao.quantization
    found = []
    for one in (network.train(), hand.train()):
        for name, norm in list(one.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                plain.load_state_dict(norm.state_dict())
                one.set_submodule(name, plain)
        one.predictions_softmax = nn.Identity()  # torch has none for quantized numbers
        quantization.fuse_modules_qat(one, ["block2_conv1", "block2_bn1", "block2_relu1"], True)
        whole: Any = quantization.QuantWrapper(one)
        whole.qconfig = quantization.get_default_qat_qconfig("x86")
        quantization.prepare_qat(whole, inplace=True)
        whole(x).square().sum().backward()
        gradient = one.get_submodule("block1_conv1").weight.grad
        found.append([gradient, quantization.convert(whole.eval())(x)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours.detach(), theirs.detach(), 5e-2)


@pytest.mark.parametrize(("size", "given"), [((8, 12), (8, 12)), ((None, None), (9, 9))])
def test_an_error_of_the_other_layout_says_how_to_have_it(size: Any, given: tuple) -> None:
    image = keras.Input((*size, 3))
    model = keras.Model(image, layers.Conv2D(2, 3)(image))
    other = torch.rand(2, 3, *given)
    hint = r"make it by vt\.to_torch\(model, data_format='channels_{}'\)"
    with pytest.raises(RuntimeError, match=hint.format("first")):
        to_torch(model)(other)
    with pytest.raises(RuntimeError, match=hint.format("last")):
        to_torch(model, data_format="channels_first")(other.permute(0, 2, 3, 1))
    with pytest.raises(RuntimeError) as error:
        to_torch(model)(torch.rand(2, *given, 4))
    assert not hasattr(error.value, "__notes__")
    around = keras.Model(image, model(image))
    with pytest.raises(RuntimeError) as error:
        to_torch(around)(other)
    assert len(error.value.__notes__) == 1


def test_an_error_of_another_dtype_says_how_to_cast() -> None:
    image = keras.Input((8, 8, 3), dtype="bfloat16")
    model = keras.Model(image, layers.Conv2D(2, 3, dtype="bfloat16")(image))
    network, images = to_torch(model), torch.rand(2, 8, 8, 3)
    with pytest.raises(RuntimeError, match=r"torch\.float32 .*over images\.to\(torch\.bfloat16\)"):
        network(images)
    assert network(images.to(torch.bfloat16)).dtype == torch.bfloat16
