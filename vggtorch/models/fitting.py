"""An image at the size that a model expects: resized, cropped or padded, by one rule for all.

Images of 8 bits are resized by PIL, whatever they came as, so that a file, a PIL image and an array
of the same pixels come out the same, in training and in prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from vggtorch.weight_sets import DataConfig

Size = tuple[int, int]  # height, width


def fitted(image: Image.Image, config: DataConfig, size: Size) -> Image.Image:
    """An RGB image at this size; the same image where it has the size already."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    now = image.height, image.width
    if now == size:
        return image
    mode = InterpolationMode(config.interpolation)
    image = transforms.resize(image, list(config.resized(now, size)), mode)
    return transforms.center_crop(_bordered(image, config, size), list(size))


def fitted_arrays(batch: torch.Tensor, config: DataConfig, size: Size) -> torch.Tensor:
    """Images (N, H, W, 3), uint8 or float of 0 to 255, at this size; the same dtype and device."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    now = batch.shape[1], batch.shape[2]
    if now == size:
        return batch
    if batch.dtype == torch.uint8:
        images = [fitted(Image.fromarray(one), config, size) for one in batch.cpu().numpy()]
        return torch.from_numpy(np.stack([np.asarray(one) for one in images])).to(batch.device)
    mode = InterpolationMode(config.interpolation)
    x = batch.movedim(-1, 1)  # NHWC -> NCHW view
    x = transforms.resize(x, list(config.resized(now, size)), mode, antialias=True)
    # What bicubic interpolation overshoots, PIL cuts off.
    x = _bordered(x.clamp(0, 255), config, size)
    return transforms.center_crop(x, list(size)).movedim(1, -1)


def _bordered(image: Any, config: DataConfig, size: Size) -> Any:
    """An image with the fill around it, as large as `size` at least."""
    from torchvision.transforms import functional as transforms

    _, height, width = transforms.get_dimensions(image)
    down, right = max(0, size[0] - height), max(0, size[1] - width)
    if not (down or right):
        return image
    padding = [right // 2, down // 2, right - right // 2, down - down // 2]
    if isinstance(image, Image.Image):
        return transforms.pad(image, padding, fill=config.fill)
    fill = torch.tensor(config.fill, dtype=image.dtype, device=image.device)[:, None, None]
    # Padded with zeros around what stands above the fill, so that each channel gets its own.
    return transforms.pad(image - fill, padding) + fill


def recipe(config: DataConfig, size: Size) -> str:
    """What `fitted` does of a file as Python code, `prepared(path)`, that needs PIL and NumPy."""
    (height, width), mode = size, f"Image.Resampling.{config.interpolation.upper()}"
    tall, wide = config.resized(size, size)
    resize = f"image = image.resize([max(1, round(edge / ratio)) for edge in image.size], {mode})"
    crop = f"""left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
        image = image.crop((left, top, left + {width}, top + {height}))"""
    if config.crop_mode == "squash":
        steps = f"image = image.resize(({wide}, {tall}), {mode})"
        steps += "" if (wide, tall) == (width, height) else f"\n        {crop}"
    elif config.crop_mode == "border":
        steps = f"""ratio = max(image.width / {wide}, image.height / {tall})
        {resize}
        gaps = {width} - image.width, {height} - image.height
        image, top = Image.new("RGB", ({width}, {height}), {config.fill}), image
        image.paste(top, tuple(gap // 2 if gap > 0 else round(gap / 2) for gap in gaps))"""
    elif tall == wide:
        steps = f"""shorter = min(image.size)
        image = image.resize([{tall} * edge // shorter for edge in image.size], {mode})
        {crop}"""
    else:
        steps = f"""ratio = min(image.width / {wide}, image.height / {tall})
        {resize}
        {crop}"""
    return f"""import numpy as np
from PIL import Image, ImageOps

def prepared(path):
    image = ImageOps.exif_transpose(Image.open(path))
    assert image.mode[0] not in "IF", f"save {{path}} with 8 bits, np.uint8(a / 257 + 0.5) of 16"
    white = Image.new("RGBA", image.size, "white")  # seen where an image is transparent
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.size != ({width}, {height}):
        {steps}
    return np.asarray(image, np.float32)
"""
