"""LPIPS is the lpips package's distance, in values and in gradients."""

import copy

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import lpips
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def peer(torchvision_vgg):
    """The package's network with the same VGG, since its own would be downloaded."""
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    theirs = [m for m in network.net.modules() if isinstance(m, torch.nn.Conv2d)]
    given = [m for m in torchvision_vgg.features if isinstance(m, torch.nn.Conv2d)]
    for module, source in zip(theirs, given, strict=True):
        module.load_state_dict(source.state_dict())
    return network.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*weight.*deprecated since 0.13")  # of torchvision, by lpips
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_values_and_gradients_are_those_of_the_package(vgg, peer, images, checkpoint):
    ours = vt.LPIPS(vgg, normalization="imagenet", value_range=(-1, 1), checkpoint=checkpoint)
    # In float64, where no value is so near 0 that the two see it on different sides of a ReLU.
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(peer).double()
    for name, numbers in {"shift": (-0.03, -0.088, -0.188), "scale": (0.458, 0.448, 0.45)}.items():
        exact = torch.tensor(numbers, dtype=torch.float64).view(1, 3, 1, 1)
        setattr(theirs.scaling_layer, name, exact)  # which the package has rounded to float32
    a, b = 2 * images.double() - 1, 1 - 2 * images.double().flip(0)
    found = []
    for distance in (ours, theirs):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        values = distance(x, y)
        values.sum().backward()
        found.append((values, x.grad, y.grad))
    for received, expected in zip(*found, strict=True):
        assert received.shape == expected.shape
        scale = expected.abs().max().item()
        torch.testing.assert_close(received, expected, rtol=0, atol=1e-9 * scale)


@pytest.mark.slow
def test_pixels_of_other_ranges_and_layouts_are_the_same_images(vgg, peer, images):
    expected = peer(images, images.flip(0), normalize=True)
    pixels = (images * 255).permute(0, 2, 3, 1)
    ours = vt.LPIPS(
        vgg, normalization="imagenet", value_range=(0, 255), data_format="channels_last"
    )
    received = ours(pixels, pixels.flip(0))
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-6)
    half = copy.deepcopy(ours).bfloat16()(pixels, pixels.flip(0))
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0)


@pytest.mark.slow
def test_the_gradient_is_finite_where_there_are_no_features(vgg, peer):
    ours = copy.deepcopy(vt.LPIPS(vgg, normalization="imagenet"))
    for module in ours.extractor.network.children():  # each ReLU gives 0 everywhere
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.get_parameter("bias"), -1e3)
    x = torch.rand(1, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x, torch.rand(1, 3, 32, 32)).sum(), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.slow
def test_other_linear_layers_and_networks_are_taken_or_refused(vgg, images, tmp_path):
    own = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
           for i, width in enumerate((64, 128, 256, 512, 512))}  # fmt: skip
    torch.save(own, tmp_path / "own.pth")
    by_tensors = vt.LPIPS(vgg, own, normalization="imagenet")(images, images.flip(0))
    by_path = vt.LPIPS(vgg, tmp_path / "own.pth", normalization="imagenet")(images, images.flip(0))
    arrays = {name: weight.numpy() for name, weight in own.items()}
    by_arrays = vt.LPIPS(vgg, arrays, normalization="imagenet")  # type: ignore[arg-type]
    assert torch.equal(by_tensors, by_path)
    assert torch.equal(by_tensors, by_arrays(images, images.flip(0)))
    with pytest.raises(ValueError, match="ndarray; expected a tensor of images"):
        by_arrays(images.numpy(), images.numpy())
    with pytest.raises(ValueError, match=r"Received linear=\[1\]; expected a path"):
        vt.LPIPS(vgg, [1], normalization="imagenet")  # type: ignore[arg-type]
    del own["lin2.model.1.weight"]
    with pytest.raises(ValueError, match=r"'lin2.model.1.weight' of shape \(1, 256, 1, 1\)"):
        vt.LPIPS(vgg, own, normalization="imagenet")
    with pytest.raises(ValueError, match="as many of one size"):
        vt.LPIPS(vgg, normalization="imagenet")(images, images[:1])
    other = vt.VGG11(weights=None, include_top=False)
    with pytest.raises(ValueError, match="No layer 'relu1_2' can be tapped"):
        vt.LPIPS(other, normalization="imagenet")


@pytest.mark.slow
def test_the_package_is_asked_for_where_it_is_missing(vgg, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install lpips"):
        vt.LPIPS(vgg, normalization="imagenet")
