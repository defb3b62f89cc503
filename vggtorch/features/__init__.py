"""The features of a network, and what is measured with them: perceptual losses and LPIPS.

Read in this order: `pixels` (images in any range and layout into what a weight set expects),
`extractor` (`FeatureExtractor`: several layers' values in one pass), `chains` and `frozen`
(gradients to the images, on a CPU by kernels of our own, that keep little), `losses`
(`PerceptualLoss`: content, style and total variation) and `distance` (`LPIPS`).
"""

from vggtorch.features.distance import LPIPS
from vggtorch.features.extractor import FeatureExtractor
from vggtorch.features.losses import PerceptualLoss, Targets, gram_matrix, total_variation

__all__ = [
    "LPIPS",
    "FeatureExtractor",
    "PerceptualLoss",
    "Targets",
    "gram_matrix",
    "total_variation",
]
