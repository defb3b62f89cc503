"""The command line: each command calls one public function.

Nothing heavy is imported before a command runs: vggtorch's names are lazy, and so are the imports
inside the commands.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import vggtorch as vt
from vggtorch import commands, files, paths, training_commands
from vggtorch.options import (
    ArchitectureName,
    ImageSize,
    Model,
    Weights,
    as_options,
    is_given,
    wrong_usage,
)
from vggtorch.text import LONGEST_MESSAGE, table, terminal_width, visible, visible_lines
from vggtorch.training import Interrupted, Terminated
from vggtorch.weight_sets import WEIGHT_SETS

Cost = Literal["multiply-adds", "seconds"]

app = typer.Typer(
    help="Transfer learning and model surgery on pretrained VGG networks.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
weights_app = typer.Typer(rich_markup_mode=None)
app.add_typer(weights_app, name="weights")


def _examples(*commands: str) -> str:
    """Examples under the help of a command."""
    # The backspace tells typer to leave the lines as they are.
    return "\b\nExamples:\n" + "\n".join(f"  vggtorch {command}" for command in commands)


def _show(text: object) -> None:
    """Print what may hold names from files: nothing in it is an instruction to the terminal."""
    print(visible_lines(text))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vggtorch {vt.__version__}")
        raise typer.Exit


@app.callback(epilog=_examples("demo", "inspect vgg16", "finetune --help"))
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[  # taken out by `main`, so that it may stand anywhere
        bool, typer.Option("--debug", help="Show where in the code an error comes from.")
    ] = False,
) -> None: ...


@app.command("demo", epilog=_examples("demo", "demo --page what-layers-bring.html"))
def run_demo(
    page: Annotated[
        str, typer.Option(metavar="FILE", help="Where the page with its pictures is written.")
    ] = "vggtorch-demo.html",
) -> None:
    """What pretrained layers bring: the tutorial on real weights and photographs, measured."""
    paths.check_out(page, (".html",), "page")
    from vggtorch import demo

    demo.run(page)


@app.command(
    epilog=_examples(
        "convert oxford vgg16_features.pth",
        "convert weights.pth vgg11.safetensors --architecture vgg11",
    )
)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, a whole model, or a weight set.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DST", help="Ends in .safetensors, .pth, .bin, .weights.h5, .keras or .h5."
        ),
    ],
    architecture: Annotated[
        ArchitectureName | None, typer.Option(help="Whose weights they are, where it isn't plain.")
    ] = None,
) -> None:
    """Write a checkpoint in another form; prints which tensor became which."""
    paths.check_weights(source, "")
    paths.check_out(target, paths.CONVERTED, "")
    from vggtorch import models

    mapped = models.convert(source, target, architecture)
    rows = [(f"{old} {shape}", f"-> {new} {made}") for old, shape, new, made in mapped]
    _show(table(rows, 1 if terminal_width() else 2, terminal_width()))


@weights_app.callback(
    invoke_without_command=True,
    epilog=_examples("weights", "weights fetch vgg16-397923af.pth", "weights verify"),
)
def _weights(context: typer.Context) -> None:
    """Known checkpoints: list them (also without COMMAND), fetch one, verify what is here."""
    if context.invoked_subcommand is None:
        list_weights()


@weights_app.command("list")
def list_weights() -> None:
    """List the known checkpoints, and where they are on this machine."""
    from vggtorch import weights

    rows = []
    for known in weights.PUBLISHED.values():
        places = ", ".join(map(str, weights.local_copies(known))) or "not here"
        rows.append((known.weight_set, known.architecture, known.file, places))
    _show(table(rows, 4, terminal_width()))


@weights_app.command("fetch", epilog=_examples("weights fetch vgg16-397923af.pth"))
def fetch_weights(
    file: Annotated[str, typer.Argument(metavar="NAME", help="A file's name in the list.")],
) -> None:
    """Get a checkpoint from where it is published, verified; prints its path."""
    from vggtorch import weights

    _show(weights.fetch(file))


@weights_app.command("verify")
def verify_weights() -> None:
    """Hash all checkpoints that are here afresh."""
    from vggtorch import weights

    found = weights.verify()
    for path, wrong in found.items():
        _show(wrong or f"{path} is whole")
    damaged = sum(wrong is not None for wrong in found.values())
    if damaged:
        raise ValueError(f"{damaged} of {len(found)} files are damaged")


@app.command(
    epilog=_examples(
        "inspect vgg16",
        "inspect smaller.keras --before vgg16 --draw smaller.svg",
    )
)
def inspect(
    model: Model,
    before: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare: what it was before a surgery.")
    ] = None,
    draw: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the graph as SVG, changes marked.")
    ] = None,
) -> None:
    """What each layer of a network costs."""
    for name in (model,) if before is None else (model, before):
        paths.check_model(name)
    if draw is not None:
        paths.check_out(draw, (".svg",), "draw")
    from vggtorch.models import model_from_name

    network = model_from_name(model)
    original = None if before is None else model_from_name(before)
    found = vt.inspect(network) if original is None else vt.compare(original, network)
    _show(found.as_text(terminal_width()))
    if draw is not None:
        files.write_text(draw, vt.draw(network, original))


@app.command(
    epilog=_examples(
        "compress run/model.keras photos --times 2 --out small.keras",
        "compress vgg16 photos --weights oxford --no-top --times 3 --out small.keras",
    )
)
def compress(
    context: typer.Context,
    model: Model,
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Images, in folders at any depth, no labels.")
    ],
    times: Annotated[float, typer.Option(help="How many times less it is to cost.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="Where to write it; a .keras file.")],
    by: Annotated[Cost, typer.Option(help="What is to be less.")] = "multiply-adds",
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="A layer that stays; may be given several times."),
    ] = None,
    images: Annotated[int, typer.Option(help="How many images to look at, at most.")] = 300,
    seconds: Annotated[
        float, typer.Option(help="Time for the training at the end, less what is spent before it.")
    ] = 600.0,
    seed: Annotated[int, typer.Option(help="Decides what is held out and drawn.")] = 0,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Go on here after an interruption.")
    ] = None,
    weights: Weights = "imagenet",
    top: Annotated[bool, typer.Option(help="An architecture with its classifier.")] = True,
    image_size: ImageSize = None,
) -> None:
    """A network that costs less and sees the same; writes it and a drawing, prints a table."""
    commands.refuse_for_models(context, model, ("weights", "top", "image_size"))
    if top and image_size is not None:
        raise ValueError(
            f"Received image_size={image_size} with the classifier, which takes images of 224. "
            f"Add --no-top, or leave the size out."
        )
    paths.check_model(model)
    paths.check_weights(weights)
    paths.check_images([folder])
    paths.check_out(out, (".keras",))
    if images < 1:
        raise ValueError(f"Received --images {images}; expected 20 at least, better a few hundred.")
    if top and weights in WEIGHT_SETS:
        from vggtorch.weights import publications

        rows = publications(weights, model)
        if rows and not any(row.include_top for row in rows):
            raise ValueError(f"Weight set {weights!r} has no classifier. Add --no-top.")
    from vggtorch.training import image_files

    found_there = image_files([folder])
    number = min(images, len(found_there))
    # From all folders alike.
    chosen = [found_there[i * len(found_there) // number] for i in range(number)]
    network = commands.network(model, weights, include_top=top)
    try:
        small, found = vt.compress(
            network, times, vt.preprocess(chosen, network, size=image_size),
            by=by, keep=keep or [], seconds=seconds, seed=seed, folder=checkpoints,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        again = "the same command goes on where it was"
        hint = again if checkpoints else f"with --checkpoints FOLDER {again}"
        raise typer.Abort(f"interrupted; {hint}") from stop
    _show(found.as_text(terminal_width()))
    drawing = Path(out).with_suffix(".svg")
    with files.atomic(out) as temporary:
        small.save(temporary)
    files.write_text(drawing, vt.draw(small, network))
    print(f"Wrote {out} and {drawing}.")


@app.command(epilog=_examples("bench vgg16", "bench run/model.keras --batch 1"))
def bench(
    context: typer.Context,
    model: Model,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    size: Annotated[int, typer.Option(help="Pixels, where MODEL leaves them open.")] = 224,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 5,
) -> None:
    """How fast a network runs on this machine: by Keras, and by vggtorch."""
    paths.check_model(model)
    from vggtorch.models import model_from_name

    network = model_from_name(model)
    shapes = [tuple(tensor.shape[1:]) for tensor in network.inputs]
    if is_given(context, "size") and not any(None in shape for shape in shapes):
        raise ValueError(
            f"Received size={size} with {model}, which takes {shapes[0]}. Leave it out."
        )
    found = vt.bench(network, batch, size=size, repeats=repeats)
    _show(found.as_text(terminal_width()))


@app.command(
    epilog=_examples("export run/model.keras model.onnx", "export vgg16 vgg16.pt2 --weights a.pth")
)
def export(
    context: typer.Context,
    model: Model,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Ends in .onnx or .pt2.")],
    weights: Weights = "imagenet",
) -> None:
    """Write a network as ONNX or as torch.export's .pt2, to run without Keras."""
    commands.refuse_for_models(context, model, ("weights",))
    paths.check_model(model)
    paths.check_weights(weights)
    paths.check_out(path, paths.EXPORTED, "")
    network = commands.network(model, weights)
    vt.export(network, path)
    _show(f"Wrote {path}.")
    config = vt.data_config(network)
    if config.weight_set is not None and not config.preprocessing_inside:
        _show(
            f"It takes images preprocessed for {config.weight_set}, not raw ones; data_config in "
            f"its metadata says how."
        )


