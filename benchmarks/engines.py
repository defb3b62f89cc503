"""Speed of inference beside the engines that people export to, each in a process of its own.

    python benchmarks/engines.py                                  VGG16, also with batch norm
    python benchmarks/engines.py --networks resnet50 mobilenet_v2
    python benchmarks/engines.py --networks oxford --dtypes int8    fewer bits, and likeness
    python benchmarks/engines.py --batches 8 --profile            OpenVINO's own times by layer
    python benchmarks/engines.py --sizes 64 128 512 --batches 1     VGG without its classifier
    python benchmarks/engines.py --warm 0 --batches 1             the first call after a pause
    python benchmarks/engines.py --warm 0 --batches 1 --bind      OpenMP's threads bound to cores

Ours, torchvision (channels-last; compiled), ONNX Runtime and OpenVINO on what `vt.export` writes,
and Keras on JAX and on torch. All have the same weights, and must give the same outputs before they
are timed. The processes run in turn with a rest between them, because threads that one engine
leaves spinning slow the next. What is timed is a call among others in a row, as a busy process
makes them, unless `--warm 0` asks for the first one after the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# Random weights, but for "oxford": VGG16's convolutions with those weights, on photographs.
NETWORKS = ("vgg11", "vgg13", "vgg16", "vgg19", "vgg16_bn", "resnet50", "mobilenet_v2", "oxford")
# How far an output may be from ours, as a share of the largest.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "int8": 0.5}
OURS = "vggtorch"
HEADER = "| | ms | quartiles | times ours |\n|-|-|-|-|"

# What an engine gives: a function that is timed, and one that turns its result into numpy.
Engine = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]


# The engines, each in its own process. What they import is imported there alone.


def vggtorch(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """The network of `to_torch`, in bfloat16 by torch's own `.bfloat16()`."""
    torch, network = _ours(place, dtype)
    images = torch.from_numpy(x).to(getattr(torch, dtype))
    return lambda: network(images), _from_torch


