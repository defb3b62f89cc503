"""Data, models and options that don't fit each other."""

from __future__ import annotations

import dataclasses

import keras
import pytest
import tiny

from vggtorch.training.loop import finetune
from vggtorch.training.rate_search import find_learning_rate


def test_classes_that_differ(images, config, tmp_path):
    other = tiny.pictures(tmp_path / "other")
    (other / "red").rename(other / "violet")
    with pytest.raises(
        ValueError,
        match=r"only in the training data \['red'\], only in the validation data \['violet'\]",
    ):
        finetune(tiny.network(), images, other, config)


def test_a_model_with_another_number_of_classes(images, config):
    with pytest.raises(
        ValueError, match=r"has 3 classes \(blue, green, red\), and tiny puts out 4"
    ):
        finetune(tiny.network(4), images, config=config)
    with pytest.raises(ValueError, match=r"expected \(N, classes\). Stack a head"):
        finetune(tiny.network(None), images, config=config)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("verb", [finetune, find_learning_rate])
def test_a_model_that_is_no_graph_is_refused(config, verb):
    with pytest.raises(ValueError, match=f"subclassed model .*{verb.__name__} needs a Functional"):
        verb(Subclassed(), tiny.dataset(), config=config)
    with pytest.raises(ValueError, match="has no graph yet"):
        verb(keras.Sequential([keras.layers.Dense(3)]), tiny.dataset(), config=config)


def test_activity_regularisers_are_refused(config):
    model = tiny.network()
    model.get_layer("block1_conv1").activity_regularizer = keras.regularizers.L2(0.1)
    with pytest.raises(ValueError, match="block1_conv1 have an activity_regularizer"):
        finetune(model, tiny.dataset(), config=config)


def test_options_that_the_data_contradicts(images, config):
    with pytest.raises(ValueError, match="Received patience=2 and no validation data"):
        finetune(tiny.network(), tiny.dataset(), config=dataclasses.replace(config, patience=2))
    with pytest.raises(ValueError, match="cache_copies=2 with augment='none'"):
        finetune(tiny.network(), images, config=dataclasses.replace(config, cache_copies=2))
    model = tiny.network()
    model.trainable = False
    with pytest.raises(ValueError, match="No layer of tiny trains in epoch 1. Unfreeze some"):
        finetune(model, images, config=config)


@pytest.mark.slow
def test_unreadable_images_are_skipped_if_asked(config, tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    (folder / "red" / "3.png").write_text("no image")
    with pytest.raises(ValueError, match="1 of 24 images"):
        finetune(tiny.network(), folder, config=config)
    with pytest.warns(UserWarning, match="They are left out"):
        finetune(tiny.network(), folder, config=dataclasses.replace(config, on_unreadable="skip"))


def test_a_configuration_in_another_place_or_form_is_refused(images, config):
    with pytest.raises(ValueError, match="a TrainConfig as data. Pass it by its name: config="):
        finetune(tiny.network(), images, config, output_dir=config.output_dir)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"config=\{'epochs': 1\}; expected a TrainConfig, or"):
        finetune(tiny.network(), images, config={"epochs": 1})  # type: ignore[arg-type]


def test_settings_that_would_change_nothing_are_refused(images, config):
    def tried(**settings):
        finetune(tiny.network(), images, config=config, **settings)

    with pytest.raises(ValueError, match="in epoch 1 nothing trains that didn't before. Name a lo"):
        tried(freeze="block1_pool", unfreeze={1: "predictions"})
    with pytest.raises(ValueError, match="weight_decay=0.5 with optimizer='rprop', which has none"):
        tried(optimizer="rprop", weight_decay=0.5)


@pytest.mark.parametrize("shape", [(16, 16, 1), (3, 16, 16), (768,)])
def test_a_model_of_other_images_than_files_give_is_refused(images, config, shape):
    layers = keras.layers
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"; files give RGB images, height x width x 3"):
        finetune(model, images, config=dataclasses.replace(config, image_size=None))


def test_a_model_of_two_inputs_is_refused(images, config):
    one, other = keras.Input((4,)), keras.Input((4,))
    two = keras.Model([one, other], keras.layers.Dense(3)(one + other))
    with pytest.raises(ValueError, match="takes 2 inputs; expected one, of images"):
        finetune(two, images, config=config)
