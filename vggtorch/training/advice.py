"""The rules of thumb of fine-tuning, as a plan with its reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vggtorch.training.config import TrainConfig
from vggtorch.weight_sets import DataConfig

FEW = 500  # images of each class; below, blocks of VGG overfit
FEWER = 200  # below, a tenth of a class is too few to validate on


class Reason(NamedTuple):
    """One decision of a plan, why, who found so, and the settings that it consists of."""

    decision: str
    why: str
    source: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Plan(TrainConfig):
    """A TrainConfig with the reasons for it; `finetune` takes it as it is."""

    reasons: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{r.decision}\n    {r.why}\n    [{r.source}]" for r in self.reasons)

    def as_it_runs(self, images: DataConfig) -> str:
        """The decisions that are followed with their reasons, and those that settings override.

        Args:
            images: what images are brought to, whose geometry a model may bring along.
        """

        def is_followed(reason: Reason) -> bool:
            return all(
                getattr(images if hasattr(images, name) else self, name) == value
                for name, value in reason.settings.items()
            )

        followed = tuple(filter(is_followed, self.reasons))
        others = [r.decision for r in self.reasons if r not in followed]
        text = str(dataclasses.replace(self, reasons=followed))
        return "\n".join(
            [*([text] if text else []), *(f"By your settings, not: {d}" for d in others)]
        )


YOSINSKI = "Yosinski et al., How transferable are features in deep neural networks?, NeurIPS 2014"
CS231N = "Karpathy, CS231n: Transfer Learning, Stanford"
ULMFIT = "Howard and Ruder, Universal Language Model Fine-tuning, ACL 2018"
KERAS = "Chollet, Transfer learning & fine-tuning, Keras guide"
HYPERCOLUMNS = "Hariharan et al., Hypercolumns for Object Segmentation, CVPR 2015"
PYRAMID = "He et al., Spatial Pyramid Pooling in Deep Convolutional Networks, ECCV 2014"
INCEPTION = "Szegedy et al., Rethinking the Inception Architecture, CVPR 2016"
FASTAI = "Howard and Gugger, fastai: A Layered API for Deep Learning, 2020"


Similarity = Literal["similar", "different"]

_OF_A_HEAD: dict[str, Any] = {"epochs": 30, "batch_size": 64}  # where it trains alone
_QUARTERS = Reason(
    "Pool each feature map to its mean and maximum under the head, and its quarters to means.",
    "So any image size fits, and the head still knows roughly where something is, which whole "
    "maps' means don't say.",
    f"{FASTAI}; {PYRAMID}",
    {"head": "multilevel"},
)
_WHOLE = Reason(
    "Resize the shorter side to the size, and cut nothing off it.",
    "A centre crop of 0.875 leaves out a quarter of each image, and few images can't spare it.",
    FASTAI,
    {"crop_mode": "center", "crop_pct": 1.0},
)
_LEVELS = Reason(
    "Put the head on the maps of the last three blocks together.",
    "Features get more specific with depth. Which depth serves these images best isn't known, and "
    "the head can choose.",
    f"{HYPERCOLUMNS}; folds of training images, benchmarks/tried.md",
    {"head": "multilevel"},
)
_CACHED = Reason(
    "Run the frozen layers once, on each image and its mirror image.",
    "What doesn't change needn't be computed in every epoch, and twice the images cost nothing "
    "after that.",
    KERAS,
    {"cache": True, "augment": "flip", "cache_copies": 2, "mixup": 0.0, "cutmix": 0.0},
)
_CACHED_PLAIN = Reason(
    "Run the frozen layers once, on each image.",
    "What doesn't change needn't be computed in every epoch.",
    KERAS,
    {"cache": True, "mixup": 0.0, "cutmix": 0.0},
)
_TENTH = Reason(
    "Hold out a tenth of the images, where nothing else validates.",
    "Against a fifth, what is learned from grows by an eighth, which matters more than how finely "
    "it is scored.",
    "learning from 3000 images against 2000, benchmarks/tried.md",
    {"validation_split": 0.1},
)
_LAST = Reason(
    "Keep the weights of the last epoch.",
    "The learning rate has fallen to nothing by then, and which epoch is best on a few hundred "
    "validation images is mostly chance.",
    "folds of training images, benchmarks/tried.md",
    {"restore_best_weights": False},
)
_SMOOTHED = Reason(
    "Smooth the labels by 0.1.",
    "A network that may not be certain is less so where it's wrong.",
    INCEPTION,
    {"label_smoothing": 0.1},
)


def advise(images: int, classes: int, similarity: Similarity | None = None) -> Plan:
    """How to fine-tune a VGG on this many images, by the rules of thumb.

    >>> import vggtorch as vt
    >>> plan = vt.advise(images=300, classes=10)
    >>> plan.cut, plan.head, plan.epochs
    ('block5_pool', 'multilevel', 30)
    >>> print(plan.reasons[0].decision)
    Freeze every pretrained layer and train a multilevel head alone.

    Args:
        images: how many, for training.
        classes: how many.
        similarity: `similar` to ImageNet (photographs of things, of a few hundred pixels), or
            `different` (tiny or medical images, drawings, textures, satellites); None where it
            isn't known.

    Raises:
        ValueError: fewer than two classes, fewer images than classes, another similarity.
    """
    if classes < 2:
        raise ValueError(f"Received classes={classes}; expected 2 or more.")
    if images < classes:
        raise ValueError(
            f"Received images={images} for {classes} classes; expected at least one of each."
        )
    if similarity not in ("similar", "different", None):
        raise ValueError(
            f"Received similarity={similarity!r}; expected 'similar' (to ImageNet's photographs), "
            f"'different', or None."
        )
    each = images // classes
    return (_of_few if each < FEW else _of_many)(each, similarity)


def _plan(reasons: Sequence[Reason], **others: Any) -> Plan:
    """The plan that consists of these decisions, and of settings beside them."""
    settings = {name: value for reason in reasons for name, value in reason.settings.items()}
    # How a model's images were cropped goes before, and a decision of it holds where it fits that.
    return Plan(**settings | {"crop_mode": None} | others, reasons=tuple(reasons))


def _pooled(head: str) -> Reason:
    if head == "multilevel":
        return _QUARTERS
    return Reason(
        "Pool each feature map to its mean and maximum under the head.",
        "So the head has thousands of weights rather than millions, and any image size fits.",
        FASTAI,
        {"head": head},
    )


def _of_few(each: int, similarity: Similarity | None) -> Plan:
    """The plan for few images of each class: everything frozen, a head alone."""
    is_similar = similarity != "different"
    cut = "block5_pool" if is_similar else "block4_pool"
    head = "multilevel" if similarity is None else "linear" if is_similar else "mlp"
    specific = Reason(
        f"Cut at {cut}.",
        "The images are like ImageNet's, so its most specific features fit."
        if is_similar
        else "Features get more specific with depth, and the images aren't like "
        "ImageNet's: what lies deeper would fit less.",
        YOSINSKI,
        {"cut": cut},
    )
    frozen = Reason(
        f"Freeze every pretrained layer and train {'an' if head == 'mlp' else 'a'} {head} head "
        f"alone.",
        f"{each} images of each class are too few for VGG's millions of weights: they "
        f"would be learned by heart.",
        CS231N,
        {"freeze": cut, "head": head, "unfreeze": ()},
    )
    where = _LEVELS if similarity is None else specific
    tenth = [_TENTH] if each >= FEWER else []
    reasons = [frozen, where, _CACHED, *tenth, _LAST, _pooled(head), _WHOLE, _SMOOTHED]
    return _plan(reasons, cut=cut, **_OF_A_HEAD)


def _of_many(each: int, similarity: Similarity | None) -> Plan:
    """The plan for many images of each class: blocks are unfrozen from the top."""
    is_similar = similarity != "different"
    since = "block5_conv1" if is_similar else "block3_conv1"
    unfreeze = ((3, since),) if is_similar else ((3, "block5_conv1"), (6, since))
    decay = 0.3 if is_similar else 0.5
    enough = {
        "similar": "as the images are like ImageNet's, the last block is enough.",
        "different": "as the images aren't like ImageNet's, all but edges and textures should.",
        None: "what the last block knows is the most specific.",
    }[similarity]
    reasons = [
        Reason(
            "Begin with all pretrained layers frozen, for 3 epochs.",
            "The gradients of a new head are large and random at first, and would destroy "
            "what the layers under it know.",
            KERAS,
            {"freeze": "block5_pool", "unfreeze": unfreeze},
        ),
        Reason(
            f"Then unfreeze from the top, down to {since}.",
            f"{each} images of each class suffice to adapt whole blocks; {enough}",
            f"{CS231N}; {ULMFIT}",
            {"unfreeze": unfreeze},
        ),
        Reason(
            f"Each block learns {decay} times as fast as the one above it.",
            "The lower a layer, the more general it is and the less it has to change.",
            ULMFIT,
            {"layer_decay": decay},
        ),
        _pooled("multilevel" if similarity is None else "mlp"),
        _SMOOTHED,
    ]
    augment = "flip" if is_similar else "crop"
    return _plan(
        reasons,
        cut="block5_pool",
        augment=augment,
        epochs=20,
        learning_rate=3e-4,
        max_grad_norm=1.0,
    )


def planned(
    layers: Collection[str],
    images: int,
    classes: int,
    similarity: Similarity | None,
    given: Mapping[str, Any],
    *,
    are_files: bool = True,
) -> Plan:
    """The plan for a model with these layers, in order, under the settings that the user gave.

    A model without VGG's blocks is frozen whole, under a head on its last maps. What follows from a
    setting of the plan goes where the user sets that otherwise. Of a Dataset, where the images are
    no files, nothing is mirrored or held out.
    """
    plan = advise(images, classes, similarity)
    needed = {plan.cut, plan.freeze, *(name for _, name in plan.unfreeze)}
    if not needed.issubset(layers):
        last = list(layers)[-1]
        frozen = Reason(
            f"Freeze every layer up to {last} and train a multilevel head alone.",
            "How far to cut and what to unfreeze is known here for VGG's blocks.",
            CS231N,
            {"freeze": last, "head": "multilevel", "unfreeze": ()},
        )
        reasons = [frozen, _LEVELS, _CACHED, _LAST, _QUARTERS, _WHOLE, _SMOOTHED]
        plan = _plan(reasons, cut=last, **_OF_A_HEAD)
    if not are_files:
        plan = _of_dataset(plan)
    changed = dict(given)
    if "cut" in given and "freeze" not in given:
        # What is decided of all that is kept goes where the user cuts.
        changed["freeze"] = given["cut"]
        changed["reasons"] = tuple(
            r._replace(settings={**r.settings, "freeze": given["cut"]})
            if "freeze" in r.settings
            else r
            for r in plan.reasons
        )
    if {"patience", "monitor"} & set(given) or given.get("schedule", "cosine") != "cosine":
        # Whoever stops at a best epoch, or whose learning rate doesn't fall to nothing, wants that.
        changed.setdefault("restore_best_weights", True)
    if given.get("augment") == "none":
        changed.setdefault("cache_copies", 1)
    if "unfreeze" not in given:
        epochs = given.get("epochs", plan.epochs)
        keeps = "cut" not in given and "freeze" not in given
        changed["unfreeze"] = tuple(u for u in plan.unfreeze if keeps and u[0] < epochs)
    return dataclasses.replace(plan, **changed)


def _of_dataset(plan: Plan) -> Plan:
    """The same without what only images in files have done to them here."""
    reasons = [_CACHED_PLAIN if r is _CACHED else r for r in plan.reasons if r is not _TENTH]
    return dataclasses.replace(
        plan,
        augment=TrainConfig.augment,
        cache_copies=TrainConfig.cache_copies,
        validation_split=TrainConfig.validation_split,
        reasons=tuple(reasons),
    )
