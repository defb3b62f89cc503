from __future__ import annotations

import dataclasses

import pytest
import tiny

from vggtorch.training.advice import advise
from vggtorch.training.loop import finetune


def test_few_images_freeze_all_and_cut_lower_where_images_differ():
    similar, different = advise(300, 10, "similar"), advise(300, 10, "different")
    assert similar.freeze == similar.cut == "block5_pool"
    assert different.freeze == different.cut == "block4_pool"
    assert similar.unfreeze == different.unfreeze == ()


def test_of_some_images_a_tenth_validates_and_of_few_all_is_seen():
    few, some, many = (advise(10 * each, 10) for each in (199, 200, 500))
    assert few.crop_pct == some.crop_pct == 1 and many.crop_pct is None
    assert few.unfreeze == some.unfreeze == () and some.freeze == "block5_pool"
    assert (few.validation_split, some.validation_split, many.validation_split) == (0.2, 0.1, 0.2)
    assert "a tenth" in str(some) and "a tenth" not in str(few) + str(many)
    assert advise(2000, 10, "similar").unfreeze == advise(2000, 10, "different").unfreeze == ()


def test_many_images_unfreeze_from_the_top_and_further_where_images_differ():
    similar, different = advise(50_000, 10, "similar"), advise(50_000, 10, "different")
    assert [layer for _, layer in similar.unfreeze] == ["block5_conv1"]
    assert [layer for _, layer in different.unfreeze] == ["block5_conv1", "block3_conv1"]
    assert similar.layer_decay < different.layer_decay < 1


@pytest.mark.parametrize("images", [300, 3_000, 50_000])
@pytest.mark.parametrize("similarity", ["similar", "different", None])
def test_every_decision_has_its_reason_and_source(images, similarity):
    plan = advise(images, 10, similarity)
    assert len(plan.reasons) >= 4
    assert all(reason.why and reason.source for reason in plan.reasons)
    assert all(reason.decision in str(plan) for reason in plan.reasons)


@pytest.mark.slow
def test_finetune_takes_a_plan_as_it_is(tmp_path):
    plan = dataclasses.replace(
        advise(24, 3, "different"),
        cut="block2_pool", freeze="block2_pool", epochs=2, image_size=16,
        output_dir=str(tmp_path / "r"),
    )  # fmt: skip
    history = finetune(tiny.network(None), tiny.pictures(tmp_path / "data"), config=plan)
    assert len(history.epochs) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1, "similar"), "Received classes=1; expected 2 or more."),
        ((3, 4, "similar"), "Received images=3 for 4 classes"),
        ((30, 4, "alike"), "Received similarity='alike'; expected 'similar'"),
    ],
)
def test_advise_says_what_it_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        advise(*arguments)
