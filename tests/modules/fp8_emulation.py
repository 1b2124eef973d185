"""Transformer Engine's Python on a CPU: its linear layers run as they are, on emulated kernels that keep a record.

Five things below them are replaced: what quantizes, gathers and multiplies, norms, and attention (by torch's, without
FP8). Values are rounded to the FP8 format, with the scales of each recipe, and multiplied in fp32. The record of a GEMM
says whose it is, and what its operands were.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.module import base, layernorm_linear, linear
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage, Quantizer
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

SCALES = {
    Float8Quantizer: "delayed",
    Float8CurrentScalingQuantizer: "tensorwise",
    Float8BlockQuantizer: "blockwise",
    MXFP8Quantizer: "mxfp8",
}
FORMATS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


@dataclass(frozen=True)
class Gemm:
    """One product.

    Attributes:
        module: name of the module that computes it.
        what: "output", "input gradient" or "weight gradient".
        operands: of weight, input or gradient, as the product takes them: how each was scaled and its format, None for
            one that was not quantized.
        rows: of the product.
    """

    module: str | None
    what: str
    operands: tuple[str | None, str | None]
    rows: int


GEMMS: list[Gemm] = []
_running: list[str] = []
_gather_plain = linear.gather_along_first_dim
_WHAT = {"TN": "output", "NN": "input gradient", "NT": "weight gradient"}


class Quantized(QuantizedTensorStorage):
    """Values as FP8 has them, one rounding along rows and one along columns."""

    def __init__(self, tensor: torch.Tensor, quantizer: Quantizer):
        name = "E4M3" if quantizer.dtype == tex.DType.kFloat8E4M3 else "E5M2"
        self.format = f"{SCALES[type(quantizer)]} {name}"
        self.module = _running[-1] if _running else None
        self.rows, self.columns = _rounded(tensor.detach().float(), quantizer, FORMATS[name])
        self._dtype, self._quantizer, self._size = tensor.dtype, quantizer, tensor.shape

    def size(self) -> torch.Size:
        return self._size

    def update_usage(self, rowwise_usage=None, columnwise_usage=None) -> None:
        pass

    def prepare_for_saving(self):
        tensors, self.rows, self.columns = [self.rows, self.columns], None, None
        return tensors, self

    def restore_from_saved(self, tensors):
        self.rows, self.columns, *rest = tensors
        return rest


def _gather(tensor, group, *args, quantizer=None, **kwargs):
    """All-gather; what is quantized already is gathered as it is."""
    if not isinstance(tensor, Quantized):
        whole, handle = _gather_plain(tensor, group)
        return (whole if quantizer is None else quantizer(whole)), handle
    whole = copy.copy(tensor)
    whole.rows, whole.columns = (_gather_plain(part, group)[0] for part in (tensor.rows, tensor.columns))
    whole._size = whole.rows.shape
    return whole, None


def _rounded(x: torch.Tensor, quantizer: Quantizer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.finfo(dtype).max
    x_TI = x.reshape(-1, x.shape[-1])

    def cast(scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp(-largest, largest).to(dtype).float()

    if isinstance(quantizer, Float8Quantizer):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, x.abs().max()))
        both = cast(x * quantizer.scale) / quantizer.scale
        return both, both
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        both = _in_blocks(x_TI, *x_TI.shape, cast, largest, exact=True).view(x.shape)
        return both, both
    if isinstance(quantizer, MXFP8Quantizer):
        blocks = (1, 32), (32, 1)
    elif quantizer.block_scaling_dim == 1:
        blocks = (1, 128), (128, 1)
    else:
        blocks = (128, 128), (128, 128)
    rows, columns = (_in_blocks(x_TI, *block, cast, largest, exact=False).view(x.shape) for block in blocks)
    return rows, columns


def _in_blocks(x_TI: torch.Tensor, height: int, width: int, cast, largest: float, *, exact: bool) -> torch.Tensor:
    """Rounded with one scale per block, a power of two unless exact."""
    t, i = x_TI.shape
    padded = torch.nn.functional.pad(x_TI, (0, -i % width, 0, -t % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    if not exact:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (cast(blocks * scale) / scale).view(padded.shape)[:t, :i]


def _quantize(tensor, quantizer, output=None, noop=None):
    assert output is None and noop is None
    return Quantized(tensor, quantizer)


def _gemm(a, b, *, out_dtype, layout="TN", out=None, bias=None, grad=False, **_):
    def operand(tensor, rowwise: bool) -> torch.Tensor:
        if isinstance(tensor, Quantized):
            tensor = tensor.rows if rowwise else tensor.columns
        return tensor.float().reshape(-1, tensor.shape[-1])

    a_values, b_values = operand(a, layout[0] == "T"), operand(b, layout[1] == "N")
    result = (b_values.T if layout[1] == "T" else b_values) @ (a_values.T if layout[0] == "T" else a_values)
    owner = a.module if isinstance(a, Quantized) else (_running[-1] if _running else None)
    formats = tuple(tensor.format if isinstance(tensor, Quantized) else None for tensor in (a, b))
    GEMMS.append(Gemm(owner, _WHAT[layout], formats, result.shape[0]))
    assert bias is None and out is None, "nothing here has a bias or a fused accumulation"
    return result.to(out_dtype), None, None, None


def _norm(x, ln_out, weight, bias, eps, quantizer, dtype, *_):
    inverse_T = torch.rsqrt(x.float().square().mean(-1) + eps)
    normed = (x.float() * inverse_T[..., None] * weight.float()).to(x.dtype)
    return (normed if quantizer is None else quantizer(normed)), None, inverse_T


def _norm_backward(gradient, x, inverse_T, weight, *_):
    x, gradient, weight_ = x.float(), gradient.float(), weight.float()
    normed = x * inverse_T[..., None]
    scaled = gradient * weight_
    dx = inverse_T[..., None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return dx.to(weight.dtype), (gradient * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _final_norm(self, x):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _attention(self, query, key, value, *args, **kwargs):
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed.permute(2, 0, 1, 3).flatten(2)


def install(capability: tuple[int, int] = (9, 0)) -> None:
    """Replace kernels for the rest of this process; ``capability`` is what Transformer Engine believes of the GPU."""
    tex.quantize, tex.rmsnorm_bwd = _quantize, _norm_backward
    linear.general_gemm = layernorm_linear.general_gemm = _gemm
    for module in (base, linear, layernorm_linear):
        module.gather_along_first_dim = _gather
    layernorm_linear.apply_normalization = _norm
    te.RMSNorm.forward = _final_norm
    TEDotProductAttention.forward = _attention
    pretend_capability(capability)
    prepare = TransformerEngineBaseModule.prepare_forward
    truth = torch.Tensor.is_cuda

    def prepare_on_cpu(self, *args, **kwargs):
        torch.Tensor.is_cuda = property(lambda tensor: True)
        try:
            return prepare(self, *args, **kwargs)
        finally:
            torch.Tensor.is_cuda = truth

    TransformerEngineBaseModule.prepare_forward = prepare_on_cpu


def pretend_capability(capability: tuple[int, int]) -> None:
    """What Transformer Engine asks before it enters an FP8 region."""
    quantization.get_device_compute_capability = lambda: capability
    for answer in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        setattr(quantization, answer, None)


@contextmanager
def recording(model: torch.nn.Module) -> Iterator[list[Gemm]]:
    """The products inside, with the names of this model's modules."""
    GEMMS.clear()
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: _running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: _running.pop() and None))
    try:
        yield GEMMS
    finally:
        for hook in hooks:
            hook.remove()
