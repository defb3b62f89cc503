"""Keras in another dtype, for comparisons that rounding must not blur."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras
from keras.src.backend.common import dtypes


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Keras computes in this dtype throughout, also where it would do so in float32.

    So it does with means, batch norm and numbers that tensors meet, whatever the policy. In
    float64 no rounding turns single ReLUs on and off, which changes gradients before them.
    """
    was = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = dtype
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = was
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
