"""What is compared at the level of single operations: the same mathematics, written several ways.

A ``Variant`` knows how to draw its inputs, how to compute its outputs and what fp64 says they should be. Its first
leaves are per token (first axis T), the others are parameters.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_vwn.ops import ConnectionParameters, InputNorm, eager, reference, why_not_kernels
from megatron_vwn.ops.costs import Op, Width

# Coefficients that are far from their initial pattern, logits of unit size: what a trained stream looks like.
_STD = 0.1
_EPS = 1e-6
# As large as the mean square of X: with less, the gradient along X nearly vanishes and its rounding would be compared.
_INPUT_NORM_EPS = 1.0


@dataclass(frozen=True)
class Problem:
    """One operation at one size.

    Attributes:
        op: which operation; "connection" is a read and a write that share H.
        width: the stream.
        tokens: T.
        dtype: of the stream; parameters have it too.
        device: torch's.
    """

    op: Op
    width: Width
    tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> dict:
        """What identifies the problem in a table and in JSON."""
        width = self.width
        return {
            "op": self.op,
            "m": width.m,
            "n": width.n,
            "hidden_size": width.hidden_size,
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class Variant(ABC):
    """One way to compute a problem.

    Attributes:
        name: in tables.
        remark: what it computes beyond or less than the others; "" if the same.
    """

    name: str
    remark: str = ""
    per_token: tuple[str, ...] = ("h", "y")

    def missing(self, problem: Problem) -> str | None:
        """Why this variant cannot run here, or None."""
        return None

    @abstractmethod
    def leaves(self, problem: Problem, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Inputs and parameters, drawn in fp32, rounded to the problem's dtype, that require gradients."""

    @abstractmethod
    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What is timed."""

    @abstractmethod
    def expected(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The same outputs from fp64 leaves, token by token independent."""


