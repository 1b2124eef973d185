"""Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU, computes bfloat16 wrongly and says nothing.

It keeps bfloat16 as 16-bit integers, multiplies these as if they were numbers in ``tl.dot``, and cuts off what it
should round. And with NumPy 2.5 it can no longer count to a number that is known at run time only. The three places
that our kernels meet are replaced; arithmetic on bfloat16 itself they never do.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Make the interpreter's conversions from and to bfloat16, and products of bfloat16, those of a GPU, and its
    scalars usable as the bounds of a range."""
    stock_convert, stock_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    stock_patch = interpreter._patch_lang_tensor
    if hasattr(stock_convert, "repaired"):
        return

    def convert(data, source, target, *further, **named):
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widen(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _round(data)
        return stock_convert(data, source, target, *further, **named)

    def dot(self, a, b, *further, **named):
        a, b = (interpreter.TensorHandle(_widen(x.data), tl.float32) if _is_bfloat16(x) else x for x in (a, b))
        return stock_dot(self, a, b, *further, **named)

    def patch(tensor, *scope):
        stock_patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr  # Triton 3.5 has no scope
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    convert.repaired = True
    interpreter._patch_lang_tensor = patch
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


def _is_bfloat16(handle: interpreter.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _round(data: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even, as torch does."""
    rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
    return rounded.view(torch.uint16).numpy().reshape(data.shape)
