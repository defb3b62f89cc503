from __future__ import annotations

import itertools
import random
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from vggtorch.models import preprocess
from vggtorch.training import data, loaders, reading


def test_folder_reads_what_torchvisions_image_folder_lists(tmp_path):
    from torchvision.datasets import ImageFolder

    folder = data.read_folder(tiny.pictures(tmp_path / "data"), size=16)
    reference = ImageFolder(tmp_path / "data")
    assert list(folder.classes) == reference.classes
    assert sorted(zip(map(str, folder.paths), folder.labels, strict=True)) == sorted(
        reference.samples
    )


def test_plain_image_is_what_preprocess_makes_of_the_file(tmp_path):
    folder = data.read_folder(tiny.pictures(tmp_path / "data", size=40), size=16, augment="crop")
    images, labels = folder[[(3, 0), (20, 0)]]
    expected = preprocess([str(folder.paths[3]), str(folder.paths[20])], "oxford", size=16)
    found = data.as_input(images, "oxford")
    # Resized as a tensor here and by PIL there: a rounding apart.
    np.testing.assert_allclose(found.numpy(), expected, atol=1.01)
    assert labels.tolist() == [folder.labels[3], folder.labels[20]]


def test_as_input_leaves_floats_alone_and_follows_the_weight_set():
    image = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    floats = torch.randn(2, 5, 4, 3)
    assert data.as_input(floats, "imagenet") is floats
    assert torch.equal(data.as_input(image, None), image.float())
    reference = keras.applications.vgg16.preprocess_input(image.numpy().astype(np.float32))
    np.testing.assert_allclose(data.as_input(image, "oxford").numpy(), reference, atol=1e-4)


@pytest.mark.parametrize("augment", ["flip", "crop", "trivial"])
def test_an_augmentation_is_always_the_same_and_odd_ones_are_mirrored(tmp_path, augment):
    folder = data.read_folder(tiny.pictures(tmp_path / "data"), size=16, augment=augment, seed=5)
    first, _ = folder[[(1, 3), (2, 4)]]
    torch.rand(7)
    again, _ = folder[[(1, 3), (2, 4)]]
    assert torch.equal(first, again)
    plain, _ = folder[[(1, 0), (2, 0)]]
    if augment == "flip":
        assert torch.equal(first[0], plain[0].flip(1))
        assert torch.equal(first[1], plain[1])
    else:
        assert not torch.equal(first, plain)
        assert not torch.equal(first[1], folder[[(2, 6)]][0][0])


def test_augmentations_of_two_epochs_are_mirror_images_of_each_other():
    epochs = [[data.augmentation_index(i, epoch) for i in range(6)] for epoch in range(4)]
    for one, next_one in itertools.pairwise(epochs):
        assert all((a + b) % 2 == 1 for a, b in zip(one, next_one, strict=True))
    assert 0 not in sum(epochs, [])


def test_unreadable_images_stop_or_are_named_and_skipped(tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    whole = (folder / "red" / "1.png").read_bytes()
    (folder / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"2 of 25 images .* can't be read: .*page.jpg.*1.png"):
        data.read_folder(folder, 16)
    with pytest.warns(UserWarning, match=r"2 of 25 .*page.jpg.*red/1.png.*left out"):
        found = data.read_folder(folder, 16, on_unreadable="skip")
    assert len(found) == 23
    assert not {"1.png", "page.jpg"} & {p.name for p in found.paths if p.parent.name != "green"} - {
        "1.png"
    }
    assert folder / "red" / "1.png" not in found.paths


def test_folders_that_cannot_be_right(tmp_path):
    with pytest.raises(ValueError, match="none. Expected a folder with a subfolder"):
        data.read_folder(tmp_path / "none", 16)
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="has no subfolders. Expected one for each class"):
        data.read_folder(tmp_path / "flat", 16)
    folder = tiny.pictures(tmp_path / "data")
    (folder / "violet").mkdir()
    with pytest.raises(ValueError, match="No images for violet in .*add some, or remove"):
        data.read_folder(folder, 16)


def test_a_class_with_only_unreadable_images_is_empty(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    (folder / "red" / "0.png").write_text("no image")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="No images for red"),
    ):
        data.read_folder(folder, 16, on_unreadable="skip")