def vggtorch_compiled(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """The same through torch.compile, with frozen weights."""
    torch, network = _ours(place, dtype)
    images = torch.from_numpy(x).to(getattr(torch, dtype))
    compiled = torch.compile(network, options={"freezing": True}, dynamic=False)
    return lambda: compiled(images), _from_torch


def vggtorch_engine(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """What `optimize_for_inference` gives."""
    return _engine(place, x, dtype, winograd=False)


def vggtorch_winograd(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """The same with Winograd's convolutions."""
    return _engine(place, x, dtype, winograd=True)


def vggtorch_int8(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """torchao's PT2E with the X86 quantizer on `to_torch`'s network, as docs/speed.md has it."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    _, network = _ours(place, "float32")
    images = torch.from_numpy(x)
    any_batch = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(network, (images[[0, 0]],), dynamic_shapes=any_batch).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    for shown in torch.from_numpy(np.load(place / "calibration.npy")).split(4):
        prepared(shown)
    compiled = torch.compile(convert_pt2e(prepared), options={"freezing": True})
    return lambda: compiled(images), _from_torch


def torchvision_channels_last(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """torchvision's network with the same weights; VGG alone has the same layers as Keras's."""
    torch, twin = _torchvision(place, dtype)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).to(getattr(torch, dtype))
    return lambda: twin(images), _from_torch


def torchvision_compiled(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """The same through torch.compile, with frozen weights."""
    torch, twin = _torchvision(place, dtype)
    images = torch.from_numpy(x).permute(0, 3, 1, 2).to(getattr(torch, dtype))
    compiled = torch.compile(twin, options={"freezing": True}, dynamic=False)
    return lambda: compiled(images), _from_torch


def onnx_runtime(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """ONNX Runtime's CPU provider, which has no convolution in bfloat16."""
    import onnxruntime

    if dtype != "float32":
        raise NotImplementedError("its CPU provider has float32 alone here")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    session = onnxruntime.InferenceSession(place / "model.onnx", options)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0], np.asarray


def openvino(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """OpenVINO; int8 by NNCF, calibrated on the same images as ours."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(place / "model.onnx")
    model.reshape(list(x.shape))
    if dtype == "int8":
        import nncf

        images = [image[None] for image in np.load(place / "calibration.npy")]
        model.reshape([-1, *x.shape[1:]])
        model = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
        model.reshape(list(x.shape))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": _threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16"}.get(dtype, "f32"),
            "PERF_COUNT": "ENGINES_PROFILE" in os.environ,
        },
    )
    request = compiled.create_infer_request()

    def profile() -> None:
        for row in request.profiling_info:
            if row.real_time.total_seconds() > 1e-5:
                seconds = row.real_time.total_seconds()
                print(
                    f"{seconds * 1e3:9.2f} ms  {row.exec_type:<24}{row.node_name}", file=sys.stderr
                )

    def call() -> Any:
        request.infer([x], share_inputs=True, share_outputs=True)
        return request

    def result(_: Any) -> np.ndarray:
        if "ENGINES_PROFILE" in os.environ:
            profile()
        return np.array(request.get_output_tensor(0).data)

    return call, result


def keras_on_jax(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """Keras's graph in one jitted function, as its `predict` has it."""
    import jax
    import keras

    model = _keras(keras, place, dtype)
    variables = (
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
    )
    run = jax.jit(lambda *given: model.stateless_call(*given, training=False)[0])
    images = jax.numpy.asarray(x)
    return lambda: run(*variables, images).block_until_ready(), lambda y: np.asarray(y, "float32")


def keras_on_torch(place: Path, x: np.ndarray, dtype: str) -> Engine:
    """Keras as it is, under no_grad."""
    import keras
    import torch

    model = _keras(keras, place, dtype)
    images = torch.from_numpy(x)
    return lambda: model(images, training=False), _from_torch


ENGINES: dict[str, tuple[str, Callable[[Path, np.ndarray, str], Engine]]] = {
    OURS: ("torch", vggtorch),
    "vggtorch, compiled": ("torch", vggtorch_compiled),
    "vggtorch, engine": ("torch", vggtorch_engine),
    "vggtorch, Winograd": ("torch", vggtorch_winograd),
    "vggtorch, int8": ("torch", vggtorch_int8),
    "torchvision, channels-last": ("torch", torchvision_channels_last),
    "torchvision, compiled": ("torch", torchvision_compiled),
    "ONNX Runtime": ("torch", onnx_runtime),
    "OpenVINO": ("torch", openvino),
    "Keras on JAX": ("jax", keras_on_jax),
    "Keras on torch": ("torch", keras_on_torch),
}
# torchvision's ResNet50 and MobileNetV2 aren't Keras's: strides and padding differ.
IN_INT8 = (OURS, "vggtorch, int8", "OpenVINO")


def _threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def _from_torch(y: Any) -> np.ndarray:
    return y.float().numpy()


def _ours(place: Path, dtype: str) -> tuple[Any, Any]:
    import vggtorch as vt  # isort: skip  (before keras)
    import keras
    import torch

    torch.set_grad_enabled(False)
    network = vt.to_torch(_keras(keras, place, "float32"), share=False).eval()
    return torch, network.to(getattr(torch, dtype))


def _engine(place: Path, x: np.ndarray, dtype: str, *, winograd: bool) -> Engine:
    import vggtorch as vt  # isort: skip  (before keras)
    import keras
    import torch

    model = _keras(keras, place, "float32")
    run = vt.optimize_for_inference(model, dtype=getattr(torch, dtype), winograd=winograd)
    images = torch.from_numpy(x)
    return lambda: run(images), _from_torch


def _torchvision(place: Path, dtype: str) -> tuple[Any, Any]:
    import torch
    import torchvision

    torch.set_grad_enabled(False)
    if not (place / "model.pth").exists():
        raise NotImplementedError("it has no such network: strides, padding or head differ")
    name = (place / "name").read_text()
    twin = getattr(torchvision.models, name)(init_weights=False)
    weights = torch.load(place / "model.pth")
    if not any(key.startswith("classifier") for key in weights):
        twin.avgpool, twin.classifier = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Identity()
    twin.load_state_dict(weights)
    twin = twin.eval().to(getattr(torch, dtype), memory_format=torch.channels_last)
    return torch, twin


def _keras(keras: Any, place: Path, dtype: str) -> Any:
    """The model; in bfloat16 by Keras's policy for weights and sums in bfloat16."""
    keras.config.set_dtype_policy(dtype)
    model = keras.models.model_from_json((place / "model.json").read_text())
    model.set_weights([w.astype("float32") for w in np.load(place / "w.npz").values()])
    if keras.backend.backend() == "torch":
        import torch

        torch.set_grad_enabled(False)
    return model


def serve(name: str, place: Path, dtype: str) -> None:
    """The life of an engine's process: set up, show an output, then time one call for each line.

    A line says for how many seconds it shall have been called again and again.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the error stream
    x = np.load(place / "x.npy")
    try:
        call, to_numpy = ENGINES[name][1](place, x, dtype)
        call()
        np.save(place / f"{os.getpid()}.npy", to_numpy(call()).reshape(len(x), -1))
    except Exception as error:
        print(json.dumps({"error": str(error).strip().splitlines()[0][:120]}), file=answers)
        return
    print(json.dumps({"output": str(place / f"{os.getpid()}.npy")}), file=answers)
    for line in sys.stdin:
        enough = time.perf_counter() + float(line)
        while True:
            begun = time.perf_counter()
            call()
            ended = time.perf_counter()
            if ended >= enough:
                break
        print(json.dumps({"seconds": ended - begun}), file=answers)


# The process that asks them


def prepare(name: str, place: Path, size: int) -> None:
    """Write a network, with random weights and statistics that keep its numbers in range.

    VGG's classifier takes maps of 224 pixels: at other sizes the maps' means stand for it.
    """
    import vggtorch as vt  # isort: skip  (before keras)
    import keras

    keras.utils.set_random_seed(0)
    options: dict[str, Any] = {"weights": None, "input_shape": (size, size, 3)}
    if name == "oxford":
        model = vt.VGG16(weights="oxford", include_top=False, input_shape=(size, size, 3))
    elif name.startswith("vgg"):
        options |= {"classifier_activation": None, "batch_norm": name.endswith("_bn")}
        if size != 224:
            options |= {"include_top": False, "pooling": "avg"}
        model = getattr(vt, name.removesuffix("_bn").upper())(**options)
    else:
        make = {"resnet50": "ResNet50", "mobilenet_v2": "MobileNetV2"}[name]
        model = getattr(keras.applications, make)(**options, classifier_activation=None)
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(random.normal(0, 0.1, shape))
            layer.moving_variance.assign(random.uniform(0.5, 1.5, shape))
    (place / "name").write_text(name)
    (place / "model.json").write_text(model.to_json())
    np.savez(place / "w.npz", *model.get_weights())
    vt.export(model, place / "model.onnx")
    if name.startswith("vgg"):
        vt.save_weights(model, place / "model.pth")
    np.save(place / "calibration.npy", images_of(name, 32, size, test=False))


def images_of(name: str, count: int, size: int, *, test: bool) -> np.ndarray:
    """Photographs for weights that know them, noise for others."""
    if name == "oxford":
        from replacement import photographs, preprocessed, random_crops

        return preprocessed(random_crops(photographs(None, test=test), count, seed=int(test)))
    shape = (count, size, size, 3)
    return np.random.default_rng(int(test)).normal(size=shape).astype("float32")


@contextmanager
def engine(
    name: str, place: Path, dtype: str, threads: int, warm: float
) -> Iterator[Callable[[], dict]]:
    """A function that asks an engine's process for its next line."""
    environment = os.environ | {
        "KERAS_BACKEND": ENGINES[name][0],
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }
    if "ENGINES_BIND" in os.environ:  # in this process it would bind all that it starts to one
        environment["OMP_PROC_BIND"] = "true"
    if ENGINES[name][0] == "jax":
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=" + str(threads > 1).lower()
    command = [sys.executable, __file__, "--serve", name, "--place", str(place), "--dtypes", dtype]
    process = subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    first = True

    def ask() -> dict:
        nonlocal first
        if not first:
            stdin.write(f"{warm}\n")
            stdin.flush()
        first = False
        return json.loads(stdout.readline() or '{"error": "its process ended"}')

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def compare(
    names: list[str],
    place: Path,
    dtype: str,
    threads: int,
    *,
    repeats: int,
    rest: float,
    warm: float,
) -> dict[str, list[float]]:
    """Seconds of each engine in each turn, of those that can and agree with ours."""
    with ExitStack() as stack:
        seconds: dict[str, list[float]] = {}
        asking: dict[str, Callable[[], dict]] = {}
        expected = None
        for name in names:
            its = "float32" if (dtype, name) == ("int8", OURS) else dtype
            ask = stack.enter_context(engine(name, place, its, threads, warm))
            answer = ask()
            if "error" in answer:
                print(f"{name} is left out: {answer['error']}", flush=True)
                continue
            output = np.load(answer["output"])
            expected = output if expected is None else expected
            error = np.abs(output - expected).max() / np.abs(expected).max()
            if not error <= TOLERANCE[dtype]:
                raise RuntimeError(f"{name} differs by {error:.1e} of the largest output")
            if dtype == "int8" and name != OURS:
                norms = np.linalg.norm(output, axis=1) * np.linalg.norm(expected, axis=1)
                likeness = ((output * expected).sum(1) / norms).mean()
                print(f"{name}: cosine to float32 {likeness:.4f}", flush=True)
            asking[name], seconds[name] = ask, []
        for _ in range(repeats):
            for name, ask in asking.items():
                time.sleep(rest)
                seconds[name].append(ask()["seconds"])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["vgg16", "vgg16_bn"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[224], help="pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rest", type=float, default=0.15, help="seconds before each turn")
    parser.add_argument(
        "--warm",
        type=float,
        default=0.3,
        help="seconds of calls in a row; the last counts",
    )
    parser.add_argument("--out", type=Path, help="JSON lines of what was measured are added here")
    parser.add_argument(
        "--bind", action="store_true", help="OMP_PROC_BIND=true in the engines' processes"
    )
    parser.add_argument("--profile", action="store_true", help="OpenVINO's times by layer")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.place, args.dtypes[0])
        return
    if "oxford" in args.networks and args.sizes != [224]:
        parser.error("oxford's photographs are cut to 224 pixels: leave --sizes out")
    if args.profile:
        os.environ["ENGINES_PROFILE"] = "1"
    if args.bind:
        os.environ["ENGINES_BIND"] = "1"

    turns = {"repeats": args.repeats, "rest": args.rest, "warm": args.warm}
    import harness
    import torch

    print(harness.header(torch.device("cpu")), flush=True)
    for network in args.networks:
        for size in args.sizes:
            with tempfile.TemporaryDirectory() as folder:
                place = Path(folder)
                prepare(network, place, size)
                for dtype in args.dtypes:
                    names = [
                        n for n in args.engines
                        if (n in IN_INT8 if dtype == "int8" else n != "vggtorch, int8")
                    ]  # fmt: skip
                    for batch in args.batches:
                        np.save(place / "x.npy", images_of(network, batch, size, test=True))
                        for threads in args.threads:
                            found = compare(names, place, dtype, threads, **turns)
                            title = f"{network}, {size} pixels, batch {batch}, {dtype}"
                            print(f"\n**{title}, {threads} threads**\n\n{HEADER}")
                            print("\n".join(harness.table(found, OURS)), "\n", flush=True)
                            if args.out:
                                medians = {n: statistics.median(s) for n, s in found.items()}
                                line = [network, size, batch, dtype, threads, medians]
                                with args.out.open("a") as out:
                                    print(json.dumps(line), file=out)


if __name__ == "__main__":
    main()
