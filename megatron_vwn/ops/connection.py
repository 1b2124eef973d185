"""The connection as a plain ``torch.nn.Module``, for models without Megatron; public as ``megatron_vwn.Connection``."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_vwn.ops import dispatch
from megatron_vwn.ops.parameters import ConnectionParameters, Gates

Kind = Literal["dynamic", "static"]
Gate = Literal["tanh", "sigmoid"]
Carry = Literal["full", "identity", "doubly-stochastic"]
Kernels = Literal["auto", "triton", "torch"]


class Connection(torch.nn.Module):
    """Replaces the residual connection of one sublayer: Generalized Hyper-Connection (arXiv 2511.11238).

        X  = A_read^T H        H' = B^T T(X) + A_carry^T H

    H is the over-width state, n segments of E = D/m channels in place of the m segments of a backbone vector; T is the
    sublayer with its own norm and without a residual. A and B are learned ("static") or computed for each token from
    RMSNorm(H) as well ("dynamic").

    Parameters are deviations from the paper's initial values: zeros, but for the norm weight, which is ones. A fresh
    connection reads the first m segments and adds the output to every copy, so on a tiled state, whose segment j is
    segment j mod m of a backbone vector, it equals the residual connection x + T(x); a doubly stochastic carry equals
    it nearly, and exactly at m = 1. Names and shapes are those of a Megatron checkpoint and of the Hugging Face model:
    ``routing`` and ``scale`` [n * k], ``weight`` [E, k], ``norm`` [E] with k = 2m + n (2m for the identity carry);
    a static connection has ``routing`` alone. The paper lets ``weight`` decay and nothing else.

    The state may be fp64, fp32, bf16 or fp16, whatever the dtype of the parameters; coefficients and sums are fp32 for
    half precisions, also under autocast. On a GPU the fused Triton kernels compute. ``read`` computes the logits of all
    k coefficients once; they are kept, with H and Y, for ``write`` and for the backward pass.

    Example::

        connection = Connection(m=4, n=16, hidden_size=512)
        hidden_states = torch.randn(2, 128, 2048)                       # [..., n/m * 512]
        hidden_states = connection(hidden_states, torch.nn.Linear(512, 512))

    Args:
        m: fraction rate, the number of segments that a backbone vector is cut into; divides ``hidden_size``.
        n: number of segments of the state, n >= m; the state is n/m times as wide as the backbone.
        hidden_size: backbone width D.
        connection: "dynamic" or "static".
        gate: "tanh": A(H) = S o tanh(logits) + A; "sigmoid": A(H) = A o 2 sigmoid(S o logits).
        carry: "full"; "identity": C = H; "doubly-stochastic": rows and columns of A_carry sum to one.
        eps: added to the mean square inside the RMSNorm of H.
        dtype: of the parameters; torch's default if None.
        device: of the parameters; torch's default if None.
        kernels: "triton" (fused kernels), "torch", or "auto" for the kernels on a GPU wherever they can compute.

    Raises:
        ValueError: for values that no connection can have.
    """

    def __init__(
        self,
        m: int,
        n: int,
        hidden_size: int,
        *,
        connection: Kind = "dynamic",
        gate: Gate = "tanh",
        carry: Carry = "full",
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kernels: Kernels = "auto",
    ):
        super().__init__()
        for name, size in {"m": m, "n": n, "hidden_size": hidden_size}.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}: give a whole number of at least 1.")
        if n < m:
            raise ValueError(
                f"n = {n} is smaller than m = {m}: the state needs at least the m segments of one backbone vector, so "
                f"raise n to {m} or more, or lower m."
            )
        if hidden_size % m != 0:
            raise ValueError(
                f"hidden_size = {hidden_size} is not divisible by m = {m}: the backbone vector is cut into m equal "
                "segments, so choose an m that divides it."
            )
        choices = {"connection": (connection, Kind), "gate": (gate, Gate), "carry": (carry, Carry)}
        for name, (value, kind) in {**choices, "kernels": (kernels, Kernels)}.items():
            if value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(get_args(kind))}.")
        if not eps >= 0:
            raise ValueError(f"eps is {eps!r}: give a number of at least 0, such as 1e-5.")
        if kernels == "triton":
            reason = dispatch.why_not_kernels(n, doubly_stochastic=carry == "doubly-stochastic", eps=eps)
            if reason is not None:
                raise ValueError(f'the fused kernels cannot compute this connection ({reason}): choose kernels="auto".')
        self.m, self.n, self.hidden_size, self.segment_size = m, n, hidden_size, hidden_size // m
        self.kind, self.gate, self.carry, self.eps, self.kernels = connection, gate, carry, eps, kernels
        self.num_coefficients = 2 * m + (0 if carry == "identity" else n)
        options = {"dtype": dtype, "device": device}
        # Flat, because what has one dimension is commonly exempted from weight decay.
        self.routing = torch.nn.Parameter(torch.empty(n * self.num_coefficients, **options))
        if connection == "dynamic":
            self.scale = torch.nn.Parameter(torch.empty(n * self.num_coefficients, **options))
            self.weight = torch.nn.Parameter(torch.empty(self.segment_size, self.num_coefficients, **options))
            self.norm = torch.nn.Parameter(torch.empty(self.segment_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initial values."""
        for name, parameter in self.named_parameters(recurse=False):
            torch.nn.init.constant_(parameter, 1.0 if name == "norm" else 0.0)

    def read(self, hidden_states: Tensor) -> tuple[Tensor, Gates | None]:
        """The sublayer's input X [..., D] from the state [..., n/m * D], in the state's dtype, and what ``write`` wants
        back; None for a static connection."""
        h_TNE = self._segments(hidden_states)
        x_TD, gates = dispatch.read(h_TNE, self._as_tensors())
        return x_TD.reshape(*hidden_states.shape[:-1], self.hidden_size), gates

    def write(self, hidden_states: Tensor, output: Tensor, gates: Gates | None) -> Tensor:
        """The next state [..., n/m * D] from the state that was read, the sublayer's output [..., D] and the gates that
        ``read`` gave, in the state's dtype."""
        h_TNE = self._segments(hidden_states)
        expected = (*hidden_states.shape[:-1], self.hidden_size)
        if output.shape != expected:
            raise ValueError(
                f"the sublayer's output is {list(output.shape)}: make it {list(expected)}, the shape of what was read."
            )
        next_TNE = dispatch.write(h_TNE, output.reshape(-1, self.hidden_size), gates, self._as_tensors())
        return next_TNE.reshape(hidden_states.shape)

    def forward(self, hidden_states: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """Read, the sublayer, write: [..., n/m * D] to the same shape.

        Args:
            hidden_states: the state.
            sublayer: [..., D] to [..., D], with its own norm and without a residual.
        """
        x, gates = self.read(hidden_states)
        return self.write(hidden_states, sublayer(x), gates)

    def extra_repr(self) -> str:
        """The arguments, for print()."""
        return (
            f"m={self.m}, n={self.n}, hidden_size={self.hidden_size}, connection={self.kind!r}, gate={self.gate!r}, "
            f"carry={self.carry!r}, eps={self.eps}, kernels={self.kernels!r}"
        )

    def _segments(self, hidden_states: Tensor) -> Tensor:
        over_width = self.n * self.segment_size
        if hidden_states.shape[-1] != over_width:
            raise ValueError(
                f"the state has {hidden_states.shape[-1]} channels, not n * hidden_size / m = {over_width}: copy a "
                "backbone vector's segments to n with megatron_vwn.ops.tile."
            )
        return hidden_states.reshape(-1, self.n, self.segment_size)

    def _as_tensors(self) -> ConnectionParameters:
        dynamic = self.kind == "dynamic"
        return ConnectionParameters(
            m=self.m,
            n=self.n,
            gate=self.gate,
            eps=self.eps,
            routing_NK=self.routing.view(self.n, -1),
            scale_NK=self.scale.view(self.n, -1) if dynamic else None,
            weight_EK=self.weight if dynamic else None,
            norm_E=self.norm if dynamic else None,
            doubly_stochastic=self.carry == "doubly-stochastic",
            kernels=self.kernels,
        )
