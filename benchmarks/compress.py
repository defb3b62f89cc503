"""VGG16 compressed 2, 3 and 4 times: what it still sees, how fast it is, what the peers' ways give.

    python benchmarks/compress.py match             compress; cosine to the original's maps by pool
    python benchmarks/compress.py probe DATA        accuracy of linear probes on CIFAR-10
    python benchmarks/compress.py speed             milliseconds at batch 1 and 8
    python benchmarks/compress.py peers             other ways, same images, budget and training
    python benchmarks/compress.py networks DATA     ResNet50 and MobileNetV2, shortly trained

`match` leaves the models in `--models`, where the others find them. Layers are
fitted to 250 crops of `--photographs` (a folder, searched through); cosines are those of crops of
the photographs in `--test`. By default both come out of the packages scikit-image and scikit-learn.
DATA holds `train/<class>/*.jpg` and `test/<class>/*.jpg`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import numpy as np
import torch
import torch.nn.functional as F
from replacement import (
    ACCURACY,
    accuracy,
    cifar10,
    cosines,
    maps,
    photographs,
    pooled,
    preprocessed,
    probed,
    random_crops,
    row,
    speed,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.compression.choice import Option, choice_of
from vggtorch.compression.deletion import pairs_of
from vggtorch.compression.factors import METHODS, Factors, multiply_adds, ranks_for
from vggtorch.compression.fitting import closed_forms_, options_of
from vggtorch.compression.joint import train_
from vggtorch.compression.networks import networks_of
from vggtorch.compression.photographs import split
from vggtorch.compression.progress import open_progress
from vggtorch.compression.resuming import Notebook
from vggtorch.compression.work import Work

HEADER = f"{'cosine after block':<34}" + "".join(f"{b:>8}" for b in range(1, 6))


def match(args: argparse.Namespace, model: keras.Model, shown: Any, unseen: Any) -> None:
    """Compress to each budget; the cosines are those of photographs that nothing has seen."""
    args.models.mkdir(parents=True, exist_ok=True)
    for times in args.times:
        begun = time.monotonic()
        small, found = vt.compress(
            model, times, shown, by=args.by, seconds=args.seconds, seed=args.seed
        )
        took = time.monotonic() - begun
        print(found)
        print(HEADER)
        name = f"{times:g} times, {found.times:.2f} in {args.by}"
        row(name, cosines(model, small, unseen), f"{took:.0f} s")
        small.save(args.models / f"vgg16-{times:g}.keras")


def _results(args: argparse.Namespace) -> dict[str, keras.Model]:
    """What `match` has left."""
    paths = {f"{times:g} times": args.models / f"vgg16-{times:g}.keras" for times in args.times}
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise SystemExit(f"{missing} aren't there: run `match` with the same --models first.")
    return {name: keras.saving.load_model(path) for name, path in paths.items()}


def probe(args: argparse.Namespace, model: keras.Model) -> None:
    """Logistic regression on the mean and maximum of the channels of blocks 4 and 5.

    By network and block.
    """
    (x, labels), (x_test, labels_test) = cifar10(args.data, args.each)
    print(f"{'':<20}{'block':>6}{ACCURACY}")
    original: dict[str, np.ndarray] = {}
    for name, network in {"original": model, **_results(args)}.items():
        blocks = ["block4_pool", "block5_pool"]
        vectors = (map(pooled, maps(network, part, blocks)) for part in (x, x_test))
        for block, train, test in zip(blocks, *vectors, strict=True):
            right, _ = probed((train, labels), (test, labels_test))
            columns = accuracy(right, original.setdefault(block, right))
            print(f"{name:<20}{block[5]:>6}{columns}", flush=True)


# Other ways


def peers(args: argparse.Namespace, model: keras.Model, shown: Any, unseen: Any) -> None:
    """Each way on the same images and budget, before and after the same training."""
    pixels = torch.from_numpy(unseen).permute(0, 3, 1, 2)
    print(f"{'cosine at block5_pool':<50}{'closed form':>12}{'trained':>9}{'steps':>7}")
    for times in args.times:
        for name, way in ((name, WAYS[name]) for name in args.ways):
            images = split(model, shown, args.seed)
            networks = networks_of(model, images, ())
            with open_progress() as progress:
                pairs = pairs_of(model, networks.sites, networks.depthwise, networks.taps)
                notes = Notebook(None, model, images.shown, {})
                work = Work(networks, networks, images, args.seed, notes, progress, pairs=pairs)
                result = way(work, times)
                cost = multiply_adds_of(result, pixels[:1])
                before = last_cosine(networks.original, result, pixels)
                ends = [
                    p for p in result.parameters()
                    if not any(p is q for q in networks.original.parameters())
                ]  # fmt: skip
                for p in ends:
                    p.requires_grad_(True)
                state = train_(
                    work,
                    lambda x, result=result: list(result(x))[-1:],  # type: ignore
                    lambda x, networks=networks: networks.maps(x)[-1:],  # type: ignore
                    ends,
                    args.steps,
                    args.seconds,
                )
            after = last_cosine(networks.original, result, pixels)
            label = f"{name}, {networks.total / cost:.2f} times"
            print(f"{label:<50}{before:>12.4f}{after:>9.4f}{state.step:>7}", flush=True)


def multiply_adds_of(network: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops() // 2


def last_cosine(original: nn.Module, result: nn.Module, images: torch.Tensor) -> float:
    found = []
    with torch.no_grad():
        for x in images.split(8):
            x = x.contiguous(memory_format=torch.channels_last)
            a, b = (list(network(x))[-1].flatten(1) for network in (original, result))
            found.append(F.cosine_similarity(a, b))
    return float(torch.cat(found).mean())


def as_compress(work: Work, times: float) -> nn.Module:
    """As `compress` does it."""
    chosen, _ = choice_of(work, options_of(work, list(METHODS)), times)
    closed_forms_(work, chosen)
    return work.networks.work


def uniform(work: Work, times: float, method: str) -> nn.Module:
    """One share of its cost for each layer, the same closed forms."""
    closed_forms_(work, uniform_options(work, times, method))
    return work.networks.work


def uniform_options(work: Work, times: float, method: str) -> dict[str, Option]:
    """The options of one method that leave each layer the same share, to the budget."""
    sites = work.networks.sites
    budget = work.networks.total / times
    fixed = work.networks.total - sum(site.multiply_adds for site in sites)
    low, high, best = 0.01, 1.0, {}
    for _ in range(20):
        share = (low + high) / 2
        options = {}
        for site in sites:
            ranks = ranks_for(site, method, share)[:1]
            costs = [multiply_adds(site, method, r) for r in ranks]
            stay = Option(None, (), site.multiply_adds, 0.0)
            options[site.name] = Option(method, ranks[0], costs[0], 0.0) if ranks else stay
        if fixed + sum(option.cost for option in options.values()) <= budget:
            low, best = share, options
        else:
            high = share
    return best


def plain_svd(work: Work, times: float) -> nn.Module:
    """The kernels' own singular vectors, uniform shares, no image looked at."""
    for site in work.networks.sites:
        option = uniform_options(work, times, "low rank")[site.name]
        if option.method is None:
            continue
        old = getattr(work.networks.original, site.child)
        u, s, v = torch.linalg.svd(old.weight.flatten(1), full_matrices=False)
        (rank,) = option.ranks
        down = (s[:rank, None] * v[:rank]).unflatten(1, old.weight.shape[1:])
        factors = Factors.of("low rank", [down, u[:, :rank, None, None]], old.bias)
        work.networks.install_({site: factors.module(site)})
    return work.networks.work


