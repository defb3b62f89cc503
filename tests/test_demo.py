"""The tutorial's own code, its typos mended, and the demo that runs it."""

import keras
import numpy as np
import pytest
from keras.layers import Conv2D, Dense, Dropout, Flatten, MaxPooling2D
from keras.models import Model

import vggtorch as vt
from vggtorch import demo


@pytest.fixture(scope="module")
def vgg_model():
    return vt.VGG16(weights="oxford", include_top=False, input_shape=(160, 160, 3))


def test_create_a_new_network_with_bottom_layers_taken_from_vgg(vgg_model):
    layer_dict = {layer.name: layer for layer in vgg_model.layers}
    x = layer_dict["block2_pool"].output
    x = Conv2D(filters=64, kernel_size=(3, 3), activation="relu")(x)
    x = MaxPooling2D(pool_size=(2, 2))(x)
    x = Flatten()(x)
    x = Dense(256, activation="relu")(x)
    x = Dropout(0.5)(x)
    x = Dense(10, activation="softmax")(x)
    custom_model = Model(inputs=vgg_model.input, outputs=x)
    for layer in custom_model.layers[:7]:
        layer.trainable = False
    custom_model.compile(loss="categorical_crossentropy", optimizer="rmsprop", metrics=["accuracy"])
    assert custom_model.layers[6].name == "block2_pool"
    assert len(custom_model.trainable_variables) == 6

    images = np.random.default_rng(0).uniform(size=(4, 160, 160, 3)).astype("float32")
    before = vgg_model.get_layer("block1_conv1").get_weights()[0].copy()
    custom_model.fit(images, np.eye(10)[:4], epochs=1, verbose=0)
    np.testing.assert_array_equal(vgg_model.get_layer("block1_conv1").get_weights()[0], before)
    for layer in vgg_model.layers:
        layer.trainable = True


def test_remove_multiple_layers_and_insert_a_new_one_in_the_middle(vgg_model):
    layers = list(vgg_model.layers)
    new_conv = Conv2D(
        filters=64, kernel_size=(5, 5), name="new_conv", padding="same", activation="relu"
    )(layers[0].output)
    x = new_conv
    for i in range(3, len(layers)):
        layers[i].trainable = False
        x = layers[i](x)
    result_model = Model(inputs=vgg_model.input, outputs=x)
    assert [layer.name for layer in result_model.layers][:3] == [
        layers[0].name,
        "new_conv",
        "block1_pool",
    ]
    for layer in layers:
        layer.trainable = True


def test_the_tutorials_way_works_on_the_results_of_surgery(vgg_model):
    head = [Flatten(), Dense(10, activation="softmax", name="top")]
    custom = vt.stack(vt.truncate(vgg_model, "block2_pool"), head)
    assert [layer.name for layer in custom.layers[:7]] == [
        layer.name for layer in vgg_model.layers[:7]
    ]
    again = Model(inputs=custom.input, outputs=custom.get_layer("block1_pool").output)
    images = np.random.default_rng(0).uniform(0, 255, (1, 160, 160, 3)).astype("float32")
    expected = Model(vgg_model.input, vgg_model.get_layer("block1_pool").output)(images)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(again(images)), keras.ops.convert_to_numpy(expected)
    )


@pytest.mark.slow
def test_the_demo_runs_end_to_end(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PER_CLASS", 2)
    monkeypatch.setattr(demo, "TEST_IMAGES", 20)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "BEST_FIRST", ("oxford",))
    result = demo.run()
    assert result.weight_set == "oxford"
    assert result.similarity["random"] < result.similarity["compose"] <= 1
    printed = capsys.readouterr().out
    assert "block2_pool" in printed and "test accuracy" in printed


def test_the_demo_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'vggtorch\[demo\]'"):
        demo.run()
