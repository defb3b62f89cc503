from __future__ import annotations

import os
import shutil
from collections import namedtuple

import keras
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator

from vggtorch.training import data, features, loaders
from vggtorch.training.config import TrainConfig
from vggtorch.training.identity import network_digest
from vggtorch.training.loop import finetune


def prefix_of(model):
    return keras.Model(model.inputs, features.frozen_end(model))


def cached(model, source, folder, *, prefix=None, cache_dtype="float32", **changed):
    return features.cached_features(
        prefix or prefix_of(model),
        source,
        TrainConfig(cache_dir=str(folder), cache_dtype=cache_dtype),
        accelerator=Accelerator(),
        advance=lambda images: None,
        **{"weights": None, "copies": 1} | changed,
    )


@pytest.fixture
def folder(tmp_path):
    return data.read_folder(tiny.pictures(tmp_path / "data"), 16, augment="flip")


def frozen(until="block2_pool", **options):
    model = tiny.network(**options)
    for layer in model.layers[: model.layers.index(model.get_layer(until)) + 1]:
        layer.trainable = False
    return model


@pytest.mark.parametrize(
    ("until", "end"),
    [("block1_conv1", "block1_pool"), ("block1_pool", "block1_pool"), ("block2_pool", "flatten")],
)
def test_the_prefix_goes_on_through_layers_without_weights_but_not_through_dropout(until, end):
    model = frozen(until)
    assert features.frozen_end(model) is model.get_layer(end).output


def test_nothing_frozen_and_all_frozen():
    model = tiny.network()
    assert features.frozen_end(model) is model.layers[1].output  # rescaling has no weights
    model.trainable = False
    assert features.frozen_end(model) is model.get_layer("flatten").output  # then dropout


def test_batch_norm_ends_the_prefix_unless_frozen():
    model = frozen("block2_pool", batch_norm=True)
    assert features.frozen_end(model) is model.get_layer("flatten").output
    model.get_layer("block2_bn1").trainable = True
    assert features.frozen_end(model) is model.get_layer("block2_conv1").output


def test_the_prefix_of_a_branched_network_ends_where_all_of_it_passes():
    x = image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", trainable=False, name="stem")(x)
    a = keras.layers.Conv2D(4, 3, padding="same", trainable=False, name="a")(x)
    b = keras.layers.Conv2D(4, 1, name="b")(x)
    y = keras.layers.Add(name="add")([a, b])
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(y))
    assert features.frozen_end(model) is model.get_layer("stem").output
    model.get_layer("b").trainable = False
    assert features.frozen_end(model) is model.outputs[0]


def test_two_parts_make_the_whole_and_leave_no_trace():
    model = frozen()
    config, calls = model.get_config(), [len(layer._inbound_nodes) for layer in model.layers]
    end = features.frozen_end(model)
    x = torch.rand(2, 16, 16, 3)
    first, second = (
        features.between(model.inputs[0], end).eval(),
        features.between(end, model.outputs[0]),
    )
    with torch.no_grad():
        found = second.eval()(first(x))
        np.testing.assert_allclose(found.numpy(), model(x, training=False).numpy(), atol=1e-6)
    assert model.get_config() == config
    assert [len(layer._inbound_nodes) for layer in model.layers] == calls
    own = {id(v.value) for v in model.get_layer("predictions").variables}
    assert own <= {id(p) for p in second.parameters()}


def test_features_are_those_of_the_network_and_read_back(folder, tmp_path):
    model = frozen()
    found = cached(model, folder, tmp_path / "f", copies=2)
    for augmentation in (0, 1):
        keys = [(index, augmentation) for index in (5, 0, 23)]
        images, labels = folder[keys]
        expected = prefix_of(model)(images.float(), training=False).detach()
        values, found_labels = found[keys]
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found_labels, labels)
    assert torch.equal(found[[(5, 2)]][0], found[[(5, 0)]][0])  # modulo the copies
    assert not torch.equal(found[[(5, 1)]][0], found[[(5, 0)]][0])


@pytest.mark.slow
def test_features_are_made_of_those_of_the_layers_below(folder, tmp_path):
    model = frozen()
    low = model.get_layer("block1_pool").output
    below = cached(model, folder, tmp_path / "f", copies=2, prefix=keras.Model(model.inputs, low))
    above = keras.Model(low, features.frozen_end(model))
    found = cached(model, below, tmp_path / "f", copies=2, prefix=above)
    expected = cached(model, folder, tmp_path / "f", copies=2)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.labels, expected.labels)
    assert len({below.digest, found.digest, expected.digest}) == 3


