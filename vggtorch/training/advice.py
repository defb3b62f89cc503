"""The rules of thumb of fine-tuning, as a plan with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vggtorch.training.config import TrainConfig

FEW = 500  # images of each class; below, whole blocks of VGG overfit


class Reason(NamedTuple):
    """One decision of a plan, why, and who found so."""

    decision: str
    why: str
    source: str


@dataclass(frozen=True)
class Plan(TrainConfig):
    """A TrainConfig with the reasons for it; `finetune` takes it as it is."""

    reasons: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{r.decision}\n    {r.why}\n    [{r.source}]" for r in self.reasons)


YOSINSKI = "Yosinski et al., How transferable are features in deep neural networks?, NeurIPS 2014"
CS231N = "Karpathy, CS231n: Transfer Learning, Stanford"
ULMFIT = "Howard and Ruder, Universal Language Model Fine-tuning, ACL 2018"
KERAS = "Chollet, Transfer learning & fine-tuning, Keras guide"
INCEPTION = "Szegedy et al., Rethinking the Inception Architecture, CVPR 2016"
FASTAI = "Howard and Gugger, fastai: A Layered API for Deep Learning, 2020"


def advise(images: int, classes: int, similarity: Literal["similar", "different"]) -> Plan:
    """How to fine-tune a VGG on this many images, by the rules of thumb.

    >>> import vggtorch as vt
    >>> plan = vt.advise(images=300, classes=10, similarity="different")
    >>> plan.cut, plan.head, plan.epochs
    ('block4_pool', 'mlp', 30)
    >>> print(plan.reasons[0].decision)
    Freeze every pretrained layer and train an mlp head alone.

    Args:
        images: how many, for training.
        classes: how many.
        similarity: `similar` to ImageNet (photographs of things, of a few hundred pixels), or
            `different` (tiny or medical images, drawings, textures, satellites).

    Raises:
        ValueError: fewer than two classes, fewer images than classes, another similarity.
    """
    if classes < 2:
        raise ValueError(f"Received classes={classes}; expected 2 or more.")
    if images < classes:
        raise ValueError(
            f"Received images={images} for {classes} classes; expected at least one of each."
        )
    if similarity not in ("similar", "different"):
        raise ValueError(
            f"Received similarity={similarity!r}; expected 'similar' (to ImageNet's photographs) "
            f"or 'different'."
        )
    is_similar = similarity == "similar"
    each = images // classes
    options: dict[str, Any]
    if each < FEW:
        cut = "block5_pool" if is_similar else "block4_pool"
        head: Literal["linear", "mlp"] = "linear" if is_similar else "mlp"
        article = "a" if is_similar else "an"
        options = {
            "cut": cut,
            "head": head,
            "freeze": cut,
            "augment": "flip",
            "cache_copies": 2,
            "epochs": 30,
            "batch_size": 64,
        }
        reasons = [
            Reason(
                f"Freeze every pretrained layer and train {article} {head} head alone.",
                f"{each} images of each class are too few for VGG's millions of weights: they "
                f"would be learned by heart.",
                CS231N,
            ),
            Reason(
                f"Cut at {cut}.",
                "The images are like ImageNet's, so its most specific features fit."
                if is_similar
                else "Features get more specific with depth, and the images aren't like "
                "ImageNet's: what lies deeper would fit less.",
                YOSINSKI,
            ),
            Reason(
                "Run the frozen layers once, on each image and its mirror image.",
                "What doesn't change needn't be computed in every epoch, and twice the images "
                "cost nothing after that.",
                KERAS,
            ),
        ]
    else:
        since = "block5_conv1" if is_similar else "block3_conv1"
        options = {
            "cut": "block5_pool",
            "head": "mlp",
            "freeze": "block5_pool",
            "augment": "flip" if is_similar else "crop",
            "epochs": 20,
            "unfreeze": ((3, since),) if is_similar else ((3, "block5_conv1"), (6, since)),
            "learning_rate": 3e-4,
            "layer_decay": 0.3 if is_similar else 0.5,
            "max_grad_norm": 1.0,
        }
        reasons = [
            Reason(
                "Begin with all pretrained layers frozen, for 3 epochs.",
                "The gradients of a new head are large and random at first, and would destroy "
                "what the layers under it know.",
                KERAS,
            ),
            Reason(
                f"Then unfreeze from the top, down to {since}.",
                f"{each} images of each class suffice to adapt whole blocks; "
                + (
                    "as the images are like ImageNet's, the last block is enough."
                    if is_similar
                    else "as the images aren't like ImageNet's, all but edges and textures should."
                ),
                f"{CS231N}; {ULMFIT}",
            ),
            Reason(
                f"Each block learns {options['layer_decay']} times as fast as the one above it.",
                "The lower a layer, the more general it is and the less it has to change.",
                ULMFIT,
            ),
        ]
    reasons += [
        Reason(
            "Pool each feature map to its mean and maximum under the head.",
            "So the head has thousands of weights rather than millions, and any image size fits.",
            FASTAI,
        ),
        Reason(
            "Smooth the labels by 0.1.",
            "A network that may not be certain is less so where it's wrong.",
            INCEPTION,
        ),
    ]
    return Plan(**options, label_smoothing=0.1, reasons=tuple(reasons))
