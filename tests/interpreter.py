"""Triton's interpreter made to compute bf16 as a GPU does.

Triton 3.9's keeps bf16 as raw 16-bit integers: sums, products and `tl.dot` of such values are garbage without a word,
and a cast from fp32 cuts digits off instead of rounding. Set right here: casts, elementwise arithmetic, comparisons and
`tl.dot`. Not set right: reductions of bf16; kernels reduce in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def widen(handle: Any) -> NDArray[Any]:
    """The numbers of a handle; bf16 as fp32."""
    data: NDArray[Any] = handle.data
    if handle.dtype.scalar != tl.bfloat16:
        return data
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[np.uint16]:
    """fp32 to the bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    found: NDArray[np.uint16] = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return found


@cache
def mend() -> None:
    """Replace the builder's methods, once a process."""
    builder = interpreter.InterpreterBuilder
    cast, binary, dot = builder.cast_impl, builder.binary_op, builder.create_dot
    arithmetic = (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum)
    comparisons = (np.less, np.greater, np.less_equal, np.greater_equal, np.equal, np.not_equal)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar == tl.bfloat16 and op in arithmetic:
            return interpreter.TensorHandle(narrow(op(widen(lhs), widen(rhs))), tl.bfloat16)
        if lhs.dtype.scalar == tl.bfloat16 and op in comparisons:
            return interpreter.TensorHandle(op(widen(lhs), widen(rhs)), tl.int1)
        return binary(self, lhs, rhs, op)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, max_imprecise: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            product = np.matmul(widen(a), widen(b), dtype=np.float32)
            return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)
        return dot(self, a, b, acc, precision, max_imprecise)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast_impl, binary_op, create_dot