def test_digest_follows_content_not_time(tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    before = data.read_folder(folder, 16).digest
    path = folder / "red" / "0.png"
    pixels = np.array(Image.open(path))
    path.touch()
    assert data.read_folder(folder, 16).digest == before
    Image.fromarray(255 - pixels).save(path)
    assert data.read_folder(folder, 16).digest != before


def test_hold_out_takes_a_share_of_every_class(tmp_path):
    folder = data.read_folder(tiny.pictures(tmp_path / "data", each=10), 16, augment="flip")
    train, held = data.hold_out(folder, 0.3)
    assert np.bincount(held.labels).tolist() == [3, 3, 3]
    assert np.bincount(train.labels).tolist() == [7, 7, 7]
    assert set(train.paths) | set(held.paths) == set(folder.paths)
    assert held.augment == "none"
    assert data.hold_out(folder, 0.3)[1].paths == held.paths
    assert len({folder.digest, train.digest, held.digest}) == 3


def test_hold_out_needs_two_images_of_each_class(tmp_path):
    folder = data.read_folder(tiny.pictures(tmp_path / "data", each=1), 16)
    with pytest.raises(ValueError, match="Class 'blue' has one image, which would be held out"):
        data.hold_out(folder, 0.2)


class Noisy(Dataset):
    """Images with all three kinds of random numbers in them."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = torch.rand(3, 4, 4) + np.random.rand() + random.random()
        return noise + index, index % 3


def test_a_dataset_gives_the_same_for_the_same_augmentation_and_leaves_random_numbers_alone():
    source, _ = loaders.as_source(Noisy(), seed=1, batch_size=4)
    states = random.random(), np.random.rand(), torch.rand(())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    first, labels = source[[(4, 1), (5, 1)]]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected != states
    assert first.shape == (2, 4, 4, 3)  # NCHW -> NHWC
    assert labels.tolist() == [1, 2]
    assert torch.equal(first[1], source[[(5, 1)]][0][0])
    assert not torch.equal(first[1], source[[(5, 2)]][0][0])


def test_a_dataset_may_hold_pil_images():
    dataset: Any = [(Image.new("L", (5, 4), 100), 1)] * 3
    source, _ = loaders.as_source(dataset, seed=0, batch_size=2)
    images, _ = source[[(0, 0)]]
    assert images.shape == (1, 4, 5, 3)
    assert images.dtype == torch.uint8


def test_shuffled_is_a_new_permutation_each_epoch():
    plan = data.shuffled(10, 4, seed=3)
    assert [len(batch) for batch in plan(0)] == [4, 4, 2]
    assert sorted(sum(plan(0), [])) == list(range(10))
    assert plan(0) == data.shuffled(10, 4, seed=3)(0)
    assert plan(0) != plan(1) != data.shuffled(10, 4, seed=4)(1)


def test_a_loaders_own_sampler_decides_and_repeats_itself():
    sampler = WeightedRandomSampler([0.0, 1.0, 1.0] + [0.0] * 7, 8, generator=torch.Generator())
    loader = DataLoader(Noisy(), batch_size=3, sampler=sampler)
    _, plan = loaders.as_source(loader, seed=2, batch_size=99)
    first = plan(0)
    assert [len(batch) for batch in first] == [3, 3, 2]
    assert set(sum(first, [])) <= {1, 2}
    assert plan(1) != first
    assert plan(0) == first


def test_loaders_without_batches_and_datasets_without_length_are_refused():
    with pytest.raises(ValueError, match="Received a DataLoader with batch_size=None"):
        loaders.as_source(DataLoader(Noisy(), batch_size=None), 0, 1)
    endless: Any = type("Endless", (Dataset,), {"__getitem__": lambda self, i: i})()
    with pytest.raises(ValueError, match="Received Endless, which has no length"):
        loaders.as_source(endless, 0, 1)


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    folder = data.read_folder(tiny.pictures(tmp_path / "data"), 16, augment="trivial")
    keys = [[(i, 3), (i + 1, 4)] for i in range(4)]
    alone = [x for x, _ in reading.loaded(folder, keys, num_workers=0)]
    helped = [x for x, _ in reading.loaded(folder, keys, num_workers=2)]
    assert all(map(torch.equal, alone, helped))


def test_an_image_that_has_become_another_is_named(tmp_path):
    """Its features would stand for those of the image that was checked."""
    folder = data.read_folder(tiny.pictures(tmp_path / "data"), 16)
    training, _ = data.hold_out(folder, 0.2)
    path = training.paths[0]
    content = path.read_bytes()
    path.write_bytes(training.paths[1].read_bytes())
    for source in (folder, training):
        place = source.paths.index(path)
        with pytest.raises(ValueError, match=r"png could be read .* \(it holds another image\)"):
            source[[(place, 0)]]
    path.write_bytes(content)  # the same again, at another time
    assert len(training[[(0, 0)]][0]) == 1


def test_an_image_that_vanishes_is_named(tmp_path):
    folder = data.read_folder(tiny.pictures(tmp_path / "data"), 16)
    folder.paths[2].unlink()
    with pytest.raises(ValueError, match=r"2.png could be read when training began .* resume"):
        folder[[(2, 0)]]
