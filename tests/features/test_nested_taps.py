"""FeatureExtractor taps the layers of nested models as those of the model that is nested."""

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import pytest
import torch
from keras import layers

from vggtorch.models import as_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def call(model, *, name="outer"):
    """A model in which `model` is nested, with a classifier behind it."""
    image = keras.Input((32, 32, 3))
    pooled = layers.GlobalAveragePooling2D()(model(image))
    return keras.Model(image, layers.Dense(2, name=f"{name}_logits")(pooled), name=name)


@pytest.mark.slow
@pytest.mark.parametrize("tap", ["vgg16/block2_conv2", "block2_conv2", "relu2_2", "vgg16/relu2_2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_layer_in_nested_models_gives_what_it_gives_alone(vgg, images, tap, depth):
    model = call(vgg, name="middle")
    if depth == 2:
        model = keras.Sequential([keras.Input((32, 32, 3)), model, layers.Dense(3, name="last")])
        tap = f"middle/{tap}" if "/" in tap else tap
    alone = vt.FeatureExtractor(vgg, [tap.split("/")[-1]], normalization="imagenet")
    nested = vt.FeatureExtractor(model, [tap], normalization="imagenet")
    gradients = []
    for extractor in (alone, nested):
        x = images.clone().requires_grad_()
        (value,) = extractor(x).values()
        value.square().mean().backward()
        gradients.append((value, x.grad))
    torch.testing.assert_close(gradients[1], gradients[0])
    parameters = dict(nested.network.named_parameters())
    assert all("block3" not in name and "last" not in name for name in parameters)
    assert len({p.data_ptr() for p in parameters.values()} & pointers(alone)) == len(parameters)


def pointers(extractor):
    return {p.data_ptr() for p in extractor.network.parameters()}


@pytest.mark.slow
def test_nested_models_and_layers_around_them_in_one_pass(vgg, images):
    model = call(vgg)
    taps = ["vgg16", "vgg16/block5_pool", "outer_logits"]
    values = vt.FeatureExtractor(model, taps, normalization=None)(images)
    assert torch.equal(values["vgg16"], values["vgg16/block5_pool"])
    expected = vt.to_torch(model, data_format="channels_first").eval()(images)
    torch.testing.assert_close(values["outer_logits"], expected)


@pytest.mark.slow
def test_a_name_in_several_nested_models_is_refused_with_the_full_names(vgg, images):
    other = keras.models.clone_model(vgg)
    other.name = "other"
    image = keras.Input((32, 32, 3))
    model = keras.Model(image, layers.Add()([vgg(image), other(image)]))
    with pytest.raises(ValueError, match=r"several layers: vgg16/block2_conv1, other/block2_conv1"):
        vt.FeatureExtractor(model, ["block2_conv1"], normalization=None)
    extractor = vt.FeatureExtractor(model, ["other/block2_conv1"], normalization=None)
    alone = vt.FeatureExtractor(other, ["block2_conv1"], normalization=None)
    torch.testing.assert_close([*extractor(images).values()], [*alone(images).values()])


def test_layers_of_a_model_that_is_called_twice(vgg):
    pair = [keras.Input((32, 32, 3)), keras.Input((32, 32, 3))]
    model = keras.Model(pair[0], layers.Subtract()([vgg(pair[0]), vgg(layers.ReLU()(pair[0]))]))
    with pytest.raises(ValueError, match=r"'vgg16/block1_pool' is called 2 times"):
        vt.FeatureExtractor(model, ["block1_pool"], normalization=None)


def test_several_outputs_of_a_nested_model(vgg, images):
    middle = keras.Model(
        vgg.input, [vgg.get_layer("block1_pool").output, vgg.get_layer("block2_pool").output],
        name="middle",
    )  # fmt: skip
    image = keras.Input((32, 32, 3))
    first, second = middle(image)
    model = keras.Model(image, [layers.MaxPooling2D(name="small")(first), second])
    values = vt.FeatureExtractor(model, ["small", "block2_conv1"], normalization=None)(images)
    alone = vt.FeatureExtractor(vgg, ["block1_pool", "block2_conv1"], normalization=None)(images)
    small = torch.nn.functional.max_pool2d(alone["block1_pool"], 2)
    torch.testing.assert_close(values["small"], small)
    torch.testing.assert_close(values["block2_conv1"], alone["block2_conv1"])


def test_preprocessing_inside_a_nested_network_is_not_done_twice() -> None:
    image = keras.Input((8, 8, 3))
    y = keras.layers.Conv2D(2, 3, name="conv")(as_layers(image, "imagenet"))
    inner = keras.Model(image, y, name="inner")
    model = keras.Sequential([keras.Input((8, 8, 3)), inner])
    pixels = torch.rand(2, 8, 8, 3)
    extractor = vt.FeatureExtractor(model, ["inner/conv"], data_format="channels_last")
    found = extractor(pixels)["inner/conv"]
    assert torch.allclose(found, model(255 * pixels), atol=1e-5)
    with pytest.raises(ValueError, match="which has its preprocessing inside"):
        vt.FeatureExtractor(model, ["inner/conv"], normalization="imagenet")


def test_the_layout_is_that_of_the_models_layers_not_keras_default():
    first = {"data_format": "channels_first"}
    inputs = keras.Input((3, 20, 24))
    x = keras.layers.Conv2D(4, 3, **first, activation="relu", name="conv")(inputs)
    x = keras.layers.GlobalAveragePooling2D(**first)(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert keras.config.image_data_format() == "channels_last"
    assert vt.data_config(model).input_size == (3, 20, 24)
    images = torch.rand(2, 3, 20, 24)
    maps = keras.Model(inputs, model.get_layer("conv").output)(images)
    extractor = vt.FeatureExtractor(model, ["conv_relu"], normalization=None)
    torch.testing.assert_close(extractor(images)["conv_relu"], maps.detach())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_channels_are_where_they_are_asked_for_behind_any_layer(data_format):
    """Also behind a Reshape, and behind layers whose axis isn't that of the convolutions."""
    own = {"data_format": data_format}
    inputs = keras.Input((16, 12, 3) if data_format == "channels_last" else (3, 16, 12))
    x = layers.Conv2D(4, 3, **own, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dense(5, activation="relu", name="dense")(x)
    x = layers.GlobalMaxPooling2D(**own)(x)
    x = layers.Reshape((2, 3, 4))(layers.Dense(24)(x))
    model = keras.Model(inputs, layers.Dense(6, name="last")(x))
    outputs = [layer.output for layer in model.layers]
    names = [layer.name for layer in model.layers]
    images = torch.rand(2, *inputs.shape[1:])
    expected = dict(zip(names, keras.Model(inputs, outputs)(images), strict=True))
    extractor = vt.FeatureExtractor(
        model, ["conv", "norm", "dense_relu", "last"], normalization=None, **own
    )
    for tap, value in extractor(images).items():
        torch.testing.assert_close(value, expected[tap.removesuffix("_relu")].detach())
