"""What is compared at the level of single operations: the same mathematics, written several ways.

A ``Variant`` knows how to draw its inputs, how to compute its outputs and what fp64 says they should be. A write alone
takes gates that were drawn, not those of its H, so that it is timed without a read.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_vwn.ops import ConnectionParameters, eager, reference, why_not_kernels
from megatron_vwn.ops.costs import Op, Width
from megatron_vwn.ops.parameters import Gates, initial_pattern

# Coefficients that are far from their initial pattern, logits of unit size: what a trained stream looks like.
_STD = 0.1
_EPS = 1e-6


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
        per_token: leaves with a first axis T; the others are parameters.
    """

    name: str
    remark: str = ""
    per_token: tuple[str, ...] = ("h", "y", "logits")

    def missing(self, problem: Problem) -> str | None:
        """Why this variant cannot run here, or None."""
        return None

    @abstractmethod
    def leaves(self, problem: Problem, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Inputs and parameters, drawn in fp32, rounded to the problem's dtype; most require gradients."""

    @abstractmethod
    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What is timed."""

    @abstractmethod
    def expected(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The same outputs from fp64 leaves, token by token independent."""

    def defined(self, problem: Problem, name: str, gradient: Tensor) -> Tensor:
        """The part of a leaf's gradient that this variant writes."""
        return gradient


class VirtualWidth(Variant):
    """A variant of this package's operations.

    Attributes:
        reads_first: whether columns of gates are those of the parameters, [read | carry | write], or [carry | write |
            read].
    """

    reads_first = True

    @abstractmethod
    def read(self, h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Gates]:
        """X [T, D], and the gates for the write."""

    @abstractmethod
    def write(self, h_TNE: Tensor, y_TD: Tensor, gates: Gates, p: ConnectionParameters) -> Tensor:
        """H' [T, N, E]."""

    def write_read(
        self, h_TNE: Tensor, y_TD: Tensor, gates: Gates, p: ConnectionParameters, q: ConnectionParameters
    ) -> tuple[Tensor, Tensor, Gates]:
        """H' [T, N, E], with which the next connection goes on, its X [T, D] and its gates."""
        h_TNE = self.write(h_TNE, y_TD, gates, p)
        return h_TNE, *self.read(h_TNE, q)

    @abstractmethod
    def group_norm(self, h_TNE: Tensor, weight_NE: Tensor, width: Width) -> Tensor:
        """Normed H [T, N, E]."""

    def leaves(self, problem: Problem, generator: torch.Generator | None) -> dict[str, Tensor]:
        """See ``Variant``; Y, gates and the second connection only where the operation has them."""
        width = problem.width

        def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            values = mean + std * torch.randn(*shape, generator=generator, device=problem.device)
            return values.to(problem.dtype).requires_grad_()

        leaves = {"h": draw(problem.tokens, width.n, width.segment)}
        if problem.op == "reduce_norm":
            return leaves | {"group_weight": draw(width.n, width.segment, std=_STD, mean=1.0)}
        if problem.op != "read":
            leaves["y"] = draw(problem.tokens, width.hidden_size)
        if problem.op.startswith("write"):
            leaves["logits"] = draw(problem.tokens, width.n, width.num_coefficients)
        for prefix in ("", "next_") if problem.op == "write_read" else ("",):
            leaves |= {
                f"{prefix}routing": draw(width.n, width.num_coefficients, std=_STD),
                f"{prefix}scale": draw(width.n, width.num_coefficients, std=_STD),
                f"{prefix}weight": draw(width.segment, width.num_coefficients),
                f"{prefix}norm": draw(width.segment, std=_STD, mean=1.0),
            }
        if problem.op.startswith("write"):  # gradients of these are the work of the read that made the gates
            for name in ("routing", "scale", "weight", "norm"):
                leaves[name].requires_grad_(False)
        return leaves

    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """See ``Variant``."""
        return _run(self, problem, leaves)

    def expected(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """By ``ops.reference``."""
        shift = 0 if self.reads_first else problem.width.m
        if "logits" in leaves:
            leaves = leaves | {"logits": leaves["logits"].roll(shift, -1)}
        outputs = _run(Reference(), problem, leaves)
        with_gates = problem.op in ("read", "write_read")
        return (*outputs[:-1], outputs[-1].roll(-shift, -1)) if with_gates else outputs

    def defined(self, problem: Problem, name: str, gradient: Tensor) -> Tensor:
        """See ``Variant``: a write leaves the read's columns alone."""
        if name != "logits":
            return gradient
        m = problem.width.m
        return gradient[..., m:] if self.reads_first else gradient[..., : gradient.shape[-1] - m]


def _run(functions: VirtualWidth, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    h_TNE = leaves["h"]
    if problem.op == "reduce_norm":
        return (functions.group_norm(h_TNE, leaves["group_weight"], problem.width),)
    p = _parameters(problem.width, leaves, "")
    if problem.op in ("read", "connection"):
        x_TD, gates = functions.read(h_TNE, p)
        if problem.op == "connection":
            return x_TD, functions.write(h_TNE, leaves["y"], gates, p)
        # H goes on to the write, whose gradient joins that of X.
        return x_TD, h_TNE, gates.logits_TNK
    gates = Gates(leaves["logits"], None)
    if problem.op == "write":
        return (functions.write(h_TNE, leaves["y"], gates, p),)
    q = _parameters(problem.width, leaves, "next_")
    out_TNE, x_TD, gates = functions.write_read(h_TNE, leaves["y"], gates, p, q)
    return out_TNE, x_TD, gates.logits_TNK


def _parameters(width: Width, leaves: dict[str, Tensor], prefix: str) -> ConnectionParameters:
    names = ("routing", "scale", "weight", "norm")
    return ConnectionParameters(width.m, width.n, "tanh", _EPS, *(leaves[f"{prefix}{name}"] for name in names))


def reference_read(h_TNE: Tensor, p: ConnectionParameters) -> tuple[Tensor, Tensor]:
    """X and logits as the equations have them; the gradient of the logits is that of the coefficients, see ``Gates``,
    and a read makes the part of its own columns itself."""
    c_TNK = reference.coefficients(h_TNE.to(_wide(h_TNE)), p)
    c_TNK = torch.cat([c_TNK[..., : p.m].detach(), c_TNK[..., p.m :]], dim=-1)
    with torch.no_grad():
        normed_TNE = reference.rms_norm(h_TNE.to(c_TNK.dtype), p.norm_E.to(c_TNK.dtype), p.eps)
        z_TNK = normed_TNE @ p.weight_EK.to(c_TNK.dtype) / h_TNE.shape[-1] ** 0.5
    return reference.read(h_TNE, p), (z_TNK + (c_TNK - c_TNK.detach())).to(h_TNE.dtype)


def reference_write(h_TNE: Tensor, y_TD: Tensor, z_TNK: Tensor, p: ConnectionParameters) -> Tensor:
    """H' by logits whose gradient is that of the coefficients."""
    dtype = _wide(h_TNE)
    pattern_NK = initial_pattern(p.m, p.n, p.num_carry, dtype=dtype, device=h_TNE.device)
    z_TNK = z_TNK.to(dtype)
    with torch.no_grad():
        c_TNK = (1 + p.scale_NK.to(dtype)) * torch.tanh(z_TNK) + p.routing_NK.to(dtype) + pattern_NK
    c_TNK = c_TNK + (z_TNK - z_TNK.detach())
    carry_TNN, write_TNM = c_TNK[..., p.m :].split([p.num_carry, p.m], dim=-1)
    y_TME = y_TD.to(dtype).unflatten(-1, (p.m, -1))
    return (carry_TNN.mT @ h_TNE.to(dtype) + write_TNM @ y_TME).to(h_TNE.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class Reference(VirtualWidth):
    """The equations as they are written."""

    name = "reference"

    def read(self, h_TNE, p):
        """See ``VirtualWidth``."""
        x_TD, z_TNK = reference_read(h_TNE, p)
        return x_TD, Gates(z_TNK, None)

    def write(self, h_TNE, y_TD, gates, p):
        """See ``VirtualWidth``."""
        return reference_write(h_TNE, y_TD, gates.logits_TNK, p)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        return reference.group_norm(h_TNE, weight_NE, None, width.m, _EPS)


class Composed(VirtualWidth):
    """Ordinary torch operations: what runs where there is no kernel."""

    name = "torch"

    def read(self, h_TNE, p):
        """See ``VirtualWidth``."""
        return eager.read(h_TNE, p)

    def write(self, h_TNE, y_TD, gates, p):
        """See ``VirtualWidth``."""
        return eager.write(h_TNE, y_TD, gates, p)

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
        return torch.compile(reference_read, dynamic=False)

    @cached_property
    def _write(self):
        return torch.compile(reference_write, dynamic=False)

    @cached_property
    def _write_read(self):
        def write_read(h_TNE, y_TD, z_TNK, p, q):
            h_TNE = reference_write(h_TNE, y_TD, z_TNK, p)
            return h_TNE, *reference_read(h_TNE, q)

        return torch.compile(write_read, dynamic=False)

    @cached_property
    def _group_norm(self):
        def group_norm(h_TNE, weight_NE, m):
            normed = reference.group_norm(h_TNE.float(), weight_NE.float(), None, m, _EPS)
            return normed.to(h_TNE.dtype)

        return torch.compile(group_norm, dynamic=False)

    def read(self, h_TNE, p):
        """See ``VirtualWidth``."""
        x_TD, z_TNK = self._read(h_TNE, p)
        return x_TD, Gates(z_TNK, None)

    def write(self, h_TNE, y_TD, gates, p):
        """See ``VirtualWidth``."""
        return self._write(h_TNE, y_TD, gates.logits_TNK, p)

    def write_read(self, h_TNE, y_TD, gates, p, q):
        """See ``VirtualWidth``."""
        out_TNE, x_TD, z_TNK = self._write_read(h_TNE, y_TD, gates.logits_TNK, p, q)
        return out_TNE, x_TD, Gates(z_TNK, None)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        return self._group_norm(h_TNE, weight_NE, width.m)


class Kernels(VirtualWidth):
    """The fused kernels, one by one and at the boundary between two sublayers."""

    name = "triton"
    reads_first = False

    def missing(self, problem: Problem) -> str | None:
        """See ``Variant``."""
        if problem.device.type != "cuda":
            return "runs on a GPU only (--compile-only and --predict need none)"
        return why_not_kernels(problem.width.n, doubly_stochastic=False)

    def read(self, h_TNE, p):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.read(h_TNE, p)

    def write(self, h_TNE, y_TD, gates, p):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.write(h_TNE, y_TD, gates, p)

    def write_read(self, h_TNE, y_TD, gates, p, q):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels import autograd as connection

        return connection.write_read(h_TNE, y_TD, gates, p, q)

    def group_norm(self, h_TNE, weight_NE, width):
        """See ``VirtualWidth``."""
        from megatron_vwn.ops.kernels.group_norm import group_norm

        return group_norm(h_TNE, weight_NE, m=width.m, eps=_EPS)


def differentiated(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that require gradients."""
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}


def grad_outputs(problem: Problem, outputs: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random gradients of the outputs in their dtypes."""
    return [torch.randn(o.shape, generator=generator, device=problem.device).to(o.dtype) for o in outputs]
