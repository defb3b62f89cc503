"""Keras in another dtype, for comparisons that rounding must not blur; what oneDNN computes in."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import pytest
import torch
from keras.src.backend.common import dtypes

from vggtorch.lowering import has_fused_ops

needs_onednn, needs_bfloat16 = (
    pytest.mark.skipif(
        not has_fused_ops(torch.empty(0), dtype), reason=f"oneDNN has no kernels for {dtype} here"
    )
    for dtype in (torch.float32, torch.bfloat16)
)
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_bfloat16)


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
