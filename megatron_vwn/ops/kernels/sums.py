"""Gradients of A and S from those of all tokens' coefficients: one kernel sums over tokens, one over its programs.

static   dA = sum dc
tanh     dA = sum dc              dS = sum dc tanh(z)
sigmoid  dA = sum dc (1 + g)      dS = sum dc (P + A) (1 - g^2) z / 2        g = tanh(S z / 2), P the pattern
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.device import load_routing, load_scale, tanh
from megatron_vwn.ops.kernels.geometry import Tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.kernels.tables import Prepared

# The same on every GPU, so that all add alike; at most so many elements of a tile.
_PROGRAMS, _ELEMENTS, _COLUMNS = 1056, 2048, 128
_TOTAL_COLUMNS, _TERMS = 32, 32


def routing_gradients(
    dc_TNK: Tensor, z_TNK: Tensor | None, p: Prepared, columns: slice
) -> tuple[Tensor, Tensor | None]:
    """Of A [N, K] and, for a dynamic connection, S [N, K], in the parameters' dtypes and order.

    Args:
        dc_TNK: gradients of the coefficients, in the kernels' order.
        z_TNK: logits; None for a static connection.
        p: the connection.
        columns: the columns, in the kernels' order, that dc has; the other gradients are zero.
    """
    tokens, n, k = dc_TNK.shape
    width = min(_COLUMNS, triton.next_power_of_2(n * k))
    height = _ELEMENTS // width
    blocks, chunks = triton.cdiv(n * k, width), triton.cdiv(tokens, height)
    trips = triton.cdiv(chunks, max(1, _PROGRAMS // blocks))
    splits = triton.cdiv(chunks, max(1, trips))
    sums_P2NK = dc_TNK.new_empty(splits, 2 if p.dynamic else 1, n, k, dtype=torch.float32)
    constants = {"NK": n * k, "K": k, "M": p.m, "DYNAMIC": p.dynamic}
    launch(
        routing_partial, (blocks, splits), Tile(stages=2),
        dc_TNK, z_TNK, p.routing_NK, p.scale_NK, sums_P2NK, tokens, trips,
        **constants, CARRY=p.num_carry, SIGMOID=p.sigmoid, FIRST=columns.start, LAST=columns.stop,
        B=width, TOKENS=height,
    )  # fmt: skip
    drouting_NK = torch.empty_like(p.routing_NK)
    dscale_NK = torch.empty_like(p.scale_NK) if p.dynamic else None
    launch(
        routing_total, triton.cdiv(n * k, _TOTAL_COLUMNS), Tile(), sums_P2NK, drouting_NK, dscale_NK, splits,
        **constants, B=_TOTAL_COLUMNS, TERMS=_TERMS,
    )  # fmt: skip
    return drouting_NK, dscale_NK


@triton.jit(do_not_specialize=["T", "trips"])
def routing_partial(
    dc_ptr, z_ptr, routing_ptr, scale_ptr, sums_ptr, T, trips,
    NK: tl.constexpr, K: tl.constexpr, M: tl.constexpr, DYNAMIC: tl.constexpr,
    CARRY: tl.constexpr, SIGMOID: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    B: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """sums[program] = the terms of some elements of [N, K], over ``trips`` chunks of tokens."""
    element = tl.program_id(0) * B + tl.arange(0, B)
    row, k = element // K, element % K
    exists = (element < NK) & (k >= FIRST) & (k < LAST)
    first = tl.program_id(1).to(tl.int64) * trips * TOKENS
    dc_ptr += first * NK
    routing_sum = tl.zeros((TOKENS, B), tl.float32)
    if DYNAMIC:
        z_ptr += first * NK
        scale_sum = tl.zeros((TOKENS, B), tl.float32)
    if SIGMOID:
        place = row * K + (k + M) % K
        write = k - CARRY
        ones = tl.where(write < 0, k == row, tl.where(write < M, row % M == write, row == write - M))
        factor = load_routing(routing_ptr, place, exists) + tl.where(ones, 1.0, 0.0)
        scale = load_scale(scale_ptr, place, exists)
    for start in tl.range(0, trips * TOKENS, TOKENS):
        token = start + tl.arange(0, TOKENS)
        alive = (first + token < T)[:, None] & exists[None, :]
        offset = token[:, None] * NK + element[None, :]
        dc = tl.load(dc_ptr + offset, mask=alive, other=0.0).to(tl.float32)
        if DYNAMIC:
            z = tl.load(z_ptr + offset, mask=alive, other=0.0).to(tl.float32)
            if SIGMOID:
                gate = tanh(0.5 * scale[None, :] * z)
                routing_sum += dc * (1.0 + gate)
                scale_sum += dc * factor[None, :] * 0.5 * (1.0 - gate * gate) * z
            else:
                routing_sum += dc
                scale_sum += dc * tanh(z)
        else:
            routing_sum += dc
    # A program's [S sums] lie behind its [A sums].
    SUMS: tl.constexpr = 2 if DYNAMIC else 1
    sums_ptr += tl.program_id(1).to(tl.int64) * (SUMS * NK) + element
    tl.store(sums_ptr, tl.sum(routing_sum, axis=0), mask=element < NK)
    if DYNAMIC:
        tl.store(sums_ptr + NK, tl.sum(scale_sum, axis=0), mask=element < NK)


@triton.jit(do_not_specialize=["splits"])
def routing_total(
    sums_ptr, drouting_ptr, dscale_ptr, splits,
    NK: tl.constexpr, K: tl.constexpr, M: tl.constexpr, DYNAMIC: tl.constexpr, B: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The programs' sums added in their order, and put where the parameters have them."""
    SUMS: tl.constexpr = 2 if DYNAMIC else 1
    element = tl.program_id(0) * B + tl.arange(0, B)
    exists = element < NK
    place = element // K * K + (element % K + M) % K
    routing = tl.zeros((B,), tl.float32)
    scale = tl.zeros((B,), tl.float32)
    for start in tl.range(0, splits, TERMS):
        split = (start + tl.arange(0, TERMS))[:, None]
        alive = (split < splits) & exists[None, :]
        terms_ptr = sums_ptr + split * (SUMS * NK) + element[None, :]
        routing += tl.sum(tl.load(terms_ptr, mask=alive, other=0.0), axis=0)
        if DYNAMIC:
            scale += tl.sum(tl.load(terms_ptr + NK, mask=alive, other=0.0), axis=0)
    tl.store(drouting_ptr + place, routing.to(drouting_ptr.dtype.element_ty), mask=exists)
    if DYNAMIC:
        tl.store(dscale_ptr + place, scale.to(dscale_ptr.dtype.element_ty), mask=exists)
