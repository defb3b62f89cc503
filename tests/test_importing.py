"""What `import vggtorch` does, and what it leaves for later; how vggtorch is installed."""

import os
import re
import zipfile
from importlib.metadata import version
from pathlib import Path

import hatchling.build
import lazy_loader
import numpy as np
import pytest
import tiny
from fresh import ROOT, run

import vggtorch as vt
from vggtorch.keras_graph import model_class
from vggtorch.models import remember_
from vggtorch.weight_sets import DataConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with a model of a class of ours."""
    path = tmp_path_factory.mktemp("saved") / "tiny.keras"
    model = tiny.network()
    model_class(DataConfig("oxford"))(model.inputs, model.outputs).save(path)
    return str(path)


@pytest.mark.slow
def test_importing_selects_the_torch_backend_and_keras_alone_loads_our_models(saved):
    """Asking where Keras is must not end the watch that registers our models with it."""
    result = run(
        f"""
        import importlib.util, vggtorch
        importlib.util.find_spec("keras")
        gc.enable()
        import keras
        assert gc.isenabled()  # which it isn't while Keras is imported
        # What was imported is old, so that a user's own work isn't stopped to look at all of it.
        young = len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1))
        assert young < 50_000 < len(gc.get_objects(generation=2)) and not gc.get_freeze_count()
        print(keras.config.backend(), type(keras.saving.load_model({saved!r})))
        """,
        KERAS_BACKEND="jax",
    )
    assert re.fullmatch("torch .*OxfordModel'>\n", result.stdout), result.stderr


@pytest.mark.slow
def test_keras_loads_what_remembers_and_our_names_import_none_of_what_only_some_users_need(
    saved, tmp_path
):
    """In plain Keras a model loads that remembers what it expects; after that ours do."""
    config = DataConfig(
        "oxford", input_size=(3, 16, 16), crop_mode="border", label_names=("a", "b", "c")
    )
    remembers = remember_(tiny.network(dropout=0.0), config)
    remembers.save(tmp_path / "m.keras")
    x = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    result = run(f"""
    import os
    os.environ["KERAS_BACKEND"] = "torch"
    import sys, keras, numpy as np
    model = keras.saving.load_model({str(tmp_path / "m.keras")!r})
    x = np.load({str(tmp_path / "x.npy")!r})
    np.save({str(tmp_path / "y.npy")!r}, model.predict(x, verbose=0))
    assert "vggtorch" not in sys.modules

    known = set(sys.modules)
    import vggtorch as vt
    print(type(keras.saving.load_model({saved!r})))
    for name in dir(vt):
        getattr(vt, name)
    new = {{module.split(".")[0] for module in set(sys.modules) - known}}
    print(new & {{"torchvision", "accelerate", "rich", "onnx", "sklearn", "tensorboard", "typer"}})
    """)
    assert re.fullmatch(".*OxfordModel'>\nset\\(\\)\n", result.stdout), result.stderr
    predicted = remembers.predict(x, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), predicted, rtol=1e-5, atol=1e-5)


def test_another_running_backend_is_a_clear_error():
    # Stands for a Keras that runs on TensorFlow, which nothing here installs.
    result = run("""
        import sys, types
        sys.modules["keras"] = keras = types.ModuleType("keras")
        keras.config = types.SimpleNamespace(backend=lambda: "tensorflow")
        import vggtorch
    """)
    assert result.returncode != 0
    assert "Keras already runs on 'tensorflow'. Import vggtorch before keras" in result.stderr


def test_a_backend_chosen_after_importing_vggtorch_is_a_clear_error(tmp_path):
    # Stands for a Keras that runs on JAX, which nothing here installs.
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").write_text(
        "import os, types\n"
        "config = types.SimpleNamespace(backend=lambda: os.environ['KERAS_BACKEND'])"
    )
    code = "import os, vggtorch; os.environ['KERAS_BACKEND'] = 'jax'; import keras"
    result = run(code, PYTHONPATH=str(tmp_path))
    assert "Keras already runs on 'jax'" in result.stderr


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    result = run("""
        import sys
        from vggtorch.cli import main
        for options in (["-h"], ["finetune", "--help"], ["weights", "-h"]):
            assert main(options) == 0
        assert not {"keras", "torch", "PIL", "numpy", "h5py", "accelerate"} & set(sys.modules)
    """)
    assert result.stdout.count("Usage: vggtorch") == 3, result.stderr


def test_dir_shows_the_public_names_and_no_others():
    names = dir(vt)
    assert names == sorted(names) == sorted(vt.__all__)
    assert {"VGG16", "truncate", "finetune", "TrainConfig"} <= set(names)
    assert not {"os", "sys", "models", "surgery", "lazy_loader"} & set(names)
    assert all(callable(getattr(vt, name)) for name in names)


@pytest.mark.parametrize("name", vt.__all__)
def test_every_public_name_has_an_example(name):
    assert ">>> " in (getattr(vt, name).__doc__ or "")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No vggtorch attribute VGG15"):
        vt.VGG15  # type: ignore[attr-defined]  # noqa: B018


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that stands for site-packages, with what a build of the checkout puts there."""

    def install(kind):
        folder = tmp_path_factory.mktemp(kind)
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.chdir(ROOT)
        wheel = getattr(hatchling.build, f"build_{kind}")(str(folder))
        monkeypatch.undo()
        with zipfile.ZipFile(folder / wheel) as archive:
            archive.extractall(folder)
        return folder

    return install


@pytest.mark.slow
def test_a_wheel_holds_every_room_and_runs_by_itself(site, saved, tmp_path):
    """And Keras loads our models where our own code imports it first."""
    folder = site("wheel")
    package = Path(vt.__file__).parent
    found = {p.relative_to(folder).as_posix() for p in folder.glob("vggtorch/**/*.*")}
    assert found == {
        f"vggtorch/{p.relative_to(package).as_posix()}"
        for p in package.glob("**/*.*")
        if p.suffix in (".py", ".pyi", ".typed")
    }
    (info,) = folder.glob("*.dist-info")
    assert "vggtorch = vggtorch.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {vt.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    result = run(
        f"""
        import vggtorch.keras_graph, keras
        print(vggtorch.__file__, type(keras.saving.load_model({saved!r})))
        from vggtorch.cli import main
        main(['inspect', {saved!r}])
        """,
        cwd=tmp_path,
        KERAS_BACKEND="torch",
        PYTHONPATH=str(folder),
    )
    assert result.stdout.startswith(str(folder)), result.stderr
    assert "OxfordModel" in result.stdout and "block1_conv1" in result.stdout


def test_an_editable_install_works_from_the_folder_that_holds_the_checkout(site, tmp_path):
    folder = site("editable")
    (tmp_path / "vggtorch" / "vggtorch").mkdir(parents=True)  # looks like a namespace package
    libraries = Path(lazy_loader.__file__).parent.parent
    result = run(
        f"import site; site.addsitedir({str(folder)!r}); import vggtorch; print(vggtorch.__file__)",
        "-S",  # without the paths of what is installed already
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join([str(libraries)]),
    )
    assert result.stdout.strip() == str(ROOT / "vggtorch" / "__init__.py"), result.stderr


def test_the_installed_version_is_the_packages():
    assert version("vggtorch") == vt.__version__
