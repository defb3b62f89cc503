"""The command line: each command calls one public function."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import keras

from vggtorch import demo, files
from vggtorch.architectures import ARCHITECTURES
from vggtorch.lowering.exporting import export
from vggtorch.measuring import costs as inspection
from vggtorch.measuring.benchmark import bench
from vggtorch.models import preprocessing
from vggtorch.models import vgg as models
from vggtorch.training import advice, config, data, report
from vggtorch.training import loop as training
from vggtorch.weights import sources


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vggtorch",
        description="Transfer learning and model surgery on pretrained VGG networks.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the tutorial's three examples on real weights")
    demo.set_defaults(run=_demo)

    convert = commands.add_parser("convert", help="a checkpoint in another form")
    convert.add_argument("source", metavar="SRC", help="a checkpoint, or a weight set's name")
    convert.add_argument(
        "target", metavar="DST", help="ends in .safetensors, .pth, .bin, .weights.h5, .keras or .h5"
    )
    convert.add_argument("--architecture", choices=ARCHITECTURES, help="where it isn't plain")
    convert.set_defaults(run=_convert)

    weights = commands.add_parser("weights", help="known checkpoints: list, fetch, verify")
    weights.set_defaults(run=_weights_list)
    actions = weights.add_subparsers(metavar="ACTION")
    fetch = actions.add_parser("fetch", help="get a checkpoint, verified")
    fetch.add_argument("file", metavar="NAME", help="a checkpoint's file name in the list")
    fetch.set_defaults(run=_weights_fetch)
    verify = actions.add_parser("verify", help="hash all that is here afresh")
    verify.set_defaults(run=_weights_verify)

    inspect = commands.add_parser("inspect", help="what each layer of a network costs")
    inspect.add_argument("model", metavar="MODEL", help="an architecture's name or a .keras file")
    inspect.add_argument("--before", metavar="MODEL", help="compare: what it was before a surgery")
    inspect.add_argument("--draw", metavar="FILE", help="draw the graph as SVG, changes marked")
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser("bench", help="how fast a network runs here: by Keras, and lowered")
    bench.add_argument("model", metavar="MODEL", help="an architecture's name or a .keras file")
    bench.add_argument("--batch", type=int, default=8, help="images at a time")
    bench.add_argument("--size", type=int, default=224, help="pixels, where MODEL leaves them open")
    bench.add_argument("--repeats", type=int, default=5)
    bench.set_defaults(run=_bench)

    export = commands.add_parser("export", help="a network as ONNX or as torch.export's .pt2")
    export.add_argument("model", metavar="MODEL", help="an architecture's name or a .keras file")
    export.add_argument("path", metavar="PATH", help="ends in .onnx or .pt2")
    export.add_argument(
        "--weights", default="imagenet", help="of an architecture: a weight set or a path"
    )
    export.set_defaults(run=_export)

    predict = commands.add_parser("predict", help="the most probable classes of images")
    predict.add_argument("images", metavar="IMAGE", nargs="+")
    predict.add_argument("--model", help="a .keras file; by default a pretrained network")
    predict.add_argument("--architecture", choices=ARCHITECTURES, default="vgg16")
    predict.add_argument("--weights", default="imagenet", help="a weight set or a path")
    predict.add_argument("--top", type=int, default=5)
    predict.set_defaults(run=_predict)

    finetune = commands.add_parser("finetune", help="fine-tune on a folder of images")
    finetune.add_argument("train", metavar="DATA", help="a folder with one folder for each class")
    finetune.add_argument("validation", nargs="?", help="the same; by default part of DATA")
    finetune.add_argument("--architecture", choices=ARCHITECTURES, default="vgg16")
    finetune.add_argument("--weights", default="imagenet", help="a weight set or a path")
    finetune.add_argument(
        "--advise",
        choices=("similar", "different"),
        help="take the rules of thumb for images that are similar to ImageNet's, or different",
    )
    config.add_arguments(finetune)
    finetune.set_defaults(run=_finetune)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    demo.run()


def _convert(arguments: argparse.Namespace) -> None:
    mapped = models.convert(arguments.source, arguments.target, arguments.architecture)
    width = max(len(f"{name} {shape}") for name, shape, _, _ in mapped)
    for old, old_shape, new, new_shape in mapped:
        print(f"{f'{old} {old_shape}':{width}} -> {new} {new_shape}")


def _weights_list(arguments: argparse.Namespace) -> None:
    for known in sources.KNOWN.values():
        places = [str(path) for path in sources.here(known)] or ["not here"]
        print(f"{known.weight_set:9} {known.architecture:9} {known.file:42} {', '.join(places)}")


def _weights_fetch(arguments: argparse.Namespace) -> None:
    print(sources.fetch(arguments.file))


def _weights_verify(arguments: argparse.Namespace) -> None:
    found = sources.verify()
    for path, wrong in found.items():
        print(wrong or f"{path} is whole")
    damaged = sum(wrong is not None for wrong in found.values())
    if damaged:
        raise ValueError(f"{damaged} of {len(found)} files are damaged")


def _inspect(arguments: argparse.Namespace) -> None:
    model = models.describe(arguments.model)
    before = models.describe(arguments.before) if arguments.before else None
    if before is None:
        print(inspection.inspect(model))
    else:
        print(inspection.compare(before, model))
    if arguments.draw:
        with files.atomic(arguments.draw) as temporary:
            temporary.write_text(inspection.draw(model, before))


def _bench(arguments: argparse.Namespace) -> None:
    model = models.describe(arguments.model)
    print(bench(model, arguments.batch, size=arguments.size, repeats=arguments.repeats))


def _export(arguments: argparse.Namespace) -> None:
    if arguments.model in ARCHITECTURES:
        model = models.constructor(arguments.model)(weights=arguments.weights)
    else:
        model = models.describe(arguments.model)
    export(model, arguments.path)
    print(f"Wrote {arguments.path}.")


def _predict(arguments: argparse.Namespace) -> None:
    categories = None
    if arguments.model:
        model = keras.saving.load_model(arguments.model)
        names = Path(arguments.model).with_name("classes.txt")  # as `finetune` leaves it
        if names.is_file():
            categories = names.read_text().splitlines()
    else:
        model = models.constructor(arguments.architecture)(weights=arguments.weights)
    probabilities = model.predict(preprocessing.preprocess(arguments.images, model), verbose=0)
    best = preprocessing.decode_predictions(probabilities, arguments.top, categories)
    for image, classes in zip(arguments.images, best, strict=True):
        print(image)
        for _, category, probability in classes:
            print(f"  {probability:6.1%}  {category}")


def _settings(arguments: argparse.Namespace) -> config.TrainConfig:
    """What was asked for on the command line, above the plan where there is one."""
    options = config.options_from(arguments)
    if not arguments.advise:
        return config.TrainConfig(**options)
    default = config.TrainConfig()
    folder = data.read_folder(
        data.find_splits(Path(arguments.train))[0],
        options.get("image_size", default.image_size),
        broken=options.get("broken", default.broken),
    )
    plan = advice.advise(len(folder), len(folder.classes), arguments.advise)
    print(plan)
    return dataclasses.replace(plan, **options)


def _finetune(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    settings = _settings(arguments)
    size = settings.image_size
    model = models.constructor(arguments.architecture)(
        weights=arguments.weights, include_top=False, input_shape=(size, size, 3)
    )
    history = training.finetune(model, arguments.train, arguments.validation, settings)
    if PartialState().is_main_process:
        run = Path(settings.folder)
        report.save_trained(history, run)
        report.write_report(history, run / "report.html")
        print(f"Wrote {run / 'model.keras'}, {run / 'README.md'} and {run / 'report.html'}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 if all went well."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"vggtorch: {error}", file=sys.stderr)
        return 1
    return 0
