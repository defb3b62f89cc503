"""PerceptualLoss computes what its papers define."""

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import pytest
import torch

from vggtorch.features import gram_matrix, total_variation

TAPS = ["relu1_2", "relu2_2", "relu3_3"]
pytestmark = pytest.mark.usefixtures("one_thread")


def torchmetrics_variation(images, reduction):
    # Not above: it imports transformers where that is installed, which takes a second and a half.
    from torchmetrics.functional.image import total_variation as theirs

    return theirs(images, reduction=reduction)


@pytest.fixture
def extractor(vgg):
    return vt.FeatureExtractor(vgg, TAPS, normalization="imagenet")


@pytest.mark.slow
def test_each_term_is_what_johnson_and_gatys_define(extractor, images):
    style, content = torch.rand(1, 3, 40, 40), images.flip(0)
    loss = vt.PerceptualLoss(extractor, {"relu2_2": 2.0}, {"relu1_2": 3.0, "relu3_3": 5.0}, 1e-4)
    terms = loss.terms(images, content, style)
    features, of_content, of_style = extractor(images), extractor(content), extractor(style)

    n, c, h, w = features["relu2_2"].shape
    squared = (features["relu2_2"] - of_content["relu2_2"]).square().sum() / n
    expected = {"content/relu2_2": 2 * squared / (c * h * w)}  # Johnson et al., equation 2
    for tap, weight in loss.style.items():
        each = []
        for one in features[tap]:
            maps, wanted = one.flatten(1), of_style[tap][0].flatten(1)
            gatys = maps @ maps.T / maps.shape[1] - wanted @ wanted.T / wanted.shape[1]
            # Gatys et al., equation 4, where both images have one size M: 1 / (4 N^2 M^2).
            each.append(gatys.square().sum() / (4 * maps.shape[0] ** 2))
        expected[f"style/{tap}"] = weight * 4 * torch.stack(each).mean()
    expected["total_variation"] = 1e-4 * torchmetrics_variation(images, reduction="mean")
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-4, atol=0)
    total = loss(images, loss.targets(content, style))
    torch.testing.assert_close(total, sum(expected.values()), rtol=1e-4, atol=0)


def test_total_variation_is_that_of_torchmetrics(images):
    expected = torchmetrics_variation(images, reduction="none")
    torch.testing.assert_close(total_variation(images), expected)
    pixels = (images * 255).byte()
    assert torch.equal(total_variation(pixels), total_variation(pixels.float()))
    half = (images * 255).half()  # whose sums are larger than its numbers
    assert torch.equal(total_variation(half), total_variation(half.float()))
    assert torch.equal(gram_matrix(pixels), gram_matrix(pixels.float()))


@pytest.mark.slow
def test_gradients_pull_an_image_towards_its_targets(extractor, images):
    loss = vt.PerceptualLoss(extractor, {"relu2_2": 1}, {"relu1_2": 1})
    targets = loss.targets(images[:1], images[1:])
    x = torch.rand(1, 3, 48, 64, requires_grad=True)
    optimizer = torch.optim.Adam([x], 0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(x, targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_layouts_and_reduced_precision_give_the_same(vgg, images):
    first = vt.FeatureExtractor(vgg, TAPS, normalization="imagenet")
    last = vt.FeatureExtractor(
        vgg, TAPS, normalization="imagenet", data_format="channels_last", value_range=(0, 255)
    )
    content, style = {"relu2_2": 1.0}, {"relu1_2": 10.0}
    expected = vt.PerceptualLoss(first, content, style, 1e-3)(images, images.flip(0))
    loss = vt.PerceptualLoss(last, content, style, 1e-3 / 255)
    pixels = images.permute(0, 2, 3, 1) * 255
    torch.testing.assert_close(loss(pixels, pixels.flip(0)), expected, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(pixels, pixels.flip(0))
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0)


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(extractor, images):
    with pytest.raises(ValueError, match="Received no weights"):
        vt.PerceptualLoss(extractor)
    with pytest.raises(ValueError, match="Received extractor of type Sequential; expected vt.Fea"):
        vt.PerceptualLoss(torch.nn.Sequential(), {"relu1_2": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'relu4_3', which the extractor doesn't tap"):
        vt.PerceptualLoss(extractor, {"relu4_3": 1})
    with pytest.raises(ValueError, match="a number of 0 or more"):
        vt.PerceptualLoss(extractor, {"relu1_2": -1})
    loss = vt.PerceptualLoss(extractor, {"relu2_2": 1}, {"relu1_2": 1})
    with pytest.raises(ValueError, match=r"no style, which \['relu1_2'\]"):
        loss(images, loss.targets(content=images))
    with pytest.raises(ValueError, match="as many, of one size"):
        loss(images, images[:, :, :32])
    with pytest.raises(ValueError, match="one style image, or one for each"):
        loss(torch.rand(3, 3, 48, 64), torch.rand(3, 3, 48, 64), images)
    with pytest.raises(ValueError, match="pass both to targets"):
        loss(images, loss.targets(images, images), images)
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\)"):
        gram_matrix(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\); expected \(N, C, H, W\)"):
        total_variation(torch.rand(3, 8, 8))
