"""The package's own rules: which module may import which, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vggtorch

PACKAGE = Path(vggtorch.__file__).parent
# A module imports only from those before it.
ORDER = [
    "architectures",
    "preprocessing",
    "sources",
    "conversion",
    "models",
    "lowering",
    "fitting",
    "surgery",
    "inspection",
    "training",
    "report",
    "export",
    "demo",
    "cli",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imported(module):
    """Modules of the package that `module` imports anywhere, inside functions too."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "vggtorch":
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vggtorch."):
            yield node.module.split(".")[1]
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


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), **environment},
        cwd=PACKAGE.parent,
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_imported_first(module):
    result = run(f"import vggtorch.{module}")
    assert result.returncode == 0, result.stderr


def test_importing_selects_the_torch_backend_and_leaves_torchvision_alone():
    result = run(
        "import sys, vggtorch, keras; print(keras.config.backend(), 'torchvision' in sys.modules)",
        KERAS_BACKEND="tensorflow",
    )
    assert result.stdout.split() == ["torch", "False"], result.stderr


def test_another_running_backend_is_a_clear_error(tmp_path):
    # Keras runs on numpy without any other framework installed.
    result = run("import keras, vggtorch", KERAS_BACKEND="numpy")
    assert result.returncode != 0
    assert "Keras already runs on 'numpy'. Import vggtorch before keras" in result.stderr
