"""A mask goes with the tensor that carries it, through every surgery, as Keras would hand it on."""

from __future__ import annotations

import keras
import pytest
import torch
from contract import check, equal, identity, operations, run, same_snapshot, shake_, snapshot
from keras import layers as kl

from vggtorch.surgery import insert, remove, replace, truncate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*destroy the mask information"),
]

NUMBERS = torch.tensor([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 9, 0]])
X = torch.rand(2, 7, 8, generator=torch.Generator().manual_seed(0))


def text(*layers, first=None):
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = (first or kl.Embedding(10, 8, mask_zero=True, name="e"))(tokens)
    for layer in layers:
        x = layer(x)
    return shake_(keras.Model(tokens, x, name="text"))


def recurrent():
    return text(kl.Dropout(0.3, name="d"), kl.LSTM(6, name="l1"), kl.Dense(2, name="out"))


def loaded(model, tmp_path):
    model.save(tmp_path / "m.keras")
    return keras.saving.load_model(tmp_path / "m.keras")


def again(model, tmp_path):
    """A model whose masks are explicit arguments in its config: it was saved and loaded."""
    return [model, loaded(model, tmp_path), loaded(insert(model, "e", identity()), tmp_path)]


def by_hand(*layers):
    """What Keras computes for these layers, one after another, each handing its mask on."""
    x = NUMBERS
    with torch.no_grad():
        for layer in layers:
            x = layer(x)
    return x


@pytest.mark.slow
def test_gru_for_lstm_behind_a_mask(tmp_path):
    for model in again(recurrent(), tmp_path):
        before = snapshot(model)
        new = kl.GRU(6, name="gru")
        result = replace(model, "l1", new)
        same_snapshot(before, snapshot(model))
        expected = by_hand(result.get_layer("e"), new, result.get_layer("out"))
        equal(run(result, NUMBERS), expected)
        unmasked = new(result.get_layer("e")(NUMBERS).detach().clone())  # a clone has no mask
        assert not torch.allclose(unmasked, by_hand(result.get_layer("e"), new))
        equal(run(loaded(result, tmp_path), NUMBERS), expected)
        clone = keras.models.clone_model(result)
        clone.set_weights(result.get_weights())
        equal(run(clone, NUMBERS), expected)


@pytest.mark.slow
def test_what_is_kept_has_its_names_and_computes_the_same(tmp_path):
    for model in again(recurrent(), tmp_path):
        new = (
            identity() if "identity" not in operations(model) else kl.Activation("linear", name="i")
        )
        result = insert(model, "out", new)
        check(model, result, new=[new])
        equal(run(result, NUMBERS), run(model, NUMBERS))
        assert set(operations(result)) <= {*operations(model), new.name}


@pytest.mark.slow
def test_a_mask_that_belongs_to_what_was_replaced_goes_with_it(tmp_path):
    """A convolution shortens the sequence and hands no mask on, in Keras and so in surgery."""
    for model in again(recurrent(), tmp_path):
        conv = kl.Conv1D(8, 3, name="conv")
        result = insert(model, "e", conv)
        layers = [result.get_layer(name) for name in ("e", "conv", "l1", "out")]
        equal(run(result, NUMBERS), by_hand(*layers))
        other = kl.Embedding(10, 8, mask_zero=False, name="other")
        result = replace(model, "e", other)
        layers = [result.get_layer(name) for name in ("other", "l1", "out")]
        equal(run(result, NUMBERS), by_hand(*layers))
        masked = kl.Embedding(10, 8, mask_zero=True, name="masked")
        result = replace(model, "e", masked)
        layers = [result.get_layer(name) for name in ("masked", "l1", "out")]
        equal(run(result, NUMBERS), by_hand(*layers))
        bare = kl.Embedding(10, 8, name="bare")
        assert not any("not_equal" in name for name in operations(replace(model, "e", bare)))


