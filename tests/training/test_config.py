from __future__ import annotations

import argparse
import dataclasses
import re

import pytest

from vggtorch.training.config import TrainConfig, add_arguments, options_from


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
        ({"ema": 1.0}, "expected a number between 0 and 1, or None."),
        ({"optimizer": "adam"}, "Received optimizer='adam'; expected one of 'adamw', 'sgd'."),
        ({"head": "big"}, "Received head='big'; expected one of 'tutorial', 'linear', 'mlp'."),
        ({"augment": "all"}, "expected one of 'none', 'flip', 'crop', 'trivial'."),
        ({"cut": "block2_pool"}, "Received cut='block2_pool' without a head."),
        ({"unfreeze": ((2, "block5_conv1"),)}, "Received unfreeze without freeze"),
        (
            {"freeze": "block5_pool", "unfreeze": ((10, "block5_conv1"),)},
            "expected pairs of an epoch from 1 to 9 and a layer's name",
        ),
    ],
)
def test_config_says_what_it_expected(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**options)


def test_every_field_is_an_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_from(parser.parse_args([])) == {}
    changed = TrainConfig(
        cut="block4_pool", head="mlp", freeze="block4_pool", unfreeze=((2, "a"), (3, "b")),
        epochs=5, batch_size=7, accumulate=2, optimizer="sgd", learning_rate=0.5, layer_decay=0.4,
        warmup=0.3, schedule="constant", weight_decay=0.2, label_smoothing=0.1, clip_norm=2.0,
        ema=0.9, patience=3, precision="bf16", image_size=96, augment="crop", broken="skip",
        holdout=0.3, workers=1, cache=False, cache_copies=2, cache_half=True, cache_folder="c",
        folder="r", checkpoint_steps=9, resume=True, tensorboard=True, seed=4,
    )  # fmt: skip
    words = []
    for field in dataclasses.fields(TrainConfig):
        value, flag = getattr(changed, field.name), "--" + field.name.replace("_", "-")
        assert value != field.default, field.name
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif field.name == "unfreeze":
            words += [flag, *(f"{epoch}:{layer}" for epoch, layer in value)]
        else:
            words += [flag, str(value)]
    assert TrainConfig(**options_from(parser.parse_args(words))) == changed


def test_an_unfreeze_option_without_an_epoch(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--unfreeze", "block5_conv1"])
    assert "isn't EPOCH:LAYER" in capsys.readouterr().err