app.command(
    epilog=_examples(
        "predict cat.jpg dog.jpg",
        "predict run photos --out predictions.csv",
        "predict run 'photos/**/*.jpg' --out predictions.jsonl --top 3",
    )
)(commands.predict)
app.command(epilog=_examples("evaluate run data/test", "evaluate run data --out report.html"))(
    commands.evaluate
)
app.command(
    "features",
    epilog=_examples("features vgg16 photos --layer block5_pool --out features.parquet"),
)(commands.extract_features)
app.command(epilog=_examples("push run ann/cats --private", "predict hf://ann/cats photos"))(
    commands.push
)


app.command(
    epilog=_examples(
        "finetune photos",
        "finetune photos --crop-mode squash --epochs 5 --lr 3e-4 -b 32 -o run2",
        "finetune photos --cut block4_pool --head mlp --freeze block4_pool --advise none",
        "finetune labels.csv --epochs 5",
        "finetune pets --label-pattern '^(.+)_[0-9]+'",
        "finetune train validation --unfreeze 3:block5_conv1",
    )
)(training_commands.finetune)
app.command("lr_find", epilog=_examples("lr_find photos", "lr_find photos --picture rates.svg"))(
    training_commands.lr_find
)
app.command(
    "show_batch", epilog=_examples("show_batch photos", "show_batch photos --augment crop")
)(training_commands.show_batch)