def pruned(work: Work, times: float, importance: str, *, ranked: str) -> nn.Module:
    """Channels deleted by Torch-Pruning, which scores them anew after each sixtieth of all.

    Args:
        work: the network, the images and the budget's whole.
        times: how many times less the result costs.
        importance: "magnitude", or "taylor" by the gradients of the last map's square, relative to
            its size, because there are no labels.
        ranked: "layer by layer", the same share of each, or "all together".
    """
    import torch_pruning as tp

    network = copy.deepcopy(work.networks.original)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    kinds = {
        "magnitude": tp.importance.MagnitudeImportance,
        "taylor": tp.importance.TaylorImportance,
    }
    sites = work.networks.sites
    pruner = tp.pruner.MagnitudePruner(
        network, work.images.held_out[:1], kinds[importance](), pruning_ratio=0.95,
        iterative_steps=60, global_pruning=ranked == "all together", max_pruning_ratio=0.9,
        ignored_layers=[getattr(network, sites[-1].child)],  # whose channels are compared
    )  # fmt: skip
    fixed = work.networks.total - sum(site.multiply_adds for site in sites)

    def cost() -> int:
        kernels = (getattr(network, site.child).weight.numel() for site in sites)
        return fixed + sum(site.positions * n for site, n in zip(sites, kernels, strict=True))

    for step in range(60):
        if importance == "taylor":
            network.zero_grad()
            for i in range(2):
                y = network(work.fitted[(2 * step + i) % len(work.fitted)])[-1].flatten(1)
                (y.square().sum(1) / y.detach().square().sum(1)).sum().backward()
        for group in pruner.step(interactive=True):
            if cost() <= work.networks.total / times:
                return network
            group.prune()
    raise SystemExit(f"Torch-Pruning got no further than {work.networks.total / cost():.2f} times.")