class VirtualWidth(Variant):
    """A variant of this package's operations.

    Attributes:
        read: H -> X and H to go on with, whose gradient joins that of X.
        write: H, Y -> H'.
    """

    @abstractmethod
    def read(self, h_TNE: Tensor, p: ConnectionParameters, norm: InputNorm | None = None) -> tuple[Tensor, Tensor]:
        """X [T, D], or its norm, and H for whoever needs it next."""

    @abstractmethod
    def write(self, h_TNE: Tensor, y_TD: Tensor, p: ConnectionParameters) -> Tensor:
        """H' [T, N, E]."""

    def write_read(
        self,
        h_TNE: Tensor,
        y_TD: Tensor,
        p: ConnectionParameters,
        q: ConnectionParameters,
        norm: InputNorm | None = None,
    ) -> tuple[Tensor, Tensor]:
        """H' [T, N, E], with which the next connection goes on, and its X [T, D], or X's norm."""
        x_TD, h_TNE = self.read(self.write(h_TNE, y_TD, p), q, norm)
        return h_TNE, x_TD

    @abstractmethod
    def group_norm(self, h_TNE: Tensor, weight_NE: Tensor, width: Width) -> Tensor:
        """Normed H [T, N, E]."""

    def leaves(self, problem: Problem, generator: torch.Generator | None) -> dict[str, Tensor]:
        """See ``Variant``; Y and the second connection only where the operation has them."""
        width = problem.width

        def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            values = mean + std * torch.randn(*shape, generator=generator, device=problem.device)
            return values.to(problem.dtype).requires_grad_()

        leaves = {"h": draw(problem.tokens, width.n, width.segment)}
        if problem.op == "reduce_norm":
            return leaves | {"group_weight": draw(width.n, width.segment, std=_STD, mean=1.0)}
        if not problem.op.startswith("read"):
            leaves["y"] = draw(problem.tokens, width.hidden_size)
        if problem.op.endswith("normed"):
            leaves["input_norm"] = draw(width.hidden_size, std=_STD, mean=1.0)
        for prefix in ("", "next_") if problem.op.startswith("write_read") else ("",):
            leaves |= {
                f"{prefix}routing": draw(width.n, width.num_coefficients, std=_STD),
                f"{prefix}scale": draw(width.n, width.num_coefficients, std=_STD),
                f"{prefix}weight": draw(width.segment, width.num_coefficients),
                f"{prefix}norm": draw(width.segment, std=_STD, mean=1.0),
            }
        return leaves

    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """See ``Variant``."""
        return _run(self, problem, leaves)

    def expected(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """By ``ops.reference``."""
        return _run(Reference(), problem, leaves)


def _run(functions: VirtualWidth, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    h_TNE = leaves["h"]
    if problem.op == "reduce_norm":
        return (functions.group_norm(h_TNE, leaves["group_weight"], problem.width),)
    p = _parameters(problem.width, leaves, "")
    norm = InputNorm(leaves["input_norm"], _INPUT_NORM_EPS) if problem.op.endswith("normed") else None
    if problem.op.startswith("read"):
        return functions.read(h_TNE, p, norm)
    if problem.op == "write":
        return (functions.write(h_TNE, leaves["y"], p),)
    if problem.op == "connection":
        x_TD, h_TNE = functions.read(h_TNE, p)
        return x_TD, functions.write(h_TNE, leaves["y"], p)
    return functions.write_read(h_TNE, leaves["y"], p, _parameters(problem.width, leaves, "next_"), norm)


def _parameters(width: Width, leaves: dict[str, Tensor], prefix: str) -> ConnectionParameters:
    names = ("routing", "scale", "weight", "norm")
    return ConnectionParameters(width.m, width.n, "tanh", _EPS, *(leaves[f"{prefix}{name}"] for name in names))


class Reference(VirtualWidth):
    """The equations as they are written."""

    name = "reference"

    def read(self, h_TNE, p, norm=None):
        """See ``VirtualWidth``."""
        return reference.read(h_TNE, p, norm), h_TNE

    def write(self, h_TNE, y_TD, p):
        """See ``VirtualWidth``."""
        return reference.write(h_TNE, y_TD, p)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        return reference.group_norm(h_TNE, weight_NE, None, width.m, _EPS)


class Composed(VirtualWidth):
    """Ordinary torch operations: what runs where there is no kernel."""

    name = "torch"

    def read(self, h_TNE, p, norm=None):
        """See ``VirtualWidth``."""
        return eager.read(h_TNE, p, norm), h_TNE

    def write(self, h_TNE, y_TD, p):
        """See ``VirtualWidth``."""
        return eager.write(h_TNE, y_TD, p)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        normed = eager.group_norm(h_TNE, weight_NE, None, m=width.m, eps=_EPS, segment_size=width.segment)
        return normed.to(h_TNE.dtype)


class Compiled(VirtualWidth):
    """``torch.compile`` of the reference; read, write and their sequence are compiled as a whole."""

    name = "torch.compile"

    def missing(self, problem: Problem) -> str | None:
        """See ``Variant``."""
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            return "TORCH_COMPILE_DISABLE=1 turns it off"
        if problem.device.type != "cuda":
            # torch 2.11, (m, n) = (2, 3), D = 256, 130 tokens, bf16: a segmentation fault in its C++.
            return "compared on a GPU only: compiled for a CPU, the backward pass of write_read can crash"
        return None

    @cached_property
    def _read(self):
        return torch.compile(reference.read, dynamic=False)

    @cached_property
    def _write(self):
        return torch.compile(reference.write, dynamic=False)

    @cached_property
    def _write_read(self):
        def write_read(h_TNE, y_TD, p, q, norm):
            h_TNE = reference.write(h_TNE, y_TD, p)
            return h_TNE, reference.read(h_TNE, q, norm)

        return torch.compile(write_read, dynamic=False)

    @cached_property
    def _group_norm(self):
        def group_norm(h_TNE, weight_NE, m):
            normed = reference.group_norm(h_TNE.float(), weight_NE.float(), None, m, _EPS)
            return normed.to(h_TNE.dtype)

        return torch.compile(group_norm, dynamic=False)

    def read(self, h_TNE, p, norm=None):
        """See ``VirtualWidth``."""
        return self._read(h_TNE, p, norm), h_TNE

    def write(self, h_TNE, y_TD, p):
        """See ``VirtualWidth``."""
        return self._write(h_TNE, y_TD, p)

    def write_read(self, h_TNE, y_TD, p, q, norm=None):
        """See ``VirtualWidth``."""
        return self._write_read(h_TNE, y_TD, p, q, norm)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        return self._group_norm(h_TNE, weight_NE, width.m)


class Kernels(VirtualWidth):
    """The fused kernels, one by one and at the boundary between two sublayers."""

    name = "triton"

    def missing(self, problem: Problem) -> str | None:
        """See ``Variant``."""
        if find_spec("triton") is None:
            return "triton is not installed"
        if problem.device.type != "cuda":
            return "runs on a GPU only (--compile-only needs none)"
        return why_not_kernels(problem.width.n, doubly_stochastic=False)

    def read(self, h_TNE, p, norm=None):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.read(h_TNE, p, norm), h_TNE

    def write(self, h_TNE, y_TD, p):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.write(h_TNE, y_TD, p)

    def write_read(self, h_TNE, y_TD, p, q, norm=None):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.write_read(h_TNE, y_TD, p, q, norm)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels.group_norm import group_norm

        return group_norm(h_TNE, weight_NE, m=width.m, eps=_EPS)


def grad_outputs(problem: Problem, outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random gradients of the outputs in their dtypes."""
    return [torch.randn(o.shape, generator=generator, device=problem.device).to(o.dtype) for o in outputs]
