"""What a connection costs: memory traffic, FLOPs and kept bytes per token, as exact whole numbers.

Nothing here is measured and nothing imports torch: these are the floors that kernels are compared with, and what the
planner adds up. Symbols are those of ``ops.parameters``; a stream is counted in segments of E = D/m channels, so that a
fractional r = n/m stays exact.

Two kinds of figures must not be confused. The paper prints FLOPs and bytes of its own implementation
(``paper_flops``, ``paper_kept_bytes``). The floors are ours: the least that any implementation moves and multiplies
which reads each tensor once and writes each result once. Parameters are left out of the traffic: they are read once per
program, not once per token; and so are gates, which are no state but how we compute (``gate_bytes``).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Op = Literal["read", "write", "connection", "write_read", "reduce_norm"]
Pass = Literal["forward", "backward"]

OPS: tuple[Op, ...] = get_args(Op)
PASSES: tuple[Pass, ...] = get_args(Pass)

# A layer in the sense of the paper: attention and an MLP (or experts), each with a connection of its own.
CONNECTIONS_PER_LAYER = 2


@dataclass(frozen=True)
class Width:
    """The stream that is costed.

    Args:
        m: segments of one backbone vector.
        n: segments of the over-width state, n >= m.
        hidden_size: D, a multiple of m.
        dynamic: whether coefficients depend on the token (DGHC); static ones need no logits.
        mixes: whether the carry mixes segments; False is the identity carry.

    Raises:
        ValueError: no stream has these numbers.
    """

    m: int
    n: int
    hidden_size: int
    dynamic: bool = True
    mixes: bool = True

    def __post_init__(self) -> None:
        if self.m < 1 or self.n < self.m or self.hidden_size < 1 or self.hidden_size % self.m:
            raise ValueError(
                f"m = {self.m}, n = {self.n}, hidden size {self.hidden_size}: n must be at least m, and m must divide "
                "the hidden size."
            )

    @classmethod
    def of(cls, virtual_width, hidden_size: int) -> "Width":
        """The stream of a ``VirtualWidthConfig``, whose module ``ops`` does not import."""
        mixes = virtual_width.num_carry > 0
        return cls(virtual_width.m, virtual_width.n, hidden_size, dynamic=virtual_width.dynamic, mixes=mixes)

    @property
    def segment(self) -> int:
        """E = D/m in channels."""
        return self.hidden_size // self.m

    @property
    def over_width(self) -> int:
        """D' = rD = nE in channels."""
        return self.n * self.segment

    @property
    def expansion(self) -> float:
        """r = n/m; for display, nothing is computed from it."""
        return self.n / self.m

    @property
    def num_carry(self) -> int:
        """Carry coefficients of a segment: n, or 0 for the identity carry."""
        return self.n if self.mixes else 0

    @property
    def num_coefficients(self) -> int:
        """K = m read + (n or 0) carry + m write coefficients of a segment."""
        return 2 * self.m + self.num_carry


def elements(op: Op, direction: Pass, width: Width) -> int:
    """The floor of the traffic: elements of the stream's dtype read plus written, per token and connection.

    =============  ================================  ==============================================================
    op             forward                           backward
    =============  ================================  ==============================================================
    read           (r+1)D: H -> X                    (3r+1)D: H, dX, incoming dH -> dH
    write          (2r+1)D: H, Y -> H'               (3r+2)D: H, Y, dH' -> dH, dY
    connection     (3r+2)D: read, then write         (6r+3)D
    write_read     (2r+2)D: H, Y -> H', next X       (3r+3)D: H, Y, next dX, dH' -> dH, dY (H' is rebuilt on chip)
    reduce_norm    2rD: H -> normed H                3rD: H, d normed H -> dH
    =============  ================================  ==============================================================

    ``read`` adds its part to the incoming dH; were autograd to add two tensors, it would cost (5r+1)D. ``write_read``
    is the boundary between two sublayers in one kernel, and as many of them as sublayers make a whole stack.
    ``reduce_norm`` is the group norm before the head alone: W_reduce is an ordinary matrix product after it.
    """
    in_segments = {
        ("read", "forward"): (1, 1),
        ("read", "backward"): (3, 1),
        ("write", "forward"): (2, 1),
        ("write", "backward"): (3, 2),
        ("connection", "forward"): (3, 2),
        ("connection", "backward"): (6, 3),
        ("write_read", "forward"): (2, 2),
        ("write_read", "backward"): (3, 3),
        ("reduce_norm", "forward"): (2, 0),
        ("reduce_norm", "backward"): (3, 0),
    }
    times_n, times_m = in_segments[op, direction]
    return (times_n * width.n + times_m * width.m) * width.segment


