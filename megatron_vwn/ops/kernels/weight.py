"""Gradients of W and of the norm's weight that is folded into it: a thin product over all tokens, in two kernels.

d(norm o W)^T = sum over tokens and segments of dz^T H'. A program of the first kernel sums some rows (token, segment)
for some channels; the second adds these sums in their order, which the number of tokens and the tile alone decide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vwn.ops.kernels.geometry import tile
from megatron_vwn.ops.kernels.launch import launch
from megatron_vwn.ops.parameters import ConnectionParameters

# Programs of the first kernel: four for each of 132 multiprocessors, but the same on every GPU, so that all add alike.
_PROGRAMS = 528
_MIN_DOT = 16
# Channels of a program of the second kernel (32 bytes of fp32), and sums that it loads at once.
_CHANNELS, _TERMS = 8, 8


def weight_gradients(out_TNE: Tensor, dz_TNK: Tensor, p: ConnectionParameters) -> tuple[Tensor, Tensor]:
    """dW [E, K] and the norm's [E] of the connection p that read H', each in its parameter's dtype.

    Args:
        out_TNE: H'.
        dz_TNK: gradients of H' (norm o W), in the kernels' order of columns.
        p: the connection.
    """
    tokens, n, k = dz_TNK.shape
    e = out_TNE.shape[-1]
    size = tile("weight", n, out_TNE.device).fit(e, out_TNE.dtype)
    columns, chunks = triton.cdiv(e, size.channels), triton.cdiv(tokens * n, size.tokens)
    trips = triton.cdiv(chunks, max(1, _PROGRAMS // columns))
    splits = triton.cdiv(chunks, max(1, trips))
    # A few columns are one product; more are the carry's and the others', which pads less.
    first = p.num_carry if k > _MIN_DOT else 0
    sums_PKE = out_TNE.new_empty(splits, k, e, dtype=torch.float32)
    launch(
        weight_partial, (columns, splits), size, out_TNE, dz_TNK, sums_PKE, tokens * n, trips,
        K=k, E=e, CARRY=first, PADDED_CARRY=max(_MIN_DOT, triton.next_power_of_2(first)),
        REST=max(_MIN_DOT, triton.next_power_of_2(k - first)),
        B=size.channels, ROWS=size.tokens, STAGES=size.stages,
    )  # fmt: skip
    weight_EK = p.weight_EK.contiguous()
    dweight_EK, dnorm_E = torch.empty_like(weight_EK), torch.empty_like(p.norm_E)
    launch(
        weight_total, triton.cdiv(e, _CHANNELS), tile("weight_total", n, out_TNE.device),
        sums_PKE, weight_EK, p.norm_E, dweight_EK, dnorm_E, splits,
        K=k, M=p.m, E=e, PADDED_K=triton.next_power_of_2(k), B=_CHANNELS, TERMS=_TERMS,
    )  # fmt: skip
    return dweight_EK, dnorm_E


@triton.jit(do_not_specialize=["rows", "trips"])
def weight_partial(
    out_ptr, dz_ptr, sums_ptr, rows, trips,
    K: tl.constexpr, E: tl.constexpr, CARRY: tl.constexpr, PADDED_CARRY: tl.constexpr, REST: tl.constexpr,
    B: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sums[program] = dz^T H' over ``trips`` chunks of rows. H', a right factor as it is stored, loads ahead."""
    column = tl.program_id(0) * B + tl.arange(0, B)
    first = tl.program_id(1).to(tl.int64) * trips * ROWS
    out_ptr += first * E
    dz_ptr += first * K
    # Rows behind the last one are none; a program has fewer than 2^31.
    left = tl.minimum(rows - first, trips * ROWS).to(tl.int32)
    k = tl.arange(0, REST)
    rest = tl.zeros((REST, B), tl.float32)
    if CARRY:
        n = tl.arange(0, PADDED_CARRY)
        carry = tl.zeros((PADDED_CARRY, B), tl.float32)
    for start in tl.range(0, trips * ROWS, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None]
        alive = row < left
        inside = alive & (column < E)[None, :] if E % B else alive
        out = tl.load(out_ptr + row * E + column[None, :], mask=inside, other=0.0)
        dz = tl.load(dz_ptr + row * K + CARRY + k[None, :], mask=alive & (CARRY + k < K)[None, :], other=0.0)
        rest = tl.dot(tl.trans(dz), out, rest, input_precision="ieee")
        if CARRY:
            dz = tl.load(dz_ptr + row * K + n[None, :], mask=alive & (n < CARRY)[None, :], other=0.0)
            carry = tl.dot(tl.trans(dz), out, carry, input_precision="ieee")
    sums_ptr += tl.program_id(1).to(tl.int64) * (K * E) + column[None, :]
    there = (column < E)[None, :]
    tl.store(sums_ptr + (CARRY + k)[:, None] * E, rest, mask=(CARRY + k < K)[:, None] & there)
    if CARRY:
        tl.store(sums_ptr + n[:, None] * E, carry, mask=(n < CARRY)[:, None] & there)


@triton.jit(do_not_specialize=["splits"])
def weight_total(
    sums_ptr, weight_ptr, norm_ptr, dweight_ptr, dnorm_ptr, splits,
    K: tl.constexpr, M: tl.constexpr, E: tl.constexpr, PADDED_K: tl.constexpr, B: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """dW[e, k'] = norm[e] s[k, e] and dnorm[e] = sum over k of s[k, e] W[e, k'], k' = (k + m) mod K."""
    e = tl.program_id(0) * B + tl.arange(0, B)
    k = tl.arange(0, PADDED_K)
    exists = (k < K)[:, None] & (e < E)[None, :]
    term = tl.arange(0, TERMS)
    sums_ptr += k[:, None] * E + e[None, :]
    total = tl.zeros((PADDED_K, B), tl.float32)
    # Few programs read much: only with loads ahead are enough bytes on their way.
    for start in tl.range(0, splits, TERMS, num_stages=4):
        split = (start + term)[:, None, None]
        terms = tl.load(sums_ptr[None, :, :] + split * (K * E), mask=exists[None, :, :] & (split < splits), other=0.0)
        total += tl.sum(terms, axis=0)
    place = e[None, :] * K + ((k + M) % K)[:, None]
    norm = tl.load(norm_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(dweight_ptr + place, (total * norm[None, :]).to(dweight_ptr.dtype.element_ty), mask=exists)
    dnorm = tl.sum(total * weight, axis=0)
    tl.store(dnorm_ptr + e, dnorm.to(dnorm_ptr.dtype.element_ty), mask=e < E)
