"""Data sets of Hugging Face and WebDataset train as the same images in a folder do."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from vggtorch.training import data, items, loaders
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.run import read_data


@pytest.fixture(scope="module")
def shard(images, tmp_path_factory):
    """The images of the folder as one of WebDataset's shards, and its index."""
    folder = data.read_folder(images, 16)
    path = tmp_path_factory.mktemp("shards") / "images-000000.tar"
    with tarfile.open(path, "w") as tar:
        for i, (image, label) in enumerate(zip(folder.paths, folder.labels, strict=True)):
            for ending, content in (("png", image.read_bytes()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:06}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def hugging_face(images):
    cache = str(images.parent / "cache")
    return datasets.load_dataset(
        "imagefolder", data_dir=str(images), split="train", cache_dir=cache
    )


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("plain"))
    config = TrainConfig(epochs=3, batch_size=6, image_size=16, output_dir=folder)
    return finetune(tiny.network(), Pairs(images), config=config)


class Pairs(torch.utils.data.Dataset):
    """The folder's images as PIL images, as torchvision's ImageFolder gives them."""

    def __init__(self, images):
        self.folder = data.read_folder(images, 16)
        self.classes = self.folder.classes

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index) -> Any:
        return Image.open(self.folder.paths[index]), self.folder.labels[index]


@pytest.mark.slow
def test_a_dataset_of_hugging_face_trains_as_pairs_do(hugging_face, plain, config):
    history = finetune(tiny.network(), hugging_face, config=config)
    assert history.classes == ("blue", "green", "red")
    assert tiny.curve(history) == tiny.curve(plain)


@pytest.mark.slow
def test_a_dictionary_of_splits_is_a_data_set(hugging_face, config):
    first = hugging_face.train_test_split(0.25, seed=0)
    second = first["train"].train_test_split(0.25, seed=0)
    splits = datasets.DatasetDict(
        train=second["train"], validation=second["test"], test=first["test"]
    )
    history = finetune(tiny.network(), splits, config=config)
    assert history.evaluation is not None and history.test_evaluation is not None
    assert history.test_evaluation.labels.tolist() == first["test"]["label"]
    assert history.evaluation.labels.tolist() == second["test"]["label"]
    with pytest.raises(ValueError, match="dictionary of 'a', 'train'; expected train, and perhaps"):
        read_data({"a": 1, "train": 2}, None, config, data.images_for(tiny.network(), config))


def test_a_loader_with_a_function_of_its_own_may_give_a_dictionary(hugging_face, config):
    def collate(rows):
        pixels = [torch.from_numpy(np.array(row["image"].resize((16, 16)))) for row in rows]
        return {"pixel_values": torch.stack(pixels), "labels": [row["label"] for row in rows]}

    loader = DataLoader(hugging_face, batch_size=6, collate_fn=collate)
    source, plan = loaders.as_source(loader, 0, 99)
    images, labels = source[[(3, 0), (20, 0)]]
    assert images.shape == (2, 16, 16, 3) and images.dtype == torch.uint8
    assert labels.tolist() == hugging_face[[3, 20]]["label"]
    assert len(plan(0)) == 4


@pytest.mark.slow
def test_shards_of_webdataset_by_index_train_as_pairs_do(shard, plain, config, tmp_path):
    found: Any = datasets.load_dataset(
        "webdataset", data_files={"train": str(shard)}, split="train", cache_dir=str(tmp_path)
    )
    history = finetune(tiny.network(), found, config=config)
    assert tiny.curve(history) == tiny.curve(plain)


@pytest.mark.slow
def test_shards_of_webdataset_as_a_stream_train_as_pairs_do(shard, plain, config):
    stream = webdataset.WebDataset(str(shard), shardshuffle=False).decode("pil")
    pairs: Any = stream.to_tuple("png", "cls")
    with pytest.warns(UserWarning, match=r"Read 24 images of WebDataset into memory \(0 MiB\)"):
        history = finetune(tiny.network(), pairs, config=config)
    assert tiny.curve(history) == tiny.curve(plain)
    again = dataclasses.replace(config, resume=True)
    loader: Any = DataLoader(pairs, batch_size=None, num_workers=1)
    with pytest.warns(UserWarning, match="Read 24 images of DataLoader"):
        assert tiny.curve(finetune(tiny.network(), loader, config=again)) == tiny.curve(plain)


def test_a_stream_of_batches_is_taken_apart():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ((torch.full((4, 4, 3), i, dtype=torch.uint8), i % 3) for i in range(10))

    with pytest.warns(UserWarning, match="Read 10 images"):
        source, plan = loaders.as_source(DataLoader(Stream(), batch_size=4), 0, 99)
    images, labels = source[[(i, 0) for i in range(10)]]
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert [len(batch) for batch in plan(0)] == [4, 4, 2]


def test_a_stream_without_an_end_is_refused(monkeypatch):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(64, 64, 3), 0

    monkeypatch.setattr(items, "MOST", 2**20)
    with pytest.raises(ValueError, match=r"stream of more than .* images \(21 so far\), or one wi"):
        loaders.as_source(Endless(), 0, 1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": 1, "text": 2}, "dictionaries with 'image', 'text'; expected one label among"),
        ({"image": 1, "img": 1, "label": 2}, "'image', 'img', 'label'; expected one image among"),
        ((1, 2, 3), "gives a tuple of 3; expected"),
        (5, r"gives a int; expected \(image, label\)"),
    ],
)
def test_items_that_are_neither_are_refused(item, message):
    with pytest.raises(ValueError, match=message):
        items.image_and_label(item)


def test_labels_that_are_text_are_refused():
    source, _ = loaders.as_source([(torch.zeros(4, 4, 3), "cat")], 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels are text \('cat'\); expected numbers from 0"):
        source[[(0, 0)]]
    assert items.label_names(TensorDataset(torch.zeros(1))) == ()
