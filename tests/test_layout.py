"""The package's own rules: which room may import which, how a file reads, how a room is entered."""

import ast
import graphlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh import fork, wait_for

import vggtorch as vt

PACKAGE = Path(vt.__file__).parent
GROUND = (
    *("architectures", "weight_sets", "telling", "keras_graph", "checks", "text", "paths"),
    "files",
)
# A room imports only from those before it, and measuring not from surgery.
ROOMS = (
    *("weights", "models", "lowering", "surgery", "features", "measuring"),
    *("compression", "training"),
)
ENTRANCES = (
    "demo",
    "options",
    "commands",
    "training_commands",
    "cli",
)  # what a user starts; they may import everything
ORDER = (*GROUND, *ROOMS, *ENTRANCES)
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def home(path: Path) -> str:
    """The room, or the file of the ground or the entrance, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> Iterator[str]:
    """The modules of vggtorch that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vggtorch":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").startswith("vggtorch."):
                module = str(node.module).removeprefix("vggtorch.")
                inside = {f"{module}.{alias.name}" for alias in node.names} & {*map(dotted, FILES)}
                yield from inside or {module}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name.startswith("vggtorch"))
            yield from (name.removeprefix("vggtorch").removeprefix(".") for name in names)


def taken_from_the_root(path: Path) -> set[str]:
    """The names that a file uses of vggtorch itself, as in `vggtorch.__version__`."""
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {a.attr for a in attributes if getattr(a.value, "id", "") == "vggtorch"}


def test_every_file_is_in_a_room():
    assert {home(path) for path in FILES} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("path", [p for p in FILES if home(p) in ORDER], ids=name)
def test_a_file_imports_from_rooms_to_its_left_through_their_doors(path):
    for module in imported(path):
        if module == "":  # all public names are for those who stand outside
            assert home(path) in ENTRANCES or taken_from_the_root(path) == {"__version__"}
            continue
        room, _, inside = module.partition(".")
        assert room in ORDER, f"vggtorch.{module} is neither a room nor a file of the ground"
        if room == home(path):
            continue
        assert ORDER.index(room) < ORDER.index(home(path)), f"vggtorch.{module} is to the right"
        assert (home(path), room) != ("measuring", "surgery")
        assert not inside, f"import from vggtorch.{room}, which says what others may use"


def test_no_files_import_each_other_even_for_types():
    graphlib.TopologicalSorter({dotted(path): imported(path) for path in FILES}).prepare()


@pytest.mark.slow
def test_importing_a_room_loads_no_room_to_its_right():
    """Tried in a copy of this process, in which vggtorch is imported anew, and before Keras."""

    def import_all():
        del sys.modules["keras"]
        found = {}
        for place, room in enumerate(ORDER):
            for module in [m for m in sys.modules if m.startswith("vggtorch")]:
                del sys.modules[module]
            names = importlib.import_module(f"vggtorch.{room}")
            for name in getattr(names, "__all__", ()):
                getattr(names, name)
            loaded = {m.split(".")[1] for m in sys.modules if m.startswith("vggtorch.")}
            assert room in loaded
            late = loaded & set(ORDER[place + 1 :])
            if room == "measuring":
                late |= loaded & {"surgery"}
            if room not in ENTRANCES and late:
                found[room] = late
        assert found == {}

    wait_for(fork(import_all))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_which_order_to_read_it_and_what_others_may_use(room):
    door = PACKAGE / room / "__init__.py"
    text = ast.get_docstring(ast.parse(door.read_text())) or ""
    files = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    assert files - set(re.findall(r"`(\w+)`", text)) == set()
    listed = ast.parse(
        (door.with_suffix(".pyi") if "lazy" in door.read_text() else door).read_text()
    )
    assert any(isinstance(node, ast.ImportFrom) for node in listed.body)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_public_name_is_also_that_of_a_file_beside_it_or_of_a_room(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}
    assert names & {*ORDER, *(file.stem for file in path.parent.glob("*.py"))} == set()


def test_no_public_name_is_also_that_of_a_file():
    assert set(vt.__all__) & {path.stem for path in FILES} == set()


def test_no_file_is_over_500_lines():
    root = PACKAGE.parent
    files = [*FILES, *root.glob("tests/**/*.py"), *root.glob("benchmarks/*.py")]
    lines = {
        path.relative_to(root).as_posix(): len(path.read_text().splitlines()) for path in files
    }
    assert {path: count for path, count in lines.items() if count > 500} == {}
