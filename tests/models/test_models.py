import inspect

import keras
import numpy as np
import pytest
import torch

import vggtorch as vt
from vggtorch import models
from vggtorch.models import fill_, remember_
from vggtorch.weight_sets import WEIGHT_SETS

CONSTRUCTORS = {
    name.upper(): getattr(vt, name.upper()) for name in ("vgg11", "vgg13", "vgg16", "vgg19")
}
KERAS = {"VGG16": keras.applications.VGG16, "VGG19": keras.applications.VGG19}


def summary(model):
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    return lines


def build_on_meta(constructor, **arguments):
    keras.utils.clear_session(free_memory=False)  # automatic names count from the start
    with keras.device("meta"):
        return constructor(weights=None, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERAS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"include_top": False},
        {"include_top": False, "pooling": "avg", "input_shape": (64, 48, 3)},
        {"include_top": False, "pooling": "max"},
        {"classes": 10, "classifier_activation": None, "input_shape": (96, 96, 3)},
    ],
)
def test_layers_summary_and_config_equal_keras_applications(name, arguments):
    ours = build_on_meta(CONSTRUCTORS[name], **arguments)
    theirs = build_on_meta(KERAS[name], **arguments)
    assert ours.get_config() == theirs.get_config()
    assert summary(ours) == summary(theirs)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_signature_and_defaults_are_keras_applications(name):
    ours = inspect.signature(CONSTRUCTORS[name]).parameters
    theirs = inspect.signature(keras.applications.VGG16).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        if key != "name":
            assert ours[key].default == parameter.default
    extra = list(ours.values())[len(theirs) :]
    assert {p.name: p.default for p in extra} == {
        "batch_norm": False,
        "dropout": 0.0,
        "include_preprocessing": False,
        "prefix": "",
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERAS)
def test_same_arrays_same_outputs_as_keras_applications(name):
    arguments = {"weights": None, "include_top": False, "input_shape": (64, 64, 3)}
    ours, theirs = CONSTRUCTORS[name](**arguments), KERAS[name](**arguments)
    theirs.set_weights(ours.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.fixture
def small(narrow):
    """VGG16's convolutions with random weights."""
    return vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".weights.h5"])
def test_weights_survive_saving_and_loading(small, ending, images, tmp_path):
    path = tmp_path / f"small{ending}"
    vt.save_weights(small, path)
    again = vt.VGG16(weights=path, include_top=False, input_shape=(32, 32, 3))
    with torch.no_grad():
        assert torch.equal(again(images), small(images))


@pytest.mark.slow
def test_the_weight_set_survives_saving_and_loading(small, tmp_path):
    path = tmp_path / "small.safetensors"
    vt.save_weights(remember_(keras.models.clone_model(small), "features"), path)
    assert vt.weight_set(vt.VGG16(weights=path, include_top=False)) == "features"
    loaded = vt.load_weights(keras.models.clone_model(small), path)
    assert vt.weight_set(loaded) == "features"


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_a_pretrained_model_trains_and_drops_out():
    """What was built without values on the meta device is a whole model afterwards."""
    source = vt.VGG11(weights=None, classes=5, dropout=0.5, input_shape=(32, 32, 3))
    tensors = {key: v.value.detach().clone() for key, v in vt.named_variables(source).items()}
    with keras.device("meta"):
        model = vt.VGG11(weights=None, classes=5, dropout=0.5, input_shape=(32, 32, 3))
    fill_(model, tensors)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.count_params()
    model.compile("sgd", "sparse_categorical_crossentropy")
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
    model.fit(images, np.arange(4), epochs=1, verbose=0)
    changed = model.get_layer("block1_conv1").get_weights()[0]
    assert not np.array_equal(changed, source.get_layer("block1_conv1").get_weights()[0])
    first, second = (model(images, training=True).detach() for _ in range(2))
    assert not torch.equal(first, second)  # dropout draws anew


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHT_SETS)
def test_preprocessing_inside_equals_preprocessing_outside(name, small, images, tmp_path):
    path = tmp_path / "small.safetensors"
    vt.save_weights(remember_(keras.models.clone_model(small), name), path)
    arguments = {"weights": path, "include_top": False, "input_shape": (32, 32, 3)}
    inside = vt.VGG16(include_preprocessing=True, **arguments)
    outside = vt.VGG16(**arguments)
    assert vt.weight_set(inside) == name
    with torch.no_grad():
        received = inside(images)
        expected = outside(vt.preprocess(images, outside))
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_before_an_input_tensor_keep_their_values(small, tmp_path):
    path = tmp_path / "small.pth"
    vt.save_weights(small, path)
    inputs = keras.Input((32, 32, 1))
    to_rgb = keras.layers.Conv2D(3, 1, name="to_rgb")
    noisy = keras.layers.Dropout(0.5, name="noisy")
    tensor = noisy(to_rgb(inputs))
    kernel, seed = to_rgb.get_weights()[0], noisy.seed_generator.state.value.clone()
    model = vt.VGG16(weights=path, include_top=False, input_tensor=tensor)
    assert model.input_shape == (None, 32, 32, 1)
    np.testing.assert_array_equal(model.get_layer("to_rgb").get_weights()[0], kernel)
    assert torch.equal(model.get_layer("noisy").seed_generator.state.value, seed)
    for before, after in zip(small.get_weights(), model.get_weights()[2:], strict=True):
        np.testing.assert_array_equal(after, before)