def matrix_flops(op: Op, direction: Pass, width: Width) -> int:
    """FLOPs of the matrix products, per token and connection; 2 for a multiply-add.

    Forward of a connection, f = 2(2m+n)rD (logits) + 2mrD + 2nrD (A^T H) + 2nD (B^T Y): ``read`` makes the logits of
    all columns and has A_read, ``write`` has A_carry and B. Backward has two products for each one of the forward, 2f.
    Norms, gates and sums run on other units: not counted.
    """
    if op == "reduce_norm":
        return 0
    if op in ("connection", "write_read"):
        return matrix_flops("read", direction, width) + matrix_flops("write", direction, width)
    if op == "read":
        logits = 2 * width.num_coefficients * width.over_width if width.dynamic else 0
        forward = logits + 2 * width.m * width.over_width
    else:
        forward = 2 * width.num_carry * width.over_width + 2 * width.n * width.hidden_size
    return forward if direction == "forward" else 2 * forward


def end_flops(width: Width) -> int:
    """FLOPs of W_reduce per token, forward, 2DD'; W_expand of a projected embedding has as many."""
    return 2 * width.hidden_size * width.over_width


def fusion_flops(width: Width) -> int:
    """FLOPs per token, forward, of a further prediction's fusion, [embedding, state] to state by segment: 4nE^2."""
    return 4 * width.n * width.segment**2


def floor_seconds(
    op: Op,
    direction: Pass,
    width: Width,
    tokens: int,
    *,
    bandwidth: float,
    flop_rate: float,
    element_bytes: int = 2,
) -> float:
    """The least time of one call: its traffic or its matrix products, whichever takes longer.

    Args:
        op: which kernel.
        direction: which pass.
        width: the stream.
        tokens: T.
        bandwidth: bytes per second, reads and writes together, as a copy is counted.
        flop_rate: FLOPs per second of the unit that multiplies.
        element_bytes: of the stream's dtype.
    """
    traffic = elements(op, direction, width) * element_bytes * tokens / bandwidth
    return max(traffic, matrix_flops(op, direction, width) * tokens / flop_rate)


def layer_floor_seconds(
    width: Width,
    tokens: int,
    *,
    bandwidth: float,
    flop_rate: float = math.inf,
    element_bytes: int = 2,
    connections: int = CONNECTIONS_PER_LAYER,
) -> float:
    """The least time that the connections of a layer add to a step, forward and backward, fused as ``write_read``.

    In bf16 and where traffic decides: 2 * 2 (5r+5)D bytes per token over the bandwidth. What the baseline's own
    residual and norm would move is not subtracted.
    """
    rates = {"bandwidth": bandwidth, "flop_rate": flop_rate, "element_bytes": element_bytes}
    return connections * sum(floor_seconds("write_read", direction, width, tokens, **rates) for direction in PASSES)


def layer_overhead_floor(
    width: Width,
    active_parameters: float,
    *,
    bandwidth: float,
    baseline_flop_rate: float,
    flop_rate: float = math.inf,
    element_bytes: int = 2,
    connections: int = CONNECTIONS_PER_LAYER,
) -> float:
    """``layer_floor_seconds`` as a share of the baseline's layer, 6 FLOPs per active parameter and token.

    Args:
        width: the stream.
        active_parameters: of one layer, those that one token uses.
        bandwidth: bytes per second.
        baseline_flop_rate: FLOPs per second that the baseline achieves.
        flop_rate: FLOPs per second of the unit that multiplies the connection's matrices.
        element_bytes: of the stream's dtype.
        connections: sublayers of the layer.

    Returns:
        A ratio: 0.05 is five per cent more time.
    """
    added = layer_floor_seconds(
        width,
        1,
        bandwidth=bandwidth,
        flop_rate=flop_rate,
        element_bytes=element_bytes,
        connections=connections,
    )
    return added / (6 * active_parameters / baseline_flop_rate)


def gate_bytes(width: Width, *, element_bytes: int = 2) -> int:
    """Bytes per token of the gates of one state: its logits [n, K] in the stream's dtype and 1/rms [n] in fp32."""
    return width.n * (width.num_coefficients * element_bytes + 4) if width.dynamic else 0


