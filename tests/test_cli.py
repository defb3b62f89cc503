import dataclasses
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch import cli
from vggtorch.cli import main
from vggtorch.models.preprocessing import remember_
from vggtorch.training.advice import advise
from vggtorch.weights import sources


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
    assert "features.0.weight" in sources.read(tmp_path / "oxford.pth").tensors


def test_inspect_prints_every_layer(capsys):
    assert main(["inspect", "vgg11_bn"]) == 0
    printed = capsys.readouterr().out
    assert "block1_bn1" in printed and "predictions" in printed


def test_bench_prints_every_way_to_run(tmp_path, capsys):
    path = tmp_path / "tiny.keras"
    tiny.network().save(path)
    assert main(["bench", str(path), "--batch", "2", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("batch 2\n") and "\ngradients, lowered, bfloat16 " in printed


def test_predict_prints_the_most_probable_classes(tmp_path, capsys):
    weights, image = tmp_path / "random.safetensors", tmp_path / "china.png"
    model = remember_(vt.VGG11(weights=None), "imagenet")
    vt.save_weights(model, weights)
    Image.fromarray(load_sample_images().images[0]).save(image)
    arguments = ["--architecture", "vgg11", "--weights", str(weights), "--top", "3"]
    assert main(["predict", str(image), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    best = vt.decode_predictions(model.predict(vt.preprocess(image, model), verbose=0), 3)[0]
    assert printed[0] == str(image)
    assert [line.split("%  ")[1] for line in printed[1:]] == [name for _, name, _ in best]


def test_predict_refuses_weights_whose_preprocessing_is_not_known(tmp_path, capsys):
    weights = tmp_path / "random.pth"
    vt.save_weights(vt.VGG11(weights=None, include_top=False), weights)
    assert main(["convert", str(weights), str(tmp_path / "random.keras")]) == 0
    capsys.readouterr()
    assert main(["predict", "china.png", "--model", str(tmp_path / "random.keras")]) == 1
    assert "does not say which weight set" in capsys.readouterr().err


def test_weights_lists_what_is_known_and_here(capsys):
    sources.find("oxford", "vgg16", include_top=False)
    assert main(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(sources.KNOWN)
    (oxford,) = [line for line in lines if "oxford" in line]
    assert "not here" not in oxford


def test_inspect_compares_and_draws(tmp_path, capsys):
    drawing = tmp_path / "graph.svg"
    assert main(["inspect", "vgg13", "--before", "vgg11", "--draw", str(drawing)]) == 0
    assert "after/before" in capsys.readouterr().out
    assert "block1_conv2" in drawing.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "vgg17"], "vgg17"),
        (["convert", "nothing.pth", "x.safetensors"], "nothing.pth"),
        (["predict", "nothing.jpg", "--weights", "oxford"], "classifier"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("vggtorch: ") and message in error and "Traceback" not in error


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: vggtorch" in capsys.readouterr().err


def test_what_is_asked_for_stands_above_the_plan(tmp_path, capsys):
    data = tiny.pictures(tmp_path / "data")
    (data / "blue" / "broken.jpg").write_bytes(b"no image")
    words = ["finetune", str(data), "--advise", "different", "--broken", "skip"]
    words += ["--epochs", "10", "--no-cache", "--image-size", "16"]  # 10 epochs are the default
    with pytest.warns(UserWarning, match="broken.jpg"):
        settings = cli._settings(cli._parser().parse_args(words))
    plan = advise(24, 3, "different")
    assert plan.epochs != 10
    asked: dict[str, Any] = {"broken": "skip", "epochs": 10, "cache": False, "image_size": 16}
    assert settings == dataclasses.replace(plan, **asked)
    assert plan.reasons[0].decision in capsys.readouterr().out


def test_export_writes_what_a_keras_file_computes(tmp_path, capsys):
    model = tiny.network()
    model.save(tmp_path / "tiny.keras")
    assert main(["export", str(tmp_path / "tiny.keras"), str(tmp_path / "tiny.pt2")]) == 0
    assert "Wrote" in capsys.readouterr().out
    x = torch.rand(3, 16, 16, 3) * 255
    found = torch.export.load(tmp_path / "tiny.pt2").module()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
