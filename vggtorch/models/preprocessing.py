"""What each weight set expects of an image, as a function and as Keras layers, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import keras
import numpy as np
import torch
from PIL import Image

from vggtorch.checks import is_whole, whole
from vggtorch.models.fitting import Size, fitted, fitted_arrays
from vggtorch.models.images import (
    ADVICE_IF_DARK,
    BRIGHTEST,
    DARK,
    MAX_PIXELS,
    SEVERAL_FRAMES,
    read_image,
    to_rgb,
)
from vggtorch.models.memory import PREPROCESSING_SUFFIX, data_config
from vggtorch.telling import tell
from vggtorch.weight_sets import WEIGHT_SETS, DataConfig, WeightSet, weight_set_named

Images = np.ndarray | torch.Tensor | Image.Image | str | PathLike
DEFAULT_SIZE = 224  # what the networks were trained on, where nothing else is said


def as_layers(image: keras.KerasTensor, name: str, prefix: str = "") -> keras.KerasTensor:
    """The preprocessing of a weight set as Keras layers, which plain Keras saves and loads.

    The image is RGB of 0 to 255, (N, H, W, 3), or (N, 3, H, W) where Keras is set to that.
    """
    expected = weight_set_named(name)
    if expected.bgr:
        axis = -1 if keras.config.image_data_format() == "channels_last" else 1
        image = keras.ops.flip(image, axis=axis)
    scale = [1 / (expected.scale * std) for std in expected.std]
    offset = [-mean / std for mean, std in zip(expected.mean, expected.std, strict=True)]
    return keras.layers.Rescaling(scale, offset, name=f"{prefix}{name}{PREPROCESSING_SUFFIX}")(
        image
    )


def preprocess(
    images: Images | Sequence[Images],
    weights: str | DataConfig | keras.Model,
    *,
    size: int | tuple[int, int] | None = None,
) -> np.ndarray | torch.Tensor:
    """Turn images into what a model or a weight set expects; the images given are not changed.

    Args:
        images: RGB of 0 to 255: an array or tensor (H, W, 3) or (N, H, W, 3), uint8 or float; a
            PIL image; a path; or a list of these. Files and PIL images are turned as their EXIF
            orientation says, 16-bit values are scaled, what is transparent becomes white, and of
            several frames in a file the first is taken.
        weights: a model that remembers its weight set: then all is done as `data_config(model)`
            says. For a model with its preprocessing inside, only the geometry is. Or a
            `DataConfig`, or `imagenet`, `features` or `oxford`.
        size: height and width of the result; by default those of the model's input. Where neither
            says any, arrays and tensors keep their size, and files and PIL images get 224. An image
            that has the size isn't touched; others are by default resized, the shorter side to
            size / 0.875 (bilinear, antialiased), and the centre is cropped.

    Returns:
        float32, (N, H, W, 3): a tensor if a tensor was given, else a numpy array.

    Raises:
        ValueError: values, shapes, channels or a weight set that can't be right, or a file that
            isn't an image or is damaged.
        OSError: a file that can't be opened.

    Source: torchvision's `VGG16_Weights.transforms()`; keras.applications' `preprocess_input`;
    timm's `create_transform`.

    Example:
        >>> import numpy as np
        >>> import vggtorch as vt
        >>> grey = np.full((32, 32, 3), 128, dtype="uint8")
        >>> [f"{value:.3f}" for value in vt.preprocess(grey, "oxford")[0, 0, 0]]  # BGR - mean
        ['24.061', '11.221', '4.320']
        >>> vt.preprocess(grey, "imagenet", size=224).shape
        (1, 224, 224, 3)
    """
    if isinstance(weights, keras.Model):
        config = data_config(weights)
    elif weights is not None and not isinstance(weights, str | DataConfig):
        raise ValueError(
            f"Received weights of type {type(weights).__name__}; expected a Keras model, a "
            f"DataConfig, or {' | '.join(map(repr, WEIGHT_SETS))}."
        )
    else:
        config = weights if isinstance(weights, DataConfig) else DataConfig(weights)
    if config.weight_set is None and not config.preprocessing_inside:
        model = f"The model {weights.name!r}" if isinstance(weights, keras.Model) else weights
        raise ValueError(
            f"{model} does not say which weight set it belongs to. Name it: "
            f"preprocess(images, {' | '.join(map(repr, WEIGHT_SETS))})."
        )
    wanted = config.size if size is None else _checked_size(size)
    items = images if isinstance(images, list | tuple) else [images]
    if not items:
        raise ValueError("Received an empty list; expected at least one image.")
    batches = [_pixels(item, config, wanted) for item in items]
    shapes = {batch.shape[1:] for batch in batches}
    if len(shapes) > 1:
        raise ValueError(
            f"Received images of different sizes {sorted(tuple(s) for s in shapes)}, which can't "
            f"be one batch. Pass size=224, say, to resize them."
        )
    batch = torch.cat(batches)
    if config.arithmetic is not None:
        batch = _normalise(batch, config.arithmetic)
    return batch if any(isinstance(item, torch.Tensor) for item in items) else batch.numpy()


def _checked_size(size: Any) -> Size:
    """Height and width from what a user gives as a size."""
    pair = tuple(size) if isinstance(size, list | tuple | np.ndarray) else (size, size)
    if len(pair) != 2 or not all(is_whole(side) and side > 0 for side in pair):
        raise ValueError(
            f"Received size={size!r}; expected a whole number from 1, or height and width."
        )
    if pair[0] * pair[1] > MAX_PIXELS:
        raise ValueError(f"Received size={size!r}; expected at most {MAX_PIXELS:,} pixels.")
    return int(pair[0]), int(pair[1])


def _pixels(image: Any, config: DataConfig, size: Size | None) -> torch.Tensor:
    """One image or array as float32 (N, H, W, 3) of 0 to 255, at the size if there is one."""
    if isinstance(image, str | PathLike | Image.Image):
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        if image.info.get(BRIGHTEST, 255) < DARK:
            tell(f"An image doesn't use what 16 bits hold. {ADVICE_IF_DARK}")
        if image.info.get(SEVERAL_FRAMES):
            tell("An image file has several frames or pages, of which the first is read.")
        image = fitted(image, config, size or (DEFAULT_SIZE, DEFAULT_SIZE))
        return torch.from_numpy(np.array(image))[None].float()
    batch = _checked_array(image)
    return (batch if size is None else fitted_arrays(batch, config, size)).float()


def _checked_array(image: Any) -> torch.Tensor:
    """An array or tensor as a tensor (N, H, W, 3); ValueError where it can't hold RGB images."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(
            f"Received {type(image).__name__}; expected a path, a PIL image, an array or a tensor."
        )
    if isinstance(image, np.ma.MaskedArray) and np.ma.is_masked(image):
        raise ValueError("Received a masked array; expected one without a mask (`.filled(255)`).")
    if isinstance(image, np.ndarray) and image.dtype.kind not in "biufc":
        raise ValueError(f"Received images of dtype {image.dtype}; expected uint8 or float.")
    # torch takes arrays with positive strides that it may write to; others are copied.
    if isinstance(image, torch.Tensor):
        tensor = image
    else:
        tensor = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[-1] != 3 or 0 in tensor.shape:
        hint = ""
        if tensor.ndim == 4 and tensor.shape[1] == 3:
            hint = " It looks channels-first: move the channels to the end."
        elif image.ndim == 2 or tensor.shape[-1] == 1:
            hint = " It looks grey: pass PIL images, or the channel three times."
        raise ValueError(
            f"Received images of shape {tuple(image.shape)}; "
            f"expected (H, W, 3) or (N, H, W, 3).{hint}"
        )
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(
            f"Received images of dtype {image.dtype}; expected uint8 or float. Scale them all "
            f"alike, from what black and white are to 0 and 255."
        )
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"Received values from {low:.3g} to {high:.3g}; expected 0 to 255. Pass the images as "
            f"they are, before any normalisation."
        )
    if high <= 1 and bool((tensor != tensor.round()).any()):
        raise ValueError(
            f"Received values from {low:.3g} to {high:.3g}, which look scaled to 0 to 1; expected "
            f"0 to 255. Multiply them by 255."
        )
    return tensor