def test_batch_norm_layers_are_torchvisions():
    model = build_on_meta(vt.VGG11, batch_norm=True)
    layer = model.get_layer("block3_bn2")
    assert (layer.epsilon, layer.momentum) == (1e-5, 0.9)
    names = [layer.name for layer in model.layers]
    start = names.index("block3_conv2")
    assert names[start : start + 3] == ["block3_conv2", "block3_bn2", "block3_relu2"]


@pytest.mark.slow
def test_dropout_stands_after_fc1_and_fc2():
    model = build_on_meta(vt.VGG11, dropout=0.5)
    names = [layer.name for layer in model.layers]
    assert names[-5:] == ["fc1", "fc1_dropout", "fc2", "fc2_dropout", "predictions"]
    assert model.get_layer("fc2_dropout").rate == 0.5


@pytest.mark.slow
def test_channels_first_models_take_the_same_weights(small, images):
    keras.config.set_image_data_format("channels_first")
    try:
        model = vt.VGG16(weights=None, include_top=False, input_shape=(3, 32, 32))
        model.set_weights(small.get_weights())
        with torch.no_grad():
            received = model(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    finally:
        keras.config.set_image_data_format("channels_last")
    with torch.no_grad():
        torch.testing.assert_close(received.movedim(1, -1), small(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_cut_model_takes_its_part_and_added_layers_keep_their_values(small, tmp_path):
    path = tmp_path / "small.pth"
    vt.save_weights(small, path)
    other = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    head = keras.layers.Dense(3, name="mine")
    model = vt.stack(vt.truncate(other, "block2_pool"), [keras.layers.Flatten(), head])
    before = head.get_weights()[0]
    vt.load_weights(model, path)
    np.testing.assert_array_equal(head.get_weights()[0], before)
    np.testing.assert_array_equal(
        model.get_layer("block2_conv2").get_weights()[0],
        small.get_layer("block2_conv2").get_weights()[0],
    )


@pytest.mark.slow
def test_a_model_with_layers_of_its_own_loads_what_it_saved(tmp_path):
    def build():
        inputs = keras.Input((4,))
        inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")], name="in")
        return keras.Model(inputs, keras.layers.Dense(2, name="b")(inner(inputs)))

    first, second = build(), build()
    vt.save_weights(first, tmp_path / "own.safetensors")
    vt.load_weights(second, tmp_path / "own.safetensors")
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_nothing_is_loaded_unless_everything_fits(small, tmp_path):
    path = tmp_path / "small.pth"
    vt.save_weights(small, path)
    model = vt.remove(small, "block3_conv3")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"Unexpected in the file: block3_conv3/kernel, block3_"):
        vt.load_weights(model, path)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "imagenet", "classes": 999}, "classes=999 with weights='imagenet'"),
        ({"weights": "oxford"}, "'oxford' has no classifier. Use include_top=False"),
        ({"weights": "features"}, "'features' has no classifier"),
        ({"weights": "nothing.pth"}, "'nothing.pth'; expected one of imagenet, features, oxford"),
        ({"weights": None, "pooling": "sum"}, "pooling='sum'; expected None, 'avg' or 'max'"),
        ({"weights": None, "dropout": 1.0}, "dropout=1.0; expected a rate from 0"),
        ({"classifier_activation": "relu"}, "classifier_activation='relu' with pretrained"),
        ({"weights": None, "input_tensor": np.zeros(3)}, "input_tensor of type ndarray"),
        (
            {"weights": "oxford", "batch_norm": True, "include_top": False},
            "'oxford' was never published for vgg16_bn; expected vgg16",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        vt.VGG16(**arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_another_networks_file_is_refused_with_both_lists(tmp_path):
    path = tmp_path / "vgg19.pth"
    vt.save_weights(vt.VGG19(weights=None, include_top=False, input_shape=(32, 32, 3)), path)
    with pytest.raises(
        ValueError, match=r"Unexpected in the file: block3_conv4/kernel.*Shapes that differ: none"
    ):
        vt.VGG16(weights=path, include_top=False)


@pytest.mark.slow
def test_a_file_without_a_classifier_never_gives_a_random_top(small, tmp_path):
    path = tmp_path / "small.pth"
    vt.save_weights(small, path)
    with pytest.raises(ValueError, match=r"Missing in the file: fc1/kernel.*include_top=False"):
        vt.VGG16(weights=path)


@pytest.mark.slow
def test_a_nested_network_is_pointed_out(small, tmp_path):
    path = tmp_path / "small.pth"
    vt.save_weights(small, path)
    nested = keras.Sequential([keras.Input((32, 32, 3)), small, keras.layers.Flatten()])
    with pytest.raises(ValueError, match=r"No layer of the model is in .*get_layer"):
        vt.load_weights(nested, path)


def test_what_a_file_cannot_hold_is_refused(small, tmp_path):
    for name in ("module", "_orig_mod", "0", "head"):
        inner = keras.layers.Dense(3, name="fc")
        layer = keras.Sequential([keras.Input(small.output_shape[1:]), inner], name=name)
        image = keras.Input((32, 32, 3))
        x = image
        for each in small.layers[1:]:
            x = each(x)
        model = keras.Model(image, layer(x))
        if name == "0":
            model = keras.Model(image, keras.layers.Dense(3, name=name)(x))
        with pytest.raises(ValueError, match=f"'{name}.*would be taken for another.*Rename it"):
            vt.save_weights(model, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        vt.save_weights(small, tmp_path / "x.npz")
    assert not list(tmp_path.iterdir())


def test_a_cut_model_that_could_be_of_several_networks_must_say_which(small):
    cut = vt.truncate(small, "block2_pool")
    renamed = keras.Model(cut.input, cut.output, name="mine")
    with pytest.raises(ValueError, match="part of any of vgg13, vgg16, vgg19"):
        vt.load_weights(renamed, "imagenet")


def test_unknown_architectures_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown architecture 'vgg17'; expected one of vgg11"):
        models.constructor("vgg17")
    with pytest.raises(ValueError, match="Unknown architecture 'vgg17'"):
        models.convert("oxford", tmp_path / "x.pth", "vgg17")


@pytest.mark.slow
def test_a_convolution_named_fc1_is_loaded_as_it_was_saved(tmp_path):
    def build():
        inputs = keras.Input((7, 7, 4))
        return keras.Model(inputs, keras.layers.Conv2D(5, 7, name="fc1")(inputs))

    first, second = build(), build()
    vt.save_weights(first, tmp_path / "own.safetensors")
    vt.load_weights(second, tmp_path / "own.safetensors")
    np.testing.assert_array_equal(first.get_weights()[0], second.get_weights()[0])


@pytest.mark.parametrize("top", [True, False])
def test_published_weights_of_other_channels_point_at_with_input(top):
    with pytest.raises(ValueError, match=r"reads 3 channels\..*vt\.with_input\(vgg, channels=1"):
        vt.VGG16(input_shape=(64, 64, 1), include_top=top)
    with pytest.raises(ValueError, match=r"with_input\(vgg, channels=4"):
        vt.VGG16(weights="oxford", input_tensor=keras.Input((64, 64, 4)), include_top=top)
