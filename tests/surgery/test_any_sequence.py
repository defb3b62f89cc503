"""Many operations, one after another, keep the contract."""

from __future__ import annotations

import hypothesis
import keras
import pytest
import torch
from contract import (
    check,
    equal,
    images,
    operations,
    output_of,
    run,
    same_snapshot,
    shake_,
    snapshot,
    vgg,
)
from hypothesis import strategies as st
from keras import layers as kl

from vggtorch.surgery import freeze_, insert, remove, replace, stack, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


def small():
    """Branches, a shared layer, operations and a nested model on 8x8 images."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = kl.Conv2D(6, 3, padding="same", name="stem")(inputs)
    left = kl.Conv2D(6, 3, padding="same", name="left")(x)
    right = kl.BatchNormalization(name="norm")(kl.Conv2D(6, 1, name="right")(x))
    x = kl.Add(name="join")([x, left, right])
    again = kl.DepthwiseConv2D(3, padding="same", name="again")
    x = keras.ops.relu(again(keras.ops.relu(again(x))))
    inside = keras.Input((8, 8, 6))
    x = keras.Model(inside, kl.Conv2D(6, 1, name="inner")(inside), name="nested")(x)
    x = kl.Concatenate(name="both")([x, kl.Dropout(0.5, name="drop")(x)])
    return keras.Model(inputs, kl.MaxPooling2D(name="pool")(x), name="small")


def spliced(model, x, changed):
    """Run `model` on `x` with the operations named in `changed` replaced by functions."""

    def operation_fn(op):
        def call(*args, **kwargs):
            if "training" in getattr(op, "_call_context_args", ()):
                kwargs["training"] = False
            # Keras refuses a nested model images of another size than it was made for.
            run = op.call if isinstance(op, keras.Model) else op
            return changed.get(op.name, lambda op, *args: run(*args, **kwargs))(op, *args)

        return call

    with torch.no_grad():
        return model._run_through_graph([x], operation_fn=operation_fn)


def step(model, x, data, count):
    """One random operation: (result, what it must compute for x) or a refusal."""
    names = [n for n, op in operations(model).items() if not isinstance(op, kl.InputLayer)]
    name = data.draw(st.sampled_from(names))
    verb = data.draw(
        st.sampled_from(["truncate", "insert", "remove", "replace", "stack", "freeze"])
    )
    new = data.draw(
        st.sampled_from(
            [
                lambda: kl.Activation("relu", name=f"new{count}"),
                lambda: kl.BatchNormalization(name=f"new{count}"),
                lambda: kl.Conv2D(6, 3, padding="same", name=f"new{count}"),
                lambda: kl.MaxPooling2D(2, padding="same", name=f"new{count}"),
            ]
        )
    )()
    first = lambda t: t[0] if isinstance(t, list) else t  # noqa: E731

    def apply(t):
        with torch.no_grad():
            return new(t, training=False)

    if verb == "truncate":
        return (
            truncate(model, name),
            (),
            lambda: run(keras.Model(model.input, output_of(model, name)), x),
        )
    if verb == "insert":
        result = insert(model, name, new)
        return result, [new], lambda: spliced(model, x, {name: lambda op, *args: apply(op(*args))})
    if verb == "remove":
        return (
            remove(model, name),
            (),
            lambda: spliced(model, x, {name: lambda op, *args: first(args[0])}),
        )
    if verb == "replace":
        result = replace(model, name, new)
        return (
            result,
            [new],
            lambda: spliced(model, x, {name: lambda op, *args: apply(first(args[0]))}),
        )
    if verb == "stack":
        return stack(model, new), [new], lambda: apply(run(model, x))
    freeze_(model, until=name)
    return truncate(model, model.output_names[0]), (), lambda: run(model, x)


@pytest.fixture(scope="module", params=["small", "vgg"])
def seed_model(request):
    if request.param == "small":
        return shake_(small()), images(8) / 255
    model, x = vgg()
    return truncate(model, "block2_pool"), x / 255


@pytest.mark.slow
@hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # shrinking takes minutes
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_any_sequence_of_operations_keeps_the_contract(seed_model, data):
    model, x = seed_model
    model = truncate(model, model.output_names[0])  # freeze_ works in place
    for count in range(6):
        before = snapshot(model)
        try:
            result, new, expected = step(model, x, data, count)
        except ValueError:
            same_snapshot(before, snapshot(model))
            continue
        check(model, result, new=new)
        equal(run(result, x), expected())
        model = result
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    equal(run(clone, x), run(model, x))
