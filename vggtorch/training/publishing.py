"""A trained model onto the Hugging Face hub, in the form that Keras reads from there."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras

from vggtorch import files
from vggtorch.paths import as_path
from vggtorch.training.card import LOADING
from vggtorch.weights import check_archive, folder_to_hub

NEEDED = ("model.keras", "config.json", "README.md")  # of a run's folder
# By the client, since Keras 3.15 opens hf://owner/name only where TensorFlow is installed.
ON_HUB = """    import keras
    from huggingface_hub import snapshot_download

    model = keras.saving.load_model(snapshot_download("{}"))
"""


def push_to_hub(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    message: str = "Model fine-tuned by vggtorch",
) -> str:
    """Push a run's model to the Hugging Face hub; `load_model("hf://owner/name")` gets it back.

    Up go the card, the model as Keras keeps it as a folder, `config.json` with labels and geometry
    by timm's names, and `classes.json`. The report, which shows images, and the checkpoints stay.

    >>> import vggtorch as vt
    >>> vt.push_to_hub("run", "ann/cats")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: run has no model.keras and no config.json and no README.md. Expected the folder ...

    Args:
        folder: of a run that has ended, or what `save_trained` has written.
        repository: `owner/name`. Made where there is none.
        private: whether only the owner sees it; None leaves it as it is.
        license: the hub's name of one, such as `mit`, for the card; None leaves what stands there,
            which is that of the pretrained weights.
        revision: a branch; None for the main one.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: no such folder or name, or a card that the hub can't read.
        OSError: the hub can't be reached, or refuses. Who pushes is known by `hf auth login` or
            HF_TOKEN.
    """
    if isinstance(folder, keras.Model):
        raise ValueError(
            f"Received the model {folder.name}; expected the folder of a run, which has its card "
            f"(vt.save_trained(history, folder) writes one). Keras pushes a bare model: "
            f"model.save('hf://{repository}')."
        )
    folder = as_path(folder)
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}. Expected the folder of a run that has "
            f"ended (vt.save_trained(history, folder) writes one)."
        )
    with tempfile.TemporaryDirectory() as temporary:
        ready = Path(temporary)
        _unpack(folder, ready)
        address = repository.removeprefix("hf://").partition("@")[0]
        (ready / "README.md").write_text(_card(folder, address, license), encoding="utf-8")
        if (folder / "classes.json").is_file():
            shutil.copy(folder / "classes.json", ready)
        return folder_to_hub(ready, repository, private=private, revision=revision, message=message)


def _unpack(folder: Path, ready: Path) -> None:
    """A .keras file as the folder that Keras reads from the hub, with our part of config.json."""
    path = folder / "model.keras"
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            for name in ("config.json", "metadata.json", "model.weights.h5"):
                archive.extract(name, ready)
        inside = json.loads((ready / "config.json").read_text(encoding="utf-8"))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {files.first_line(error)}") from error
    try:
        ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        merged = {**ours, **inside}  # no name is in both
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    (ready / "config.json").write_text(json.dumps(merged, indent=2), encoding="utf-8")


def _card(folder: Path, repository: str, license: str | None) -> str:
    """The run's card, which loads the model from where it will be; ValueError if unreadable."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    text = path.read_text(encoding="utf-8").replace(LOADING, ON_HUB.format(repository))
    try:
        card: Any = ModelCard(text)
    except Exception as error:  # what its parser makes of foreign YAML
        raise ValueError(
            f"The front matter of {path} can't be read: {files.first_line(error)}. Mend it, or let "
            f"the run write its card anew."
        ) from error
    if license is not None:
        card.data.license = license
        return str(card)
    return text
