"""`vggtorch compress`: a model and a folder in, a model, a drawing and a table out."""

import keras
import numpy as np
import pytest
from PIL import Image
from small import images, vgg

from vggtorch.cli import main
from vggtorch.compression import joint, work
from vggtorch.models import remember_

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(images(24)):
        path = tmp_path / "photos" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(image + 120, 0, 255).astype("uint8")).save(path)
    remember_(vgg(), "oxford").save(tmp_path / "model.keras")
    return tmp_path


@pytest.mark.slow
def test_it_writes_the_model_and_a_drawing_and_prints_the_table(folder, capsys):
    model, out = folder / "model.keras", folder / "small.keras"
    command = ["compress", str(model), str(folder / "photos"), "--times", "2", "--out", str(out)]
    command += ["--seconds", "0"]
    assert main([*command, "--keep", "block1_conv1", "--keep", "block1_conv2"]) == 0
    captured = capsys.readouterr()
    assert "block3_conv2" in captured.out and "1/2.0" in captured.out
    lines = captured.err.splitlines()  # no terminal to draw bars in: a line for each step
    steps = ["looking at what layers see", "trying layers", "fitting layers", "training"]
    assert [line.strip() for line in lines if line.strip() in steps] == steps
    small = keras.saving.load_model(out)
    assert small.get_layer("block1_conv2").kernel.shape == (3, 3, 16, 16)
    assert "block3_conv1" in out.with_suffix(".svg").read_text()


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = folder / "small.keras"
    words = [str(folder / "model.keras"), str(folder / "photos"), "--times", "2", "--out", str(out)]
    words += ["--seconds", "0"]
    for options, text in (
        ([], "interrupted; with --checkpoints FOLDER the same command goes on where it was"),
        (["--checkpoints", str(folder / "work")], "interrupted; the same command goes on where"),
    ):
        with monkeypatch.context() as m:
            m.setattr(joint, "descend_", interrupted)
            assert main(["compress", *words, *options]) == 130
        assert f"vggtorch: {text}" in capsys.readouterr().err
    monkeypatch.setattr(work, "look", None)  # nothing is looked at again
    assert main(["compress", *words, *options]) == 0
    assert out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_ctrl_c_is_never_silent(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vggtorch.inspect", interrupted)
    assert main(["inspect", "vgg11"]) == 130
    assert capsys.readouterr().err == "vggtorch: interrupted\n"


@pytest.mark.slow
def test_what_it_refuses_it_says_in_words_of_options(folder, capsys):
    model, photos = str(folder / "model.keras"), str(folder / "photos")
    empty = folder / "empty"
    empty.mkdir()
    for command, text in (
        (
            [model, photos, "--times", "1", "--out", "a.keras"],
            "Received --times 1.0; expected a number above 1",
        ),
        ([model, photos, "--times", "2", "--out", "a.h5"], "Received --out a.h5; expected a name"),
        (
            [model, str(empty), "--times", "2", "--out", "a.keras"],
            "empty has no images. Expected .apng",
        ),
        ([model, photos, "--times", "2", "--out", "a.keras", "--keep", "x"], "Received --keep x;"),
        ([model, str(folder / "none"), "--times", "2", "--out", "a.keras"], "There is no file"),
        ([model, photos, "--times", "nan", "--out", "a.keras"], "Received --times nan;"),
        (
            [model, photos, "--times", "2", "--out", "a.keras", "--seconds", "-1"],
            "Received --seconds -1.0; expected a number from 0",
        ),
        ([model, photos, "--times", "2", "--out", "a.keras", "--images", "0"], "--images 0;"),
        (
            [model, photos, "--times", "2", "--out", "a.keras", "--images", "19"],
            "Received 19 images; expected 20",
        ),
    ):
        assert main(["compress", *command]) == 1
        assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_weight_set_without_a_classifier_is_refused_at_once(folder, capsys):
    photos, out = str(folder / "photos"), str(folder / "small.keras")
    command = ["compress", "vgg16", photos, "--times", "2", "--out", out, "--weights", "oxford"]
    assert main(command) == 1
    assert "Weight set 'oxford' has no classifier. Add --no-top." in capsys.readouterr().err
