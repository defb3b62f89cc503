from __future__ import annotations

import dataclasses
import re
from typing import Any

import keras
import numpy as np
import pytest
import torch
from fresh import run

from vggtorch.training.config import TrainConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "Received epochs=0; expected a whole number from 1."),
        ({"epochs": None}, "Received epochs=None; expected a whole number from 1."),
        ({"batch_size": 2.5}, "Received batch_size=2.5; expected a whole number from 1."),
        ({"learning_rate": 0.0}, "Received learning_rate=0.0; expected a number above 0."),
        ({"learning_rate": float("nan")}, "Received learning_rate=nan; expected a number above 0."),
        ({"learning_rate": "fast"}, "Received learning_rate='fast'; expected a number above 0."),
        ({"layer_decay": 1.5}, "expected a number above 0 and at most 1."),
        ({"label_smoothing": 1.0}, "expected a number from 0 and below 1."),
        ({"ema_decay": 1.0}, "expected a number between 0 and 1, or None."),
        ({"head": "big"}, "Received head='big'; expected one of 'multilevel', 'linear', 'mlp', "),
        ({"augment": "all"}, "expected one of 'none', 'flip', 'crop', 'trivial'."),
        ({"augment": None}, "Received augment=None; expected one of 'none', 'flip', "),
        ({"monitor": "val_loss"}, "'calibration_error', 'loss'. Perhaps 'loss'?"),
        ({"precision": "mixed_bfloat16"}, "expected one of 'fp32', 'bf16'. Perhaps 'bf16'?"),
        ({"crop_mode": "squish"}, "Perhaps 'squash'?"),
        ({"metrics": "auroc,macro_f1"}, "calibration_error, loss. Name each by itself."),
        ({"metrics": "f1"}, "calibration_error, loss. Perhaps 'macro_f1'?"),
        ({"optimizer": keras.optimizers.SGD}, "Received optimizer=SGD, which is Keras's; expected"),
        ({"optimizer": keras.optimizers.SGD(0.1)}, "optimizer=SGD, which is Keras's; expected one"),
        ({"restore_best_weights": "False"}, "='False'; expected True or False."),
        ({"resume": "run/last.pt"}, "Received resume='run/last.pt'; expected True or False."),
        ({"patience": True}, "Received patience=True; expected a whole number from 1, or None."),
        ({"mixup": True}, "Received mixup=True; expected a number from 0."),
        ({"output_dir": ""}, "Received output_dir=''; expected a name."),
        ({"label_pattern": 3}, "Received label_pattern=3; expected a name."),
        ({"freeze": True}, "Received freeze=True; expected a name."),
        ({"optimizer": None}, "Received optimizer=None; expected a name, or what makes one."),
        ({"class_weight": [0, 0.0]}, "a number from 0 for each class, and one above 0."),
        ({"class_weight": {}}, "Received class_weight={}; expected 'balanced', or a number"),
        ({"class_weight": 2.0}, "Received class_weight=2.0; expected 'balanced', or a number"),
        (
            {"warmup": 0.3, "schedule": "exponentiallr"},
            "Received warmup=0.3, which the schedules cosine, constant have",
        ),
        (
            {"monitor": "loss", "restore_best_weights": False},
            "Received monitor='loss' with restore_best_weights=False and no patience",
        ),
        ({"cut": "block2_pool"}, "Received cut='block2_pool' without a head."),
        (
            {"unfreeze": ((2, "block5_conv1"),)},
            "Received unfreeze=((2, 'block5_conv1'),), and nothing is frozen.",
        ),
        (
            {"freeze": "block5_pool", "unfreeze": ((10, "block5_conv1"),)},
            "expected pairs of an epoch from 1 to 9 and a layer's name",
        ),
    ],
)
def test_config_says_what_it_expected(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**options)


def test_every_field_has_a_text_for_the_command_line():
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"]
        assert text[0].isupper() and text.endswith("."), field.name
        assert len(text) <= 100, field.name


def test_the_configuration_needs_no_keras_and_no_torch():
    result = run(
        "import sys, vggtorch as vt; vt.TrainConfig(); print({'keras', 'torch'} & {*sys.modules})"
    )
    assert result.stdout.split() == ["set()"], result.stderr


def test_one_name_a_list_and_a_dictionary_are_what_they_stand_for():
    alone: dict[str, Any] = {"metrics": "auroc", "log_with": "tensorboard"}
    listed: dict[str, Any] = {"metrics": ["auroc"], "log_with": ["tensorboard"]}
    pairs: list[Any] = [{2: "b", 3: "c"}, [[2, "b"], (3, "c")]]
    one = TrainConfig(freeze="a", unfreeze=pairs[0], **alone)
    same = TrainConfig(freeze="a", unfreeze=pairs[1], **listed)
    assert one == same and hash(one) == hash(same)
    assert (one.metrics, one.log_with) == (("auroc",), ("tensorboard",))
    assert one.unfreeze == ((2, "b"), (3, "c"))


@pytest.mark.parametrize("given", ["2:b", 2, [2], [("b", 2)], {"b": 2}, [(2, "b", 3)]])
def test_what_is_no_pair_of_an_epoch_and_a_layer_is_refused(given):
    with pytest.raises(ValueError, match="expected pairs of an epoch from 1 to 9 and a layer's na"):
        TrainConfig(freeze="a", unfreeze=given)


def test_nothing_thaws_in_a_run_of_one_epoch():
    with pytest.raises(ValueError, match="with epochs=1, after which nothing can be unfrozen. Set"):
        TrainConfig(epochs=1, freeze="block4_pool", unfreeze=((1, "block5_conv1"),))


def test_numbers_of_numpy_and_torch_are_numbers():
    given = TrainConfig(
        epochs=np.int64(3),  # type: ignore[arg-type]
        learning_rate=np.float32(0.5),  # type: ignore[arg-type]
        weight_decay=torch.tensor(0.25),  # type: ignore[arg-type]
        class_weight=np.array([1.0, 2.5]),  # type: ignore[arg-type]
    )
    expected = TrainConfig(epochs=3, learning_rate=0.5, weight_decay=0.25, class_weight=(1.0, 2.5))
    assert given == expected and type(given.epochs) is int
    assert type(TrainConfig(epochs=3.0).epochs) is int  # type: ignore[arg-type]
    inside: Any = {"class_weight": {"a": np.float32(0.5)}, "unfreeze": {np.int64(2): "b"}}
    config = TrainConfig(freeze="a", **inside)
    assert config.class_weight == {"a": 0.5} and config.unfreeze == ((2, "b"),)
    assert TrainConfig(class_weight=[torch.tensor(2), 1]).class_weight == (2, 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Received epochs=1.5; expected a whole number from 1"):
        TrainConfig(epochs=np.float64(1.5))  # type: ignore[arg-type]
