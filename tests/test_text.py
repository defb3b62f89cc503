"""What others wrote reaches terminal, page and card as text, and never as an instruction."""

from __future__ import annotations

import html.parser
import json
import shlex
from pathlib import Path

import keras
import pytest
import tiny
import torch

import vggtorch as vt
from vggtorch import text
from vggtorch.cli import main
from vggtorch.training import TrainConfig, finetune, save_trained, write_report

# What names of class folders may hold on Linux; the last isn't valid UTF-8.
NAMES = [
    "a\x1b[31mred", "b\nline", "<script>c", "[bold]d[bold]", "e`|*_x_*", "f\u202egnp", "g" * 250,
    "h\udcff",
]  # fmt: skip


def harmless(shown: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_shown_name_is_an_instruction(name):
    for show in (text.visible, text.visible_lines, text.in_html, text.in_markdown, text.as_code):
        shown = show(name)
        assert harmless(shown)
        assert shown.encode("utf-8")
    assert "<" not in text.in_html(name) + text.in_markdown(name)
    assert len(text.visible(name)) <= 200 + 6


def test_what_can_be_seen_stays_as_it_is():
    for name in ("Goldfinch", "große Meise", "日本", "🐦", "it's 5 o'clock"):
        assert text.visible(name) == name


def test_markdown_reads_as_the_name():
    markdown = pytest.importorskip("markdown_it")

    class Words(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words = ""
            self.tags: set[str] = set()

        def handle_data(self, data: str) -> None:
            self.words += data

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.add(tag)

    renderer = markdown.MarkdownIt("gfm-like", {"linkify": False})
    for name in (
        "<script>c", "[x](y)", "e`|*_x_*", "# h", "1. a", "a\\b", "&lt;", "![i](j)", "~~a~~", "- a",
    ):  # fmt: skip
        page = Words()
        page.feed(renderer.render(text.in_markdown(name)))
        assert page.words.strip() == name
        assert page.tags == {"p"}
        code = Words()
        code.feed(renderer.render(text.as_code(name)))
        assert (code.words.strip(), code.tags) == (name, {"p", "code"})


def test_a_command_for_others_has_no_absolute_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    given = ["/usr/bin/vggtorch", "finetune", "/home/ann/my photos", "~/more", "--cache-dir=/tmp/f"]
    shown = text.as_command([*given, "data/train", "--unfreeze", "2:block5_conv1"])
    assert shown == (
        "vggtorch finetune 'my photos' more --cache-dir=f data/train --unfreeze 2:block5_conv1"
    )


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A run on folders whose names hold anything, and all that it wrote."""
    folder = tmp_path_factory.mktemp("named")
    data = tiny.pictures(folder / "data", each=3)
    for name, old in zip(NAMES, ("blue", "green", "red") * 3, strict=False):
        (data / name).mkdir()
        for path in (data / old).iterdir():
            (data / name / path.name).write_bytes(path.read_bytes())
    config = TrainConfig(
        head="linear", epochs=1, batch_size=8, image_size=16, output_dir=str(folder / "run")
    )
    with pytest.warns(UserWarning, match="validation images are files of the training data again"):
        history = finetune(tiny.network(None), data, config=config)
    save_trained(history, folder / "run")
    write_report(history, folder / "run" / "report.html")
    return history, folder


@pytest.mark.slow
def test_any_name_of_a_class_survives_a_run(named):
    history, folder = named
    expected = sorted([*NAMES, "blue", "green", "red"])
    assert list(history.classes) == expected
    assert json.loads((folder / "run" / "classes.json").read_text()) == expected
    model = keras.saving.load_model(folder / "run" / "model.keras")
    assert list(vt.data_config(model).label_names) == expected


@pytest.mark.slow
def test_cards_and_reports_hold_neither_instructions_nor_absolute_paths(named):
    _, folder = named
    card = (folder / "run" / "README.md").read_text()
    report = (folder / "run" / "report.html").read_text()
    for shown in (card, report):
        assert harmless(shown)
        assert "<script>c" not in shown
        assert str(folder) not in shown
        assert str(Path.cwd()) not in shown
    assert "&lt;script&gt;c" in card
    assert "b\\\\nline" in card


def test_predictions_name_such_classes_on_one_line_each(named, capsys):
    _, folder = named
    image = folder / "data" / "blue" / "0.png"
    command = ["predict", str(image), "--model", str(folder / "run" / "model.keras")]
    assert main([*command, "--top", "11"]) == 0
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert len(shown.splitlines()) == 12
    assert "b\\nline" in shown


def test_names_of_tensors_reach_the_terminal_as_text(tmp_path, capsys):
    torch.save({"a\x1b[2Jb\nc": torch.ones(2)}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]) == 1
    error = capsys.readouterr().err
    assert harmless(error) and error.count("\n") == 1
    assert "a\\x1b[2Jb\\nc" in error


def test_messages_have_a_bounded_length(tmp_path, capsys):
    state = {f"layer{i}" + "x" * 10_000: torch.ones(2) for i in range(100)}
    torch.save(state, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")]) == 1
    assert len(capsys.readouterr().err) < 5000
    assert main(["inspect", "x" * 100_000]) == 1
    assert len(capsys.readouterr().err) < 5000


def test_layers_of_a_model_are_drawn_and_listed_as_text(tmp_path, capsys):
    image = keras.Input((4,))
    layer = keras.layers.Dense(2, name="<b>\x1b[31m\u202ex")
    keras.Model(image, layer(image)).save(tmp_path / "m.keras")
    svg = tmp_path / "m.svg"
    assert main(shlex.split(f"inspect {tmp_path / 'm.keras'} --draw {svg}")) == 0
    assert harmless(capsys.readouterr().out)
    assert harmless(svg.read_text()) and "<b>" not in svg.read_text()
