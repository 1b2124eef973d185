"""Group RMS norm of the over-width state, the norm before the reduction, in one pass over it per direction."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vwn.ops.kernels.launch import programs

# A group is one backbone vector and must fit in a program's registers.
MAX_GROUP = 16384


def group_norm(h_TNE: Tensor, weight_NE: Tensor, *, m: int, eps: float) -> Tensor:
    """H / rms(groups of m segments) * weight: [T, N, E] in the dtype of h; statistics in fp32."""
    return _GroupNorm.apply(h_TNE, weight_NE, m, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TNE: Tensor, weight_NE: Tensor, m: int, eps: float) -> Tensor:
        h_TNE = h_TNE.contiguous()
        ctx.save_for_backward(h_TNE, weight_NE)
        ctx.m, ctx.eps = m, eps
        out_TNE = torch.empty_like(h_TNE)
        constants, warps = _constants(h_TNE, m)
        if h_TNE.shape[0]:
            with torch.cuda.device_of(h_TNE):
                group_norm_forward[(h_TNE.shape[0] * constants["GROUPS"],)](
                    h_TNE, weight_NE.float().contiguous(), out_TNE, eps, **constants, num_warps=warps
                )
        return out_TNE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TNE: Tensor):
        h_TNE, weight_NE = ctx.saved_tensors
        constants, warps = _constants(h_TNE, ctx.m)
        tokens, grid = h_TNE.shape[0], programs(h_TNE, h_TNE.shape[0])
        dh_TNE = torch.empty_like(h_TNE)
        dweight_PNE = h_TNE.new_zeros(grid, *weight_NE.shape, dtype=torch.float32)
        if tokens:
            with torch.cuda.device_of(h_TNE):
                group_norm_backward[(grid, constants["GROUPS"])](
                    h_TNE, weight_NE.float().contiguous(), dout_TNE.contiguous(), dh_TNE, dweight_PNE, tokens, ctx.eps,
                    **constants, num_warps=warps,
                )  # fmt: skip
        return dh_TNE, dweight_PNE.sum(0).to(weight_NE.dtype), None, None


def _constants(h_TNE: Tensor, m: int) -> tuple[dict[str, int], int]:
    size = m * h_TNE.shape[-1]
    padded = triton.next_power_of_2(size)
    return {"GROUPS": h_TNE.shape[1] // m, "SIZE": size, "PADDED": padded}, min(16, max(1, padded // 512))


@triton.jit
def group_norm_forward(h_ptr, weight_ptr, out_ptr, eps, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """One group of one token a program."""
    program = tl.program_id(0)
    channel = tl.arange(0, PADDED)
    exists = channel < SIZE
    place = program.to(tl.int64) * SIZE + channel
    h = tl.load(h_ptr + place, mask=exists, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + program % GROUPS * SIZE + channel, mask=exists, other=0.0)
    out = h * tl.rsqrt(tl.sum(h * h) / SIZE + eps) * weight
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T"])
def group_norm_backward(
    h_ptr, weight_ptr, dout_ptr, dh_ptr, dweight_ptr, T, eps,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One group of every program-th token, so that a program's sum for the weight stays in registers.

    With x = H / rms and g = dout o weight:  dH = (g - x mean(g x)) / rms.
    """
    group = tl.program_id(1)
    channel = tl.arange(0, PADDED)
    exists = channel < SIZE
    weight = tl.load(weight_ptr + group * SIZE + channel, mask=exists, other=0.0)
    dweight = tl.zeros((PADDED,), tl.float32)
    token = tl.program_id(0)
    while token < T:
        place = (token.to(tl.int64) * GROUPS + group) * SIZE + channel
        h = tl.load(h_ptr + place, mask=exists, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + place, mask=exists, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(h * h) / SIZE + eps)
        x = h * inverse
        dweight += dout * x
        dx = dout * weight
        dh = (dx - x * (tl.sum(dx * x) / SIZE)) * inverse
        tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=exists)
        token += tl.num_programs(0)
    tl.store(dweight_ptr + (tl.program_id(0) * GROUPS + group) * SIZE + channel, dweight, mask=exists)