@pytest.mark.slow
def test_removal_of_layers_that_read_a_mask_and_that_make_one(tmp_path):
    model = text(
        kl.LSTM(8, return_sequences=True, name="l1"),
        kl.Bidirectional(kl.GRU(4, return_sequences=True), name="both"),
        kl.GlobalAveragePooling1D(name="mean"),
    )
    for source in (model, loaded(model, tmp_path)):
        result = remove(source, "l1")
        layers = [result.get_layer(name) for name in ("e", "both", "mean")]
        equal(run(result, NUMBERS), by_hand(*layers))
        result = remove(source, ["l1", "both"])
        equal(run(result, NUMBERS), by_hand(result.get_layer("e"), result.get_layer("mean")))
        result = replace(source, ["l1", "both"], kl.GRU(8, return_sequences=True, name="gru"))
        layers = [result.get_layer(name) for name in ("e", "gru", "mean")]
        equal(run(result, NUMBERS), by_hand(*layers))
    inputs = keras.Input((7, 8), name="x")
    y = kl.LSTM(3, name="l")(kl.Masking(0.5, name="masking")(inputs))
    masking = keras.Model(inputs, y)
    x = X.clone()
    x[:, 4:] = 0.5
    result = remove(masking, "masking")
    with torch.no_grad():
        equal(run(result, x), result.get_layer("l")(x))
    equal(run(insert(masking, "l", identity()), x), run(masking, x))
    assert not torch.allclose(run(result, x), run(masking, x))


@pytest.mark.slow
def test_attention_joins_and_states(tmp_path):
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = kl.Embedding(10, 8, mask_zero=True, name="e")(tokens)
    y = kl.MultiHeadAttention(2, 4, name="attention")(x, x)
    z = kl.Concatenate(name="both")([x, y])
    z, state, _ = kl.LSTM(5, return_state=True, return_sequences=True, name="l")(z)
    model = shake_(keras.Model(tokens, [kl.GRU(3, name="g")(z), state], name="attend"))
    for source in (model, loaded(model, tmp_path)):
        result = insert(source, "e", identity())
        for a, b in zip(run(result, NUMBERS), run(source, NUMBERS), strict=True):
            equal(a, b)
        assert len(operations(result)) == len(operations(source)) + 1
        shorter = replace(source, "attention", kl.Dense(8, name="dense"))
        e, d = shorter.get_layer("e"), shorter.get_layer("dense")
        with torch.no_grad():
            both = shorter.get_layer("both")([x := e(NUMBERS), d(x)])
            equal(run(shorter, NUMBERS)[0], shorter.get_layer("g")(shorter.get_layer("l")(both)[0]))


def test_a_mask_of_the_users_own_stays_an_argument():
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = kl.Embedding(10, 8, mask_zero=True, name="e")(tokens)
    mask = keras.ops.not_equal(tokens, 3)
    model = keras.Model(tokens, kl.LSTM(4, name="l")(x, mask=mask))
    result = insert(model, "e", identity())
    equal(run(result, NUMBERS), run(model, NUMBERS))
    with pytest.raises(ValueError, match="one way in; 'l' have 2"):
        replace(model, "l", kl.GRU(4))


def test_a_cut_that_would_leave_a_mask_behind_is_refused():
    with pytest.raises(ValueError, match="'not_equal.*' -> 'l1' goes around it"):
        truncate(recurrent(), "out", start="e")
    first, rest = truncate(recurrent(), "l1"), truncate(recurrent(), "out", start="l1")
    assert rest(first(NUMBERS)).shape == (2, 2)


@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("after", [0.0, 0.4])
@pytest.mark.parametrize(
    "make",
    [
        kl.Dropout,
        kl.SpatialDropout1D,
        kl.GaussianDropout,
        kl.AlphaDropout,
        kl.GaussianNoise,
    ],
)
def test_a_rate_that_was_changed_after_building(make, before, after, tmp_path):
    inputs = keras.Input((7, 8), name="x")
    x = kl.Dense(8, name="a")(inputs)
    model = keras.Model(inputs, kl.Dense(2, name="b")(make(before, seed=1, name="drop")(x)))
    drop = model.get_layer("drop")
    setattr(drop, "stddev" if hasattr(drop, "stddev") else "rate", after)
    result = insert(model, "a", identity())
    kept = result.get_layer("drop")
    assert kept.get_config() == drop.get_config()
    equal(run(result, X), run(model, X))
    if before and after:
        equal(result(X, training=True), model(X, training=True))  # one seed, one draw
    elif after:
        assert not torch.equal(result(X, training=True), run(model, X))
    else:
        equal(result(X, training=True), run(model, X))
    equal(run(remove(result, "identity"), X), run(model, X))