WAYS: dict[str, Callable[[Work, float], nn.Module]] = {
    "plain SVD, no images": plain_svd,
    "low rank, uniform": partial(uniform, method="low rank"),
    "separated, uniform": partial(uniform, method="separated"),
    "compress": as_compress,
    **{
        f"Torch-Pruning, {importance}, {ranked}": partial(
            pruned, importance=importance, ranked=ranked
        )
        for importance in ("magnitude", "taylor")
        for ranked in ("layer by layer", "all together")
    },
}


# Other networks


def other_networks(args: argparse.Namespace) -> None:
    """Random weights, made something by a short training on the images of DATA."""
    from keras import applications

    (x, labels), (x_test, labels_test) = cifar10(args.data, args.each)
    x, x_test = x / 60, x_test / 60  # as the networks' own preprocessing has it, about
    for name in args.networks:
        keras.utils.set_random_seed(0)
        make = getattr(applications, name)
        base = make(weights=None, include_top=False, input_shape=(96, 96, 3), pooling="avg")
        for layer in base.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = 0.9  # so that its statistics are known after so few steps
        model = keras.Model(base.inputs, keras.layers.Dense(10, activation="softmax")(base.output))
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        vt.accelerate_(model)
        model.fit(x, labels, batch_size=32, epochs=args.epochs, verbose=2)
        print(f"{name}: accuracy {model.evaluate(x_test, labels_test, verbose=0)[1]:.3f}")
        shown = x[
            torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed)).numpy()
        ]
        for times in args.times:
            _, found = vt.compress(
                base, times, shown[: args.images], methods=args.methods, seconds=args.seconds,
                steps=args.steps,
            )  # fmt: skip
            methods = Counter(row.method for row in found.layers)
            print(f"{found}\n{name}, {times:g} asked, {found.times:.2f} had; {methods}")
            print(f"{found.seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    questions = ["match", "probe", "speed", "peers", "networks"]
    parser.add_argument("question", choices=questions)
    parser.add_argument("data", type=Path, nargs="?", help="CIFAR-10 as folders")
    parser.add_argument("--models", type=Path, default=Path("compressed"), help="folder of results")
    parser.add_argument("--times", type=float, nargs="+", help="by default 2 3 4")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="for peers"
    )
    parser.add_argument("--by", default="multiply-adds", help="or seconds")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to fit to")
    parser.add_argument("--test", type=Path, help="folder of photographs that it doesn't see")
    parser.add_argument("--images", type=int, default=250, help="crops of 224x224 to fit to")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for each result")
    parser.add_argument("--steps", type=int, default=300, help="of training, for peers, networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3, help="for networks")
    parser.add_argument(
        "--each", type=int, nargs=2, default=(200, 100), help="images of each class"
    )
    parser.add_argument("--repeats", type=int, default=10, help="for speed")
    names = ["ResNet50", "MobileNetV2"]
    every = [*METHODS, "channels", "composition"]
    parser.add_argument("--methods", nargs="+", choices=every, default=every, help="for networks")
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    args.times = args.times or ([1.5, 2] if args.question == "networks" else [2, 3, 4])
    if args.question in ("probe", "networks") and args.data is None:
        parser.error(f"{args.question} needs DATA, a folder with train/<class>/*.jpg")
    if (args.photographs is None) != (args.test is None):
        parser.error("--photographs and --test go together, so that no photograph is in both")
    model = vt.VGG16(weights="oxford", include_top=False)
    print(harness.header(model.get_layer("block1_conv1").kernel.value.device))
    if args.question == "networks":
        other_networks(args)
        return
    if args.question == "probe":
        probe(args, model)
        return
    seen = photographs(args.photographs, test=False)
    unseen = preprocessed(random_crops(photographs(args.test, test=True), 40, seed=1))
    shown = preprocessed(random_crops(seen, args.images))
    print(f"{args.images} crops of {len(seen)} photographs; tested on {len(unseen)} of others")
    if args.question == "speed":
        networks = {"original": model, **_results(args)}
        for batch in (1, 8):
            speed(networks, np.resize(unseen, (batch, *unseen.shape[1:])), args.repeats, "original")
        return
    (match if args.question == "match" else peers)(args, model, shown, unseen)


if __name__ == "__main__":
    main()
