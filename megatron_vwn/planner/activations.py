"""Bytes that one micro-batch keeps for the backward pass, by sublayer: what autograd saves, counted by hand.

Two kinds of layers. ``fused`` are Transformer Engine's with FlashAttention and our kernels, as on a GPU: the formulas
of "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198) for grouped queries, gated MLPs
and experts. ``local`` are Megatron's of plain torch, as on a CPU: norms keep two fp32 copies, attention its
probabilities. Connections keep the same in both. Tests measure the local ones; nobody has measured the fused ones,
which differ by the terms marked below.

Per token, bf16, D hidden, q and k the channels of all query and key heads, F of an MLP; T all tokens of a
tensor-parallel group, t those that one rank holds between sublayers (T / TP under sequence parallelism):

    norm        fused 2D + 4: X and 1/rms           local 8D + 4                                         of t
    its output  2D, the input of the products                                                            of t
    attention   normed q and k: 2(q + 2k) + 4 per head for the heads before, 2(q + k) for those after rotation (local:
                8(q + k), and rotated 2 * 3q with keys and values repeated per query head), output 2q, and
                fused 4 per head (log of sums) / local 2 * heads * sequence (probabilities)              of T / TP
    MLP         2 * 2F before the gate, 2F after it (ungated 2F + 2F)                                    of T / TP
    MoE         shared expert as an MLP, of T / TP; router and k copies of each token, see ``_moe``       of t
"""

import math

from megatron_vwn.ops.costs import gate_bytes
from megatron_vwn.planner.shape import Shape


def sublayer_bytes(symbol: str, shape: Shape, backend: str) -> float:
    """Of one sublayer without its connection, with selective recompute if the shape has it."""
    recomputed = set(shape.modules) if shape.granularity == "selective" else set()
    norm = _norm(shape.hidden, backend) * shape.own_tokens
    normed = 2 * shape.hidden * shape.own_tokens
    if symbol == "*":
        inside = _attention(shape, backend, "core_attn" in recomputed)
    elif symbol == "-":
        inside = 0 if "mlp" in recomputed else mlp_bytes(shape, shape.ffn) * shape.tokens / shape.tensor
    else:
        inside = 0 if "moe" in recomputed else _moe(shape, recomputed)
    # Transformer Engine has the norms of attention and MLP in one module with the products: not recomputed.
    return norm + inside + (0 if "layernorm" in recomputed and symbol == "E" else normed)


def _norm(channels: int, backend: str, groups: int = 1) -> int:
    return (8 if backend == "local" else 2) * channels + 4 * groups


def _attention(shape: Shape, backend: str, core_recomputed: bool) -> float:
    q, k = shape.heads * shape.head_channels, shape.groups * shape.head_channels
    heads = shape.heads + shape.groups
    if backend == "local":
        scores = 0 if core_recomputed else 2 * shape.heads * shape.sequence // shape.context
        before = 8 * (q + k) + 4 * heads if shape.qk_norm else 0
        rotation = 8 * shape.head_channels * shape.sequence // shape.context
        return (before + 6 * q + scores + 2 * q) * shape.tokens / shape.tensor + rotation
    before = 2 * (q + k) + 4 * heads if shape.qk_norm else 0
    return (before + 2 * (q + 2 * k) + 2 * q + 4 * shape.heads) * shape.tokens / shape.tensor


def mlp_bytes(shape: Shape, ffn: int) -> int:
    """Of one token between the two products of an MLP: before the activation function and after it."""
    return (6 if shape.gated else 4) * ffn


def _moe(shape: Shape, recomputed: set[str]) -> float:
    """Router, per token: logits and scores in fp32 for two losses, 4E + 4E + 4, the choice of k as numbers (8k thrice)
    and weights (4k twice), and the order in which tokens go to experts, 8E. Each of a token's k copies: 2D, the
    expert's MLP, a weight of 4; the fullest rank has more copies than its own tokens have."""
    experts, k = shape.experts, shape.top_k
    router = 16 * experts + 4 + 32 * k
    act = 2 * shape.expert_ffn if "moe_act" in recomputed else 0
    copies = shape.imbalance * k * (2 * shape.hidden + mlp_bytes(shape, shape.expert_ffn) - act + 4)
    shared = 0 if "shared_experts" in recomputed else mlp_bytes(shape, shape.shared_ffn) * shape.tokens / shape.tensor
    # Without overlap it is gathered again in the backward pass.
    gathered = 2 * shape.hidden * shape.tokens if shape.overlaps_shared and shape.tensor > 1 else 0
    return (router + copies) * shape.own_tokens + shared + gathered


