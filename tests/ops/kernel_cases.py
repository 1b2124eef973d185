"""Which streams the kernels are tested with; every pair, segment size, number of tokens, switch and dtype appears.

T = 7, 33 and 129 are multiples of no tile. E = 96 is no power of two. A GPU computes all of a product; Triton's
interpreter needs a second for what a GPU does in microseconds, and computes a selection with every two values that meet
in the product.
"""

from itertools import product
from typing import NamedTuple

import torch
from ops.pairwise import cover, pairs_of

PAIRS = [(1, 1), (1, 4), (1, 8), (2, 3), (2, 4), (4, 4), (4, 16), (4, 32), (8, 64)]
# Of every family of kernels: segments that are no power of two, and as many as their tiles have.
_PADDED = [(3, 5), (3, 12), (3, 40)]
FAMILIES = [(2, 3), (4, 16), (3, 40)]
SWITCHES = {
    "tanh, full": {},
    "sigmoid, full": {"gate": "sigmoid"},
    "tanh, identity": {"carry": "identity"},
    "sigmoid, identity": {"gate": "sigmoid", "carry": "identity"},
    "static, full": {"dynamic": False},
    "static, identity": {"dynamic": False, "carry": "identity"},
}
# Dtype, tokens, E, and gate and carry. T = 0 stands for 7 where a program has several tokens (8 < n <= 32), else for 1.
_OF_EVERY_PAIR = [
    (torch.float32, 0, 96, "sigmoid, full"),
    (torch.float32, 0, 32, "tanh, identity"),
    (torch.float32, 1, 256, "sigmoid, identity"),
    (torch.float32, 0, 96, "static, full"),
    (torch.float32, 1, 32, "static, identity"),
    (torch.bfloat16, 7, 96, "tanh, full"),
    (torch.float16, 0, 96, "tanh, full"),
]
_OF_PADDED = [(torch.float32, 0, 96, "tanh, full"), (torch.bfloat16, 1, 32, "sigmoid, identity")]
_LARGER = {
    (torch.float32, 129, 32, "tanh, full"): [(4, 16)],
    (torch.float32, 1, 1024, "tanh, full"): [(1, 4), (8, 64)],
    (torch.bfloat16, 1, 1024, "tanh, full"): [(2, 3), (4, 32)],
    (torch.float32, 7, 96, "tanh, full"): [(2, 3), (4, 16)],
}


class Case(NamedTuple):
    """One stream."""

    m: int
    n: int
    dtype: torch.dtype
    tokens: int
    segment: int
    switches: str

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"({self.m},{self.n}) E={self.segment} T={self.tokens} {dtype}, {self.switches}"

    @property
    def values(self) -> tuple:
        """What pairs are made of; a static connection has no gate, so that "static" stands among gates."""
        return (self.m, self.n), *self.switches.split(", "), self.dtype, self.tokens, self.segment


def _selection(cases: list[Case]) -> list[Case]:
    """Every pair of values of these cases, in fewer ones. Streams and sizes meet only as they do there, because of the
    time that larger ones need; gates, carries and dtypes meet all of them."""
    streams = dict.fromkeys(((case.m, case.n), case.tokens, case.segment) for case in cases)
    dtypes = dict.fromkeys(case.dtype for case in cases)
    rows = [
        (pair, *switches.split(", "), dtype, tokens, segment)
        for (pair, tokens, segment), switches, dtype in product(streams, SWITCHES, dtypes)
    ]
    chosen = cover(rows, pairs_of(case.values for case in cases), _cost)
    chosen = [
        Case(*pair, dtype, tokens, segment, f"{gate}, {carry}") for pair, gate, carry, dtype, tokens, segment in chosen
    ]
    # Those that differ in their dtype alone follow each other.
    return sorted(chosen, key=lambda case: (case._replace(dtype=""), str(case.dtype)))


def _cost(row: tuple) -> float:
    """The number of cases is what counts; of rows with as many new pairs, those with less to compute."""
    (_, n), _, _, _, tokens, _ = row
    # Seconds: a small n is vectors of one token, a larger one a few products of several tokens.
    return 1 + (0.2 * n * tokens if n <= 8 else 0.02 * n)


def _case(pair: tuple[int, int], dtype: torch.dtype, tokens: int, segment: int, switches: str) -> Case:
    several = 7 if 8 < pair[1] <= 32 else 1
    return Case(*pair, dtype, tokens or several, segment, switches)


PRODUCT = [_case(pair, *size) for pair in PAIRS for size in _OF_EVERY_PAIR]
PRODUCT += [_case(pair, *size) for pair in _PADDED for size in _OF_PADDED]
PRODUCT += [Case(*pair, *size) for size, pairs in _LARGER.items() for pair in pairs]
CASES = _selection(PRODUCT)
TRAFFIC_PAIRS = [(1, 1), (1, 4), (2, 3), (1, 8), (4, 16), (4, 32), (8, 64)]
# What needs more tokens than an interpreter can.
GPU_CASES = PRODUCT + [
    Case(m, n, dtype, tokens, segment, "tanh, full")
    for m, n in PAIRS
    for dtype, tokens, segment in ((torch.float32, 129, 32), (torch.bfloat16, 129, 1024), (torch.bfloat16, 4096, 256))
]

# fp32: rounding of sums over E. Half precisions: inputs and outputs carry one rounding (2^-9 and 2^-12), and so do the
# deviations and (g o W) as factors of a product.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
