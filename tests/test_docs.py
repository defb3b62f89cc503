"""Every code block of the pages in docs/ runs in order as it stands there; links and menu hold."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from blocks import BLOCK, run_blocks

import vggtorch as vt
from vggtorch.surgery import distillation

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def name(page):
    return page.relative_to(DOCS).as_posix()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.usefixtures("onnx_operators")
@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_every_block_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MOMENTS", "HELD_OUT"):  # crops that every distillation looks at
        monkeypatch.setattr(distillation, name, 4)
    assert run_blocks(page)


@pytest.mark.slow
def test_the_page_of_commands_has_the_help_of_each(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import building

    page = building.on_page_markdown((DOCS / "command-line.md").read_text(), page=None)
    for name in ("finetune", "compress", "lr_find", "weights"):
        assert f"\n## vggtorch {name}\n\n```text\nUsage: vggtorch {name} " in page


def test_the_api_has_every_public_name_and_setting(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import building

    text = "".join(page.read_text() for page in DOCS.glob("api/*.md"))
    shown = re.findall(r"^::: vggtorch\.(\w+)$|`vt\.(\w+)`", text, re.MULTILINE)
    assert {name for names in shown for name in names if name} == set(vt.__all__)
    for path in re.findall(r"^::: vggtorch\.(.+\..+)$", text, re.MULTILINE):
        room, name = path.split(".")
        assert hasattr(importlib.import_module(f"vggtorch.{room}"), name)
    table = building.on_page_markdown((DOCS / "api" / "training.md").read_text(), page=None)
    assert "| `epochs` | `10` | Passes over the training images. |" in table


def test_the_help_on_its_page_is_as_wide_as_the_page(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import building

    assert max(map(len, building.commands_help().splitlines())) > 84


def test_pictures_are_drawn_from_tables_that_are_there(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import building

    assert building.compression_picture().count("<polyline") == 8
    assert building.growth_picture().count("<polyline") == 12
    with pytest.raises(ValueError, match="no heading 'Other', whose table is drawn"):
        building.table_of("Other")


def in_menu(items):
    for item in items:
        inside = item if isinstance(item, str) else next(iter(item.values()))
        yield from [inside] if isinstance(inside, str) else in_menu(inside)


def test_every_page_is_in_the_menu():
    listed = list(in_menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    assert {name(page) for page in PAGES} <= set(listed)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_between_pages_lead_somewhere(page, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import building

    text = building.on_page_markdown(page.read_text(), page=None)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("pictures/"):  # made by the build
            assert (page.parent / target).exists(), target
