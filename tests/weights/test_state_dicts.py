"""State dicts under the names and in the places that torch's ecosystem puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import assert_same
from torch import nn

from vggtorch.weights import sources


class Small(nn.Module):
    """torchvision's names, with a classifier of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    network = Small()
    network(torch.rand(2, 3, 8, 8))  # moving statistics
    return network


def read(path: Path, saved: Any) -> sources.Checkpoint:
    torch.save(saved, path)
    return sources.read(path)


class Wrapped(nn.Module):
    """A network as a part of another module, as Lightning's modules and detectors have it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["data_parallel", "inside", "compiled", "ema", "both", "named"])
def test_wrapped_networks_have_the_names_of_the_network(
    tmp_path: Path, small: Small, wrapper: str
) -> None:
    expected = dict(small.state_dict())
    wrapped: nn.Module = small
    if wrapper == "data_parallel":
        wrapped = nn.DataParallel(small)
    elif wrapper == "inside":  # as pytorch/examples wraps VGG: features.module.0.weight
        small.features = nn.DataParallel(small.features)  # type: ignore[assignment]
    elif wrapper == "compiled":
        wrapped = torch.compile(small)  # type: ignore[assignment]
    elif wrapper == "ema":
        wrapped = torch.optim.swa_utils.AveragedModel(small)
    elif wrapper == "both":
        wrapped = Wrapped(model=torch.compile(nn.DataParallel(small)))  # type: ignore[arg-type]
    else:
        wrapped = Wrapped(backbone=small)
    assert wrapper == "inside" or list(wrapped.state_dict()) != list(expected)
    checkpoint = read(tmp_path / "a.pth", wrapped.state_dict())
    assert_same(checkpoint.tensors, expected)
    assert checkpoint.form == "torchvision"


@pytest.mark.parametrize(
    "way",
    ["state_dict", "model_state_dict", "model_state", "model", "net", "network", "anything",
     "state_dict_ema", ("checkpoint", "model")],
)  # fmt: skip
def test_training_checkpoints(tmp_path: Path, small: Small, way: str | tuple[str, str]) -> None:
    expected = dict(small.state_dict())
    optimizer = torch.optim.Adam(small.parameters())
    small(torch.rand(2, 3, 8, 8)).sum().backward()
    expected = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    optimizer.step()
    saved: dict[str, Any] = {"epoch": 3, "best": torch.tensor(0.5), "args": {"lr": 0.1}}
    saved |= {"optimizer": optimizer.state_dict(), "classes": ["cat", "dog"]}
    if isinstance(way, tuple):
        saved[way[0]] = {way[1]: expected}
    else:
        saved[way] = expected
    checkpoint = read(tmp_path / "a.pth", saved)
    assert_same(checkpoint.tensors, expected)
    assert checkpoint.note is None


@pytest.mark.slow
def test_a_lightning_checkpoint(tmp_path: Path, small: Small) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    images = torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8))
    trainer = lightning.Trainer(
        max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(images, 2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = sources.read(tmp_path / "last.ckpt")
    assert_same(checkpoint.tensors, dict(small.state_dict()))


def test_averages_are_taken_where_they_are_alone_and_said_where_not(
    tmp_path: Path, small: Small
) -> None:
    plain = dict(small.state_dict())
    averaged = {key: tensor * 2 for key, tensor in plain.items() if tensor.ndim}
    checkpoint = read(tmp_path / "a.pth", {"state_dict_ema": averaged, "state_dict": plain})
    assert_same(checkpoint.tensors, plain)
    assert checkpoint.note is not None
    assert "['state_dict'] was taken, and not ['state_dict_ema']" in checkpoint.note
    assert_same(read(tmp_path / "b.pth", {"model_ema": averaged}).tensors, averaged)


def test_several_networks_are_refused_and_never_called_damaged(
    tmp_path: Path, small: Small
) -> None:
    state = dict(small.state_dict())
    with pytest.raises(ValueError, match=r"holds several state_dicts: \['G'\], \['D'\]") as caught:
        read(tmp_path / "a.pth", {"G": state, "D": state})
    assert "damaged" not in str(caught.value)
    with pytest.raises(ValueError, match=r"a\.pth can't be loaded: it holds a list, and no state"):
        read(tmp_path / "a.pth", [torch.zeros(2)])


def test_networks_side_by_side_keep_their_names_and_averages_are_left(
    tmp_path: Path, small: Small
) -> None:
    other = Small()
    two = Wrapped(left=small, right=nn.DataParallel(other))
    checkpoint = read(tmp_path / "a.pth", two.state_dict())
    expected = {f"left.{key}": tensor for key, tensor in small.state_dict().items()}
    expected |= {f"right.{key}": tensor for key, tensor in other.state_dict().items()}
    assert_same(checkpoint.tensors, expected)
    with_parts_of_other_words = Wrapped(semantic=small, swapped=other)
    checkpoint = read(tmp_path / "b.pth", with_parts_of_other_words.state_dict())
    assert checkpoint.note is None and "semantic.features.0.weight" in checkpoint.tensors
    mean_teacher = Wrapped(student=small, teacher=other)
    checkpoint = read(tmp_path / "b.pth", mean_teacher.state_dict())
    assert_same(checkpoint.tensors, dict(small.state_dict()))
    assert checkpoint.note is not None
    assert "'student.' was taken, and not 'teacher.'. To take another" in checkpoint.note
    counted = {**small.state_dict(), "tp": torch.zeros(3, dtype=torch.long)}
    checkpoint = read(tmp_path / "c.pth", counted)
    assert_same(checkpoint.tensors, dict(small.state_dict()))
    assert checkpoint.note == "Whole numbers that are no weights were left: tp."
    whole = {**small.state_dict(), "classifier.weight": torch.zeros(2, 4, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"classifier.weight has dtype torch.int8, expected float"):
        read(tmp_path / "d.pth", whole)


def test_torchvisions_features_alone_and_under_another_name(tmp_path: Path) -> None:
    """torch.save(vgg.features.state_dict()), and nn.Sequential(vgg.features, ..., nn.Linear)."""
    import torchvision

    with torch.device("meta"):
        vgg = torchvision.models.vgg11()
    features = {key: torch.zeros(t.shape) for key, t in vgg.features[:6].state_dict().items()}
    expected = {f"features.{key}": tensor for key, tensor in features.items()}
    assert_same(read(tmp_path / "a.pth", features).tensors, expected)
    head = {"2.weight": torch.zeros(3, 5)}
    sequential = {f"0.{key}": tensor for key, tensor in features.items()} | head
    assert_same(read(tmp_path / "a.pth", sequential).tensors, expected | head)
    named = {f"encoder.{key}": tensor for key, tensor in features.items()} | {
        "fc.bias": head["2.weight"]
    }
    assert_same(read(tmp_path / "a.pth", named).tensors, expected | {"fc.bias": head["2.weight"]})


def test_whole_modules_are_refused_unread(tmp_path: Path, small: Small) -> None:
    with pytest.raises(ValueError, match=r"a\.pth can't be loaded: it asks for '.*Small'.*state_"):
        read(tmp_path / "a.pth", small)


def test_what_is_in_memory(small: Small) -> None:
    state = small.state_dict()
    checkpoint = sources.from_memory({"epoch": 1, "model": state})
    assert_same(checkpoint.tensors, dict(state))
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    assert_same(sources.from_memory(arrays).tensors, dict(state))
    with pytest.raises(ValueError, match=r"features\.0\.bias holds NaN or infinite values"):
        sources.from_memory({**state, "features.0.bias": torch.full((4,), torch.nan)})
    swapped = {key: array.astype(array.dtype.newbyteorder()) for key, array in arrays.items()}
    assert_same(sources.from_memory(swapped).tensors, dict(state))
    repeated = {"a.weight": torch.ones(1).expand(4)}
    assert_same(sources.from_memory(repeated).tensors, repeated)
    with pytest.raises(ValueError, match="no state_dict"):
        sources.from_memory({})
    with pytest.raises(ValueError, match=r"'a\.weight' is an array of object, expected numbers"):
        sources.from_memory({"a.weight": np.array([None])})
    with pytest.raises(ValueError, match=r"a\.weight is sparse, quantized or without values"):
        sources.from_memory({"a.weight": torch.ones(2, device="meta")})
