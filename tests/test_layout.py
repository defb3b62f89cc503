"""The package's own rules: which module may import which, and what an import costs."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vggtorch

PACKAGE = Path(vggtorch.__file__).parent
# A module imports only from those before it.
ORDER = [
    "architectures",
    "preprocessing",
    "files",
    "downloads",
    "hdf5",
    "readers",
    "sources",
    "conversion",
    "models",
    "kernels",
    "modules",
    "fused",
    "graphs",
    "lowering",
    "composition",
    "fitting",
    "surgery",
    "timing",
    "inspection",
    "bench",
    "checkpoints",
    "data",
    "config",
    "advice",
    "display",
    "features",
    "training",
    "report",
    "export",
    "demo",
    "cli",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imported(module: str) -> Iterator[str]:
    """Modules of the package that `module` imports anywhere, inside functions too."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "vggtorch":
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vggtorch."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("vggtorch.")
            )


def test_the_order_names_every_module():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module):
    before = ORDER[: ORDER.index(module)]
    assert set(imported(module)) <= set(before)


def run(code, cwd=PACKAGE.parent, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **environment},
        cwd=cwd,
    )


def test_importing_selects_the_torch_backend_and_leaves_torchvision_alone():
    result = run(
        "import sys, vggtorch, keras; print(keras.config.backend(), 'torchvision' in sys.modules)",
        KERAS_BACKEND="tensorflow",
    )
    assert result.stdout.split() == ["torch", "False"], result.stderr


def test_another_running_backend_is_a_clear_error():
    # Stands for a Keras that runs on TensorFlow, which nothing here installs.
    result = run(
        "import sys, types; keras = types.ModuleType('keras'); sys.modules['keras'] = keras; "
        "keras.config = types.SimpleNamespace(backend=lambda: 'tensorflow'); import vggtorch"
    )
    assert result.returncode != 0
    assert "Keras already runs on 'tensorflow'. Import vggtorch before keras" in result.stderr


def test_a_wheel_works_as_the_checkout_does(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, "."],
        cwd=PACKAGE.parent,
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        installed = {name for name in archive.namelist() if name.startswith("vggtorch/")}
        metadata = archive.read("vggtorch-0.1.0.dist-info/entry_points.txt").decode()
    ours = {p for p in PACKAGE.iterdir() if p.is_file()}
    assert installed == {f"vggtorch/{path.name}" for path in ours}
    assert "vggtorch = vggtorch.cli:main" in metadata
    result = run(
        "import vggtorch; print(vggtorch.__file__); "
        "from vggtorch.cli import main; main(['inspect', 'vgg11'])",
        PYTHONPATH=str(site),
        cwd=tmp_path,
    )
    assert result.stdout.startswith(str(site)), result.stderr
    assert "block1_conv1" in result.stdout