@pytest.mark.slow
def test_what_is_frozen_in_all_epochs_runs_once(config, images, monkeypatch):
    read = []
    real = data.Folder._image

    def image(self, *key):
        read.append(key)
        return real(self, *key)

    monkeypatch.setattr(data.Folder, "_image", image)
    finetune(
        tiny.network(), images, config=config, freeze="flatten",
        unfreeze=((1, "block2_conv1"),), augment="flip", cache_copies=2,
    )  # fmt: skip
    shapes = 3  # one image of each file is read for its shape: training twice, validation
    assert len(read) <= 2 * 18 + 6 + shapes


@pytest.mark.slow
def test_half_precision(folder, tmp_path):
    model = frozen()
    full, half = (
        cached(model, folder, tmp_path / "f", cache_dtype=d) for d in ("float32", "float16")
    )
    assert half.values.dtype == np.float16
    assert half[[(3, 0)]][0].dtype == torch.float32
    torch.testing.assert_close(half[[(3, 0)]][0], full[[(3, 0)]][0], rtol=1e-3, atol=1e-3)
    model.get_layer("block2_conv1").kernel.assign(model.get_layer("block2_conv1").kernel * 1e7)
    with pytest.raises(ValueError, match="half precision ends at 65504. Set cache_dtype='float32'"):
        cached(model, folder, tmp_path / "f", cache_dtype="float16")


def count_runs(monkeypatch):
    runs = []
    real = features._compute

    def counted(*arguments):
        runs.append(1)
        real(*arguments)

    monkeypatch.setattr(features, "_compute", counted)
    return runs


def test_a_second_run_computes_nothing(folder, tmp_path, monkeypatch):
    runs = count_runs(monkeypatch)
    cached(frozen(), folder, tmp_path / "f")
    cached(frozen(), folder, tmp_path / "f")
    assert len(runs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["weight", "cut", "size", "augment", "seed", "copies", "dtype", "preprocessing", "file"]
)
def test_anything_that_matters_makes_another_cache(folder, tmp_path, monkeypatch, what):
    import dataclasses

    cached(frozen(), folder, tmp_path / "f", copies=2)
    runs = count_runs(monkeypatch)
    model, source = frozen(), folder
    options: dict[str, object] = {"copies": 2}
    if what == "weight":
        model.get_layer("block1_conv1").bias.assign([0, 0, 0, 1e-7])
    elif what == "cut":
        model = frozen("block1_pool")
    elif what == "size":
        source = data.read_folder(tmp_path / "data", 24, augment="flip")
        model = frozen(size=24)
    elif what == "augment":
        source = dataclasses.replace(folder, augment="crop")
    elif what == "seed":
        source = dataclasses.replace(folder, seed=9)
    elif what == "copies":
        options = {"copies": 3}
    elif what == "dtype":
        options["cache_dtype"] = "float16"
    elif what == "preprocessing":
        options["weights"] = "oxford"
    elif what == "file":
        shutil.copy(tmp_path / "data" / "red" / "0.png", tmp_path / "data" / "red" / "1.png")
        source = data.read_folder(tmp_path / "data", 16, augment="flip")
    cached(model, source, tmp_path / "f", **options)
    assert len(runs) == 1


def test_a_datasets_content_makes_the_key(tmp_path, monkeypatch):
    runs = count_runs(monkeypatch)
    images = torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8)
    for x in (images, images, images.flip(0)):
        dataset = torch.utils.data.TensorDataset(x, torch.arange(9) % 3)
        cached(frozen(), loaders.as_source(dataset, 0, 4)[0], tmp_path / "f")
    assert len(runs) == 2


def test_the_same_layers_connected_otherwise_make_another_key():
    def branched(swapped):
        keras.utils.set_random_seed(0)
        image = keras.Input((8, 8, 3))
        a, b = keras.layers.Conv2D(3, 1), keras.layers.Conv2D(3, 1)
        first, second = a(image), b(image)
        pair = [second, first] if swapped else [first, second]
        y = keras.ops.flip(keras.layers.Subtract()(pair), axis=1)
        return keras.Model(image, y)

    def digest(swapped):
        return network_digest(branched(swapped), values=True)

    assert digest(False) == digest(False)
    assert digest(False) != digest(True)


def test_no_room_is_said_before_anything_is_computed(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"24 images in 1 copies need .* 0.00 GB are free"):
        cached(frozen(), folder, tmp_path / "f")
    assert not [path for path in (tmp_path / "f").iterdir() if path.suffix != ".lock"]


def test_too_little_memory_for_the_frozen_layers_is_said(folder, tmp_path, monkeypatch):
    class NoMemory(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(features, "between", lambda *_: NoMemory())
    with pytest.raises(ValueError, match="frozen layers on 24 images .* smaller image_size"):
        cached(frozen(), folder, tmp_path / "f")


def test_a_cache_cut_off_half_way_is_not_used(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(frozen(), folder, tmp_path / "f")
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "f").iterdir() if path.suffix != ".lock"]
    runs = count_runs(monkeypatch)
    cached(frozen(), folder, tmp_path / "f")
    assert len(runs) == 1