def _normalise(batch: torch.Tensor, expected: WeightSet) -> torch.Tensor:
    """The arithmetic of a weight set in the order of its reference; (N, H, W, 3) both ways."""
    if expected.bgr:
        batch = batch.flip(-1)
    if expected.scale != 1:
        batch = batch / expected.scale
    batch = batch - batch.new_tensor(expected.mean)
    if expected.std != (1.0, 1.0, 1.0):
        batch = batch / batch.new_tensor(expected.std)
    return batch


def decode_predictions(
    probabilities: np.ndarray | torch.Tensor,
    top: int = 5,
    categories: Sequence[str] | None = None,
) -> list[list[tuple[int, str, float]]]:
    """The most probable classes of each image, the best first.

    Args:
        probabilities: (N, classes), a model's softmax output.
        top: how many classes; all of them where there are fewer.
        categories: the classes' names by index; torchvision's 1000 of ImageNet by default.

    Returns:
        For each image, tuples of class index, category and probability.

    Raises:
        ValueError: another shape, or values that aren't probabilities.

    Example:
        >>> import numpy as np
        >>> import vggtorch as vt
        >>> vt.decode_predictions(np.array([[0.25, 0.75]]), categories=["cat", "dog"])
        [[(1, 'dog', 0.75), (0, 'cat', 0.25)]]
    """
    if categories is None:
        from torchvision.models import VGG16_Weights

        categories = VGG16_Weights.IMAGENET1K_V1.meta["categories"]
    elif isinstance(categories, str | Mapping) or not isinstance(categories, Iterable):
        raise ValueError(f"Received categories={categories!r}; expected a list of names by index.")
    categories, top = list(categories), whole("top", top)
    try:
        if not isinstance(probabilities, torch.Tensor):  # NumPy has bfloat16 from Keras alone
            array = np.array(probabilities)
            if array.dtype == object:  # None would be NaN
                raise TypeError(array.dtype)
            probabilities = torch.from_numpy(array.astype("float32"))
        scores = probabilities.detach().cpu().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Received predictions of type {type(probabilities).__name__}; expected an array or "
            f"tensor (N, classes)."
        ) from error
    if scores.ndim != 2 or scores.shape[1] != len(categories):
        raise ValueError(
            f"Received predictions of shape {tuple(scores.shape)}; "
            f"expected (N, {len(categories)}), a probability for each category."
        )
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError(
            "Received values outside 0 to 1; expected probabilities. For logits, apply "
            "softmax first (keras.ops.softmax)."
        )
    values, indices = scores.topk(min(top, len(categories)))
    return [
        [(int(i), categories[int(i)], float(v)) for i, v in zip(row_i, row_v, strict=True)]
        for row_i, row_v in zip(indices, values, strict=True)
    ]