def _carry_on(arguments: Sequence[str]) -> str:
    again = [argument for argument in arguments if argument != "--resume"]
    return f"carry the run on with {shlex.join(['vggtorch', *again, '--resume'])}"


def warning_line(message: Warning | str, category: type[Warning], file: str = "", *_: Any) -> str:
    """A warning as the commands show it; none of large images, for which there is a bound."""
    if category.__name__ == "DecompressionBombWarning":
        return ""
    of = "Pillow says of an image: " if "PIL" in Path(file).parts else ""
    return f"vggtorch: {of}{visible(as_options(str(message)), LONGEST_MESSAGE)}\n"


def _take_any_character(stream: Any) -> None:
    """Have what the terminal's encoding lacks stand as an escape sequence, as on stderr."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _in_words(error: Exception) -> str:
    """What is said of an error that isn't one of usage."""
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
        return as_options(str(error))
    if isinstance(error, MemoryError):
        return "the memory doesn't suffice"
    # An error of ours, or of what we stand on.
    reason = f"{type(error).__name__}: {files.first_line(error)}"
    return f"unexpected {reason} (--debug shows where it comes from)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 0 if all went well and 2 for a wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shown = set[str]()

    def line_once(*warning: Any) -> str:
        line = warning_line(*warning)
        if line in shown:
            return ""
        shown.add(line)
        return line

    plain, warnings.formatwarning = warnings.formatwarning, line_once  # type: ignore[assignment]
    debug = "--debug" in arguments
    _take_any_character(sys.stdout)
    try:
        status = app(
            [argument for argument in arguments if argument != "--debug"],
            prog_name="vggtorch",
            standalone_mode=False,
        )
        if status != 130:  # by which typer says that Ctrl-C was pressed
            return status or 0
        message = "interrupted"
    except typer.TyperException as error:  # the command line can't be read so
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "vggtorch"
        reason = error.format_message().replace("Value error, ", "").rstrip(".")
        known = [flag for p in context.command.params for flag in p.opts] if context else ()
        reason = wrong_usage(reason, arguments, known)
        message = f"{reason}{'' if reason.endswith('?') else '.'} Try {command} --help."
        status = error.exit_code
    except typer.Abort as error:
        message, status = str(error) or "interrupted", 130
        if isinstance(error.__cause__, Interrupted):
            message = _carry_on(arguments)
    except Terminated:
        message, status = _carry_on(arguments), 143
    except Exception as error:
        if debug:
            raise
        message, status = _in_words(error), 1
    finally:
        warnings.formatwarning = plain
    print(f"vggtorch: {visible(message, LONGEST_MESSAGE)}", file=sys.stderr)
    return status
