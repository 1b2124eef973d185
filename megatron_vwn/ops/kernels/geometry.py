"""The compile-time geometry of a kernel: the stream, and a tile small enough for registers.

``vwn-benchmark kernels --compile-only sm_90`` shows what the choices below need.
"""

from dataclasses import dataclass

import torch

# The largest n whose [n, n] matrices of one token fit in registers beside the tiles.
MAX_SEGMENTS = 64
# The largest n whose write_read can normalise X, too: at n = 64 its backward kernel spills registers.
MAX_NORMED_SEGMENTS = 32
# Rows that fill a warp's tensor-core instruction twice; fewer would leave warps idle.
_MIN_ROWS = 32
_MIN_DOT = 16


@dataclass(frozen=True)
class Geometry:
    """A kernel's constants; one object, so that kernels and their helpers agree. Suffixes as in ``ops.kernels.device``.

    Attributes:
        m, n: of the stream.
        carry: columns of the carry, n or 0 for the identity.
        segment_size: E.
        dynamic: whether coefficients depend on the token.
        sigmoid: whether the gate is the sigmoid, not tanh.
        normed: whether the sublayer's input is normalised.
        tokens: tokens of a tile.
        padded_n, padded_m: n and m, rounded up to a power of two.
        rows: R = tokens * padded_n.
        backbone_rows: S = tokens * padded_m, at least 16.
        channels: B, channels of a chunk.
        warps: warps of a program.
        stages: depth of the software pipeline of a walk over E.
    """

    m: int
    n: int
    carry: int
    segment_size: int
    dynamic: bool
    sigmoid: bool
    normed: bool
    tokens: int
    padded_n: int
    padded_m: int
    rows: int
    backbone_rows: int
    channels: int
    warps: int
    stages: int

    @classmethod
    def of(
        cls, *, m: int, n: int, carry: int, segment_size: int, dynamic: bool, sigmoid: bool, dtype: torch.dtype,
        kernel: str, normed: bool = False,
    ) -> "Geometry":  # fmt: skip
        """The geometry of one kernel, "read_forward" or another, for a stream of some dtype."""
        padded_n, padded_m = _power_of_two(n), _power_of_two(m)
        rows = max(padded_n, _MIN_ROWS)
        wide = rows >= MAX_SEGMENTS
        # Compiled for sm_90 in bf16, (m, n) from (2, 3) to (8, 64), D = 2048 and 4096: with these nothing is spilled. A
        # pipeline needs registers for the offsets of chunks ahead: write_backward has two stages and, because it spills
        # with them where the gate is the sigmoid, one there. write_read_backward, with the most matrices, spills with
        # two, and with chunks of 64 channels where n = 32 or the gate is the sigmoid; write_read_forward with 128.
        # Normalising X needs registers, too: read_forward has chunks of 64 channels then, read_backward two stages, and
        # write_read_backward chunks of 16 where (4, 16) at D = 4096 would spill three words.
        channels = 128 if kernel in ("read_forward", "write_forward") and not wide and not normed else 64
        stages = 3
        if kernel == "write_backward":
            stages = 1 if sigmoid else 2
        elif kernel == "read_backward" and normed:
            stages = 2
        elif kernel == "write_read_backward":
            channels, stages = 16 if normed and padded_m > 2 and segment_size > 512 else 32, 1
        if dtype == torch.float32:
            channels //= 2
        tokens = rows // padded_n
        return cls(
            m=m,
            n=n,
            carry=carry,
            segment_size=segment_size,
            dynamic=dynamic,
            sigmoid=sigmoid,
            normed=normed,
            tokens=tokens,
            padded_n=padded_n,
            padded_m=padded_m,
            rows=rows,
            backbone_rows=max(tokens * padded_m, _MIN_DOT),
            channels=max(_MIN_DOT, min(channels, _power_of_two(segment_size))),
            warps=8 if wide else 4,
            stages=stages,
        )

    @property
    def scratch(self) -> int:
        """fp32 elements of scratch memory that a program of ``write_read_backward`` needs."""
        r, s = self.rows, self.backbone_rows
        return 2 * r * r + 3 * r * s + s * s + (2 * r * r + 3 * r * s if self.normed else 0)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
