import dataclasses
import re
import shlex
import sys
import warnings
from typing import Any

import pytest
import tiny
import torch
import typer
from fresh import ROOT, run
from PIL import Image
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch import cli, models, weights
from vggtorch.cli import main, warning_line


@pytest.mark.slow
@pytest.mark.network
def test_convert_prints_what_it_mapped(tmp_path, capsys):
    with_names = tmp_path / "oxford.safetensors"
    assert main(["convert", "oxford", str(with_names)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 26
    assert lines[0].startswith("conv0.weight (64, 3, 3, 3) ")
    assert lines[0].endswith(" -> block1_conv1/kernel (3, 3, 3, 64)")
    assert lines[-1].endswith(" -> block5_conv3/bias (512,)")
    assert main(["convert", str(with_names), str(tmp_path / "oxford.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("block1_conv2/kernel (3, 3, 64, 64) ")
    assert lines[2].endswith(" -> features.2.weight (64, 64, 3, 3)")
    assert "features.0.weight" in torch.load(tmp_path / "oxford.pth")


@pytest.mark.slow
def test_inspect_prints_every_layer(tmp_path, capsys):
    path = tmp_path / "tiny.keras"
    tiny.network(batch_norm=True).save(path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "block1_bn1" in printed and "predictions" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_inspect_compares_and_draws(tmp_path, capsys):
    drawing = tmp_path / "graph.svg"
    assert main(["inspect", "vgg13", "--before", "vgg11", "--draw", str(drawing)]) == 0
    assert "after/before" in capsys.readouterr().out
    assert "block1_conv2" in drawing.read_text()


@pytest.mark.slow
def test_bench_prints_every_way_to_run(tmp_path, capsys):
    path = tmp_path / "tiny.keras"
    tiny.network().save(path)
    assert main(["bench", str(path), "--batch", "2", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("batch 2\n") and "\ngradients, vggtorch, bfloat16 " in printed


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_predict_prints_the_most_probable_classes(tmp_path, capsys):
    weights, image = tmp_path / "random.safetensors", tmp_path / "china.png"
    model = models.remember_(vt.VGG11(weights=None), "imagenet")
    vt.save_weights(model, weights)
    Image.fromarray(load_sample_images().images[0]).save(image)
    arguments = ["--architecture", "vgg11", "--weights", str(weights), "--top", "3"]
    assert main(["predict", str(image), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    best = vt.decode_predictions(model.predict(vt.preprocess(image, model), verbose=0), 3)[0]
    assert printed[0] == str(image)
    assert [line.split("%  ")[1] for line in printed[1:]] == [name for _, name, _ in best]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_predict_refuses_weights_whose_preprocessing_is_not_known(tmp_path, capsys):
    weights, image = tmp_path / "random.pth", tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    vt.save_weights(vt.VGG11(weights=None, include_top=False), weights)
    assert main(["convert", str(weights), str(tmp_path / "random.keras")]) == 0
    capsys.readouterr()
    assert main(["predict", str(image), "--model", str(tmp_path / "random.keras")]) == 1
    assert "does not say which weight set" in capsys.readouterr().err


@pytest.mark.network
@pytest.mark.parametrize("arguments", [["weights"], ["weights", "list"]])
def test_weights_lists_what_is_known_and_here(arguments, capsys):
    vt.VGG16(weights="oxford", include_top=False)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(weights.PUBLISHED)
    (oxford,) = [line for line in lines if "oxford" in line]
    assert "not here" not in oxford


@pytest.mark.slow
def test_export_writes_what_a_keras_file_computes(tmp_path, capsys):
    model = models.remember_(tiny.network(), "oxford")
    model.save(tmp_path / "tiny.keras")
    assert main(["export", str(tmp_path / "tiny.keras"), str(tmp_path / "tiny.pt2")]) == 0
    said = capsys.readouterr().out
    assert "Wrote" in said and "takes images preprocessed for oxford, not raw ones" in said
    x = torch.rand(3, 16, 16, 3) * 255
    found = torch.export.load(tmp_path / "tiny.pt2").module()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


MISTAKES = [
    ("inspect vgg17", "vgg17"),
    ("convert nothing.pth x.safetensors", "nothing.pth"),
    ("predict images/red/0.png --weights oxford", "has no classifier. Use --weights imagenet."),
    (
        "predict images/red/0.png --architecture vgg11 --weights features.pth",
        "It has no classifier.",
    ),
    ("finetune nowhere --epochs 0", "Received --epochs 0; expected a whole number from 1."),
    (
        "finetune nowhere --cut block2_pool --advise none",
        "Received --cut block2_pool without a head. Name one",
    ),
    (
        "finetune nowhere --freeze a --unfreeze 12:b --unfreeze 3:c --advise none",
        "Received --unfreeze 12:b --unfreeze 3:c; expected",
    ),
    (
        "finetune nowhere --unfreeze 2:block5_conv1 --advise none",
        "--unfreeze 2:block5_conv1, and nothing is frozen",
    ),
    ("finetune nowhere --weights oxford --image-size 32", "nowhere"),
    (
        "finetune images --weights oxford --image-size 32 --advise none",
        "name one: --head multilevel",
    ),
    (
        "finetune images --weights oxford --optimizer adm",
        "--optimizer adm; expected one of adadelta, ",
    ),
    (
        "finetune images --weights oxford --cut block3_pool --freeze block4_pool",
        "Received --cut block3_pool with --freeze block4_pool, which lies above the cut",
    ),
    ("finetune images --weights VGG16_Weights.IMAGENET1K_V1", "is called imagenet here."),
    ("finetune images --image-size 31", "Received --image-size 31; expected 32 or more"),
    ("finetune images --weights vgg13", "vgg13 is a network (--architecture vgg13)"),
    (
        "finetune images --weights oxford --image-size 32 --head linear --augment none "
        "--cache-copies 2 --freeze block5_pool",
        "Received --cache-copies 2 with --augment none",
    ),
    ("finetune unreadable --weights oxford --image-size 32", "or pass --on-unreadable skip"),
    ("finetune images --weights oxford --image-size 32 --head mlp --cut fc9", "fc9"),
]


def mistakes():
    """Each mistake; those that name published weights are found out once these are here."""
    for command, message in MISTAKES:
        marks = [pytest.mark.network] if "--weights oxford" in command else []
        yield pytest.param(command, message, marks=marks)


def test_a_warning_is_shown_once_in_a_run(monkeypatch, capsys):
    def app(*args, **kwargs):
        """Write what Python does of warnings, which pytest takes for itself."""
        for _ in range(2):
            sys.stderr.write(warnings.formatwarning("Left out.", UserWarning, __file__, 1))

    monkeypatch.setattr(cli, "app", app)
    for _ in range(2):
        assert main([]) == 0
        assert capsys.readouterr().err == "vggtorch: Left out.\n"


@pytest.mark.parametrize(("command", "message"), list(mistakes()))
def test_a_mistake_is_one_line_in_the_words_of_the_command_line(
    command, message, tmp_path, monkeypatch, capsys, request
):
    monkeypatch.chdir(tmp_path)
    tiny.pictures(tmp_path / "images")
    tiny.pictures(tmp_path / "unreadable")
    if "features.pth" in command:
        request.getfixturevalue("narrow")
        vt.save_weights(vt.VGG11(weights=None, include_top=False), "features.pth")
    (tmp_path / "unreadable" / "blue" / "broken.jpg").write_bytes(b"no image")
    assert main(shlex.split(command)) == 1
    error = capsys.readouterr().err
    assert error.startswith("vggtorch: ") and message in error
    assert error.count("\n") == 1 and error.endswith("\n")
    for python in ("TrainConfig", "vt.", "=", "True"):
        assert python not in error


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "Missing command. Try vggtorch --help."),
        ("finetnue", "No such command 'finetnue'."),
        ("bench", "Missing argument 'MODEL'. Try vggtorch bench --help."),
        ("bench vgg11 --batch many", "Received --batch 'many'; expected a whole number. Try"),
        (
            "finetune images --lr=auto",
            "Received --lr 'auto'; expected a number. Try vggtorch fi",
        ),
        ("finetune images -b 1.5", "Received -b '1.5'; expected a whole number. Try vggtorch fi"),
        ("finetune images --bs 16", "No such option: --bs. Perhaps --batch-size? Try vggtorch fi"),
        ("finetune images --output run2", "No such option: --output. Perhaps --output-dir? Try"),
        (
            "predict a.jpg --output b.csv",
            "No such option: --output. Perhaps --out? Try vggtorch pred",
        ),
        ("finetune images --loss mse", "--loss. The loss is cross-entropy, which --label-smo"),
        ("finetune images --arch vgg11", "No such option: --arch. Perhaps --architecture? Try"),
        (
            "finetune images --valid-pct 0.3",
            "No such option: --valid-pct. Perhaps --validation-split",
        ),
        ("bench vgg11 --batch-size 1", "No such option: --batch-size. Perhaps --batch? Try"),
        ("evaluate a b --bs 1", "No such option: --bs. Perhaps --batch-size? Try vggtorch eval"),
        ("train images", "No such command 'train'. Perhaps finetune? Try vggtorch --help."),
        ("bench vgg11 --size", "Option '--size' requires an argument. Try vggtorch"),
        (
            "finetune images --head big",
            "'big' is not one of 'multilevel', 'linear', 'mlp', 'tutorial'. Try",
        ),
        ("finetune images --unfreeze b", "'b' isn't EPOCH:LAYER, such as 2:block5_conv1. Try"),
        ("predict a.jpg --architecture vgg17", "'vgg17' is not one of 'vgg11', 'vgg13'"),
        ("export vgg11 a.onnx --wieghts b", "No such option: --wieghts"),
    ],
)
def test_a_wrong_usage_is_one_line_and_status_2(command, message, capsys):
    assert main(shlex.split(command)) == 2
    error = capsys.readouterr().err
    assert error.startswith("vggtorch: ") and message in error and error.count("\n") == 1


@pytest.mark.network
@pytest.mark.slow
def test_a_warning_is_one_line_too(tmp_path):
    tiny.pictures(tmp_path / "images")
    (tmp_path / "images" / "blue" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "blue" / "notes.txt").write_text("no image either")
    words = "finetune images --weights oxford --image-size 32 --epochs 1 --on-unreadable skip"
    words += " --head linear --cut block2_pool"
    code = f"""
    import runpy
    sys.path.insert(0, {str(ROOT)!r})
    sys.argv = ["vggtorch", *{words.split()}]
    runpy.run_module("vggtorch", run_name="__main__")
    """
    found = run(code, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stderr.splitlines() if line.startswith("vggtorch: ")]
    assert lines[0] == "vggtorch: Left out of images: 1 file (1 .txt)."
    assert "broken.jpg" in lines[1] and "left out" in lines[1]
    assert "UserWarning" not in found.stderr


def test_warnings_of_pillow_have_its_name_and_none_is_of_large_images():
    line = warning_line("Truncated File Read", UserWarning, Image.__file__, 1)
    assert line == "vggtorch: Pillow says of an image: Truncated File Read\n"
    assert warning_line("Left out.", UserWarning, __file__, 1) == "vggtorch: Left out.\n"
    assert warning_line("Image size", Image.DecompressionBombWarning, Image.__file__, 1) == ""


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="vgg17"):
        main(["inspect", "vgg17", "--debug"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "the memory doesn't suffice"),
        (KeyError("a\nb"), "unexpected KeyError: 'a\\nb' (--debug shows where it comes from)"),
        (FloatingPointError("The loss is NaN."), "The loss is NaN."),
    ],
)
def test_an_error_that_is_no_mistake_of_the_users_is_one_line_too(
    error, message, monkeypatch, capsys
):
    def check_model(name):
        raise error

    monkeypatch.setattr(cli.paths, "check_model", check_model)
    assert main(["inspect", "vgg11"]) == 1
    assert capsys.readouterr().err == f"vggtorch: {message}\n"


def test_bench_takes_a_size_only_where_the_model_leaves_it_open(tmp_path, capsys):
    tiny.network().save(tmp_path / "tiny.keras")
    assert main(["bench", str(tmp_path / "tiny.keras"), "--size", "32"]) == 1
    error = capsys.readouterr().err
    assert "Received --size 32 with " in error and "takes (16, 16, 3). Leave it out." in error


def test_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vggtorch {vt.__version__}\n"


COMMANDS = [
    "demo",
    "convert",
    "inspect",
    "bench",
    "export",
    "predict",
    "evaluate",
    "features",
    "finetune",
    "weights",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_examples_that_can_be_read(command, capsys):
    assert main([]) == 2
    assert main([command, "-h"]) == 0
    words = capsys.readouterr().out
    examples = re.findall(r"^ +vggtorch (.+)$", words, re.MULTILINE)
    assert examples
    group = typer.main.get_command(cli.app)
    for example in examples:
        name, *arguments = shlex.split(example)
        assert name == command
        group.get_command(None, name).make_context(name, arguments)  # type: ignore[attr-defined]


def test_the_help_of_every_command_is_there(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", printed, re.MULTILINE) for command in COMMANDS)
    assert "--install-completion" in printed


def test_the_help_of_finetune_has_every_field_with_its_default(capsys):
    assert main(["finetune", "-h"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(vt.TrainConfig):
        found = re.search(f" --{field.name.replace('_', '-')}[ ,].*", words)
        option = found[0] if found else ""
        assert field.metadata["help"].replace(" ", "") in option.replace(" ", "")
    assert "--epochs <int> Passes over the training images. [default: 10]" in words
    assert "Rules of thumb choose what isn't given, before the defaults below" in words
    assert "mlflow. May be given several times." in words


@pytest.fixture
def config_of(tmp_path, monkeypatch, capsys):
    """The configuration that `vggtorch finetune` makes of its options."""
    data = tiny.pictures(tmp_path / "data")
    received = []

    def finetune(model, train, validation, config):
        received.append(config)
        raise ValueError("This is far enough.")

    monkeypatch.setattr(vt, "finetune", finetune)
    network = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    monkeypatch.setattr(models, "constructor", lambda name: lambda **options: network)
    monkeypatch.setattr(models, "best_weight_set", lambda name: ("oxford", ""))

    def config_of(*words):
        assert main(["finetune", str(data), *words]) == 1
        assert "This is far enough." in capsys.readouterr().err
        return received[-1]

    return config_of


@pytest.mark.slow
def test_every_field_is_an_option(config_of):
    assert config_of("--advise", "none") == vt.TrainConfig()
    changed = vt.TrainConfig(
        cut="block4_pool", head="mlp", freeze="block4_pool", unfreeze=((2, "a"), (3, "b")),
        epochs=5, batch_size=7, gradient_accumulation_steps=2, optimizer="sgd", learning_rate=0.5,
        layer_decay=0.4, warmup=0.3, schedule="constant", weight_decay=0.2, label_smoothing=0.1,
        max_grad_norm=2.0, ema_decay=0.9, patience=3, precision="bf16", image_size=96,
        crop_mode="border", crop_pct=0.9, interpolation="bicubic",
        augment="crop", on_unreadable="skip", validation_split=0.3, num_workers=1, cache=False,
        cache_copies=2, cache_dtype="float16", cache_dir="c", output_dir="r", checkpoint_steps=9,
        resume=True, seed=4, label_pattern="([0-9])", mixup=0.2, cutmix=1.0,
        class_weight=(1.0, 2.5), sampling="balanced", metrics=("auroc", "macro_f1"), monitor="loss",
        temperature_scaling=True, restore_best_weights=False,
        log_with=("wandb",),
    )  # fmt: skip
    words = []
    for field in dataclasses.fields(vt.TrainConfig):
        value, flag = getattr(changed, field.name), "--" + field.name.replace("_", "-")
        assert value != field.default, field.name
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif field.name == "unfreeze":
            for epoch, layer in value:
                words += [flag, f"{epoch}:{layer}"]
        elif field.name == "class_weight":
            words += [flag, ",".join(map(str, value))]
        else:
            for one in value if isinstance(value, tuple) else [value]:
                words += [flag, str(one)]
    assert config_of("--advise", "none", *words) == changed


@pytest.mark.slow
def test_advice_is_the_default_and_what_is_asked_for_stands_above_it(config_of):
    plan = vt.advise(24, 3)
    assert config_of() == plan
    config = config_of("--no-cache", "--lr", "0.5", "-b", "7", "-o", "r", "--image-size", "64")
    asked: dict[str, Any] = {"cache": False, "learning_rate": 0.5, "batch_size": 7}
    asked |= {"output_dir": "r", "image_size": 64}
    assert config == dataclasses.replace(plan, **asked)
    # What one setting of the plan needs of another goes with it.
    config = config_of("--augment", "none", "--cut", "block4_pool")
    assert (config.cache_copies, config.freeze, config.head) == (1, "block4_pool", "multilevel")
    different = vt.advise(24, 3, "different")
    assert config_of("--advise", "different", "--epochs", "9") == dataclasses.replace(
        different, epochs=9
    )