def kept_stream_bytes(
    width: Width,
    connections: int,
    *,
    block: int | None = None,
    rebuild_input: bool = True,
    element_bytes: int = 2,
) -> float:
    """Bytes per token that the backward pass of a stack finds kept because of its virtual width.

    Without recompute each connection keeps H, its gates (of z elements, see ``gate_bytes``) and Y: rD + z + D. In
    blocks of k connections, H and gates are kept once per block and each Y, and while a block runs backward its k
    states with gates and one gradient live besides:

        connections ((rD + z)/k + D for Y - D if X is rebuilt) + rD(k + 1) + zk        elements

    -D because the ordinary model keeps the input of each sublayer's norm, which is X, and which is rebuilt with H.

    Args:
        width: the stream.
        connections: sublayers of the stack (or of a pipeline stage).
        block: k, ``--vwn-recompute-block``; None keeps every state. The last block may be shorter, so that the exact
            count of states is the quotient rounded up.
        rebuild_input: whether X is rebuilt with H, too, rather than kept.
        element_bytes: of the stream's dtype.
    """
    state, vector = _state_bytes(width, element_bytes), element_bytes * width.hidden_size
    if block is None:
        return connections * (state + vector)
    once = once_stream_bytes(width, block, element_bytes=element_bytes)
    outputs = 0 if rebuild_input else connections * vector
    return math.ceil(connections / block) * state + outputs + once


def once_stream_bytes(width: Width, block: int, *, element_bytes: int = 2) -> int:
    """The part of ``kept_stream_bytes`` that lives while one block runs backward, which one micro-batch does at a time:
    the block's k states with their gates and one gradient."""
    _check_block(block)
    return block * _state_bytes(width, element_bytes) + element_bytes * width.over_width


def kept_stream_bytes_of_two_levels(
    width: Width, connections: int, *, outer: int, inner: int, element_bytes: int = 2
) -> float:
    """As ``kept_stream_bytes`` with X rebuilt, where blocks of ``outer * inner`` connections are cut again.

    connections / (outer inner) + outer + inner states with gates; the third root of the number of connections is best
    for both.
    """
    _check_block(outer)
    _check_block(inner)
    return _state_bytes(width, element_bytes) * (math.ceil(connections / (outer * inner)) + outer + inner)


def _state_bytes(width: Width, element_bytes: int) -> int:
    """H of one token with its gates."""
    return element_bytes * width.over_width + gate_bytes(width, element_bytes=element_bytes)


def best_block(connections: int) -> int:
    """The k with the fewest bytes in ``kept_stream_bytes``, close to the square root of the number of connections."""
    return min(range(1, connections + 1), key=lambda k: (math.ceil(connections / k) + k + 1, k))


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"a block of {block} connections cannot be recomputed: give at least 1.")


def paper_flops(width: Width) -> dict[str, int]:
    """The FLOPs that the paper prints, per token and connection, forward.

    norm 4rD, dynamic parameters 2(2m+n)rD, width connection 2(m+n)rD, depth connection 2nD: 42D + 6D at (2,3), 2592D at
    (8,64). Unlike ``matrix_flops`` this counts the norm; the products are the same.
    """
    over = width.over_width
    return {
        "norm": 4 * over if width.dynamic else 0,
        "dynamic": 2 * width.num_coefficients * over if width.dynamic else 0,
        "width": 2 * (width.m + width.num_carry) * over,
        "depth": 2 * width.n * width.hidden_size,
    }


def paper_share_of_dense_layer(width: Width) -> float:
    """``paper_flops`` of two connections over the 24D^2 of a dense layer: 10.5 % at (8,64) and D = 2048."""
    return CONNECTIONS_PER_LAYER * sum(paper_flops(width).values()) / (24 * width.hidden_size**2)


def paper_kept_bytes(width: Width) -> int:
    """Bytes per token and connection that the paper says are kept without recompute: 2 * 2 (r+1)D in bf16."""
    return 4 * (width.over_width + width.hidden_size)


def paper_kept_bytes_with_recompute(width: Width, share_kept: float) -> float:
    """Bytes per token and layer that the paper says are kept with recompute, 4 eta rD.

    At (2,3) and eta = 0.5 this is 3D, 8.8 % of the 34D bytes of an ordinary layer.
    """
    return 4 * share_kept * width.over_width