def connection_bytes(shape: Shape, backend: str, connections: int) -> float:
    """The stream that this many connections in a row keep, with the blocks of stream recompute if the shape has them.

    ``ops.costs.kept_stream_bytes``: H, gates and Y of each connection; in blocks of k, H and gates of each block and Y
    of each sublayer. Then a fused norm no longer keeps X, but that of each later block; local norms never did. The
    width partition divides H and Y among the ranks, keeps all X, and gates whole, which took communication.
    """
    if shape.width is None or not connections:
        return 0
    width, tokens, by_width = shape.width, shape.own_tokens, shape.partition == "width"
    share = shape.stream_channels / width.over_width
    blocks = connections if shape.block is None else math.ceil(connections / shape.block)
    kept = 2 * share * (blocks * width.over_width + connections * width.hidden_size)
    kept += gate_bytes(width) * (connections if by_width else blocks)
    if shape.block is not None and backend == "fused" and not by_width:
        kept -= 2 * (connections - blocks + 1) * width.hidden_size
    return tokens * kept


def rebuilding_bytes(shape: Shape, connections: int) -> float:
    """What the backward pass of one block rebuilds: k - 1 states, their gates and X with them."""
    if shape.width is None or shape.block is None or not connections:
        return 0
    others = min(shape.block, connections) - 1
    if shape.partition == "width":
        return 2 * shape.own_tokens * others * shape.stream_channels
    each = 2 * (shape.stream_channels + shape.hidden) + gate_bytes(shape.width)
    return shape.own_tokens * others * each


def edge_bytes(shape: Shape, backend: str, *, first: bool, last: bool) -> dict[str, float]:
    """What the ends of the model keep beside their sublayers.

    Returns:
        "embedding", "end" (reduction and final norm), "predictions" (fusions, reductions and norms of further
        predictions, without their sublayers) and "head" (inputs and losses of all heads).
    """
    own, wide = shape.own_tokens, shape.width is not None
    projected = wide and shape.virtual_width.embedding == "projected"
    look_up = 8 * shape.tokens + 2 * shape.hidden * own * projected
    depths = len(shape.predictions) if last else 0
    end = (_norm(shape.hidden, backend) + (_reduction(shape, backend) if wide else 0)) * own
    if wide:
        fusion = 2 * _group_norm(shape, backend) + 4 * shape.stream_channels
    else:
        fusion = 2 * _norm(shape.hidden, backend) + 4 * shape.hidden
    # Megatron's full recompute of a prediction's layer takes its fusion in, and the ordinary layer's last norm.
    again = shape.granularity == "full" and shape.method == "uniform"
    prediction = look_up + (0 if again else fusion * own) + (0 if again and not wide else end)
    return {
        "embedding": look_up if first else 0,
        "end": end if last else 0,
        "predictions": depths * prediction,
        "head": (1 + depths) * (2 * shape.hidden * own + _loss(shape) * shape.tokens) if last else 0,
    }


def _reduction(shape: Shape, backend: str) -> float:
    """The group norm, and its output, which W_reduce multiplies; without a norm H itself."""
    return 2 * shape.stream_channels + (_group_norm(shape, backend) if shape.virtual_width.reduce_norm else 0)


def _group_norm(shape: Shape, backend: str) -> int:
    """Of this rank's channels; the width partition sums what each rank has of a group."""
    groups = shape.over_width // shape.hidden if shape.over_width % shape.hidden == 0 else 1
    return _norm(shape.stream_channels, backend, groups * (2 if shape.partition == "width" else 1))


def _loss(shape: Shape) -> float:
    """Per token: probabilities in fp32 (with a fused loss logits, whose gradient takes their place) and the target."""
    return (2 if shape.fused_loss else 4) * shape.vocabulary / shape.tensor + 9
