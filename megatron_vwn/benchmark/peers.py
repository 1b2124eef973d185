"""mHC (arXiv 2512.24880) by Transformer Engine and by Liger, where installed: the nearest thing others have.

mHC is a connection of m = 1, n = 4 whose coefficients come from the flattened streams, whose read and write weights are
sigmoids, and whose carry is made doubly stochastic by 20 Sinkhorn iterations. So the peers move the same streams, and
beyond our work they compute Sinkhorn. Each is compared with mHC's own equations in fp64, not with ours.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_vwn.benchmark.operations import Problem, Variant

STREAMS = 4
_ITERATIONS = 20
_REMARK = "mHC: with 20 Sinkhorn iterations on its carry"


class _ManifoldHyperConnections(Variant):
    """What both have in common: one matrix phi [24, 4 D] whose rows are 4 read, 4 write and 16 carry logits."""

    remark = _REMARK
    package: str
    carry_reads_columns = True

    def missing(self, problem: Problem) -> str | None:
        """See ``Variant``."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if problem.device.type != "cuda":
            return "runs on a GPU only"
        return None

    def leaves(self, problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
        """See ``Variant``; parameters in fp32 as the peers recommend."""
        d, k = problem.width.hidden_size, STREAMS * (STREAMS + 2)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(*shape, generator=generator, device=problem.device)

        leaves = {
            "h": self.stacked(draw(problem.tokens, STREAMS, d)).to(problem.dtype),
            "y": draw(problem.tokens, d).to(problem.dtype),
            "phi": draw(k, STREAMS * d, std=(STREAMS * d) ** -0.5),
            "alpha": 1 + draw(3, std=0.1),
            "beta": draw(k, std=0.5),
        }
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def stacked(self, h_TND: Tensor) -> Tensor:
        """The streams in the memory layout of this peer."""
        return h_TND.contiguous()

    def unstacked(self, h: Tensor) -> Tensor:
        """[T, N, D] of this peer's layout."""
        return h

    def flattened(self, h: Tensor) -> Tensor:
        """All channels of a token in the order of phi's columns, [T, N * D]."""
        return h.flatten(1)

    def expected(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """mHC's equations 14 to 19."""
        h_TND, flat = self.unstacked(leaves["h"]), self.flattened(leaves["h"])
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
        read, write, carry = (normed @ leaves["phi"].T).split([STREAMS, STREAMS, STREAMS**2], dim=-1)
        b_read, b_write, b_carry = leaves["beta"].split([STREAMS, STREAMS, STREAMS**2])
        alpha = leaves["alpha"]
        read_TN = torch.sigmoid(alpha[0] * read + b_read)
        write_TN = 2 * torch.sigmoid(alpha[1] * write + b_write)
        carry_TNN = (alpha[2] * carry + b_carry).unflatten(-1, (STREAMS, STREAMS))
        for _ in range(_ITERATIONS):
            carry_TNN = carry_TNN - carry_TNN.logsumexp(-1, keepdim=True)
            carry_TNN = carry_TNN - carry_TNN.logsumexp(-2, keepdim=True)
        carry_TNN = carry_TNN.exp()
        x_TD = (read_TN[..., None] * h_TND).sum(1)
        mixed_TND = (carry_TNN.transpose(1, 2) if self.carry_reads_columns else carry_TNN) @ h_TND
        return x_TD, self.stacked(mixed_TND + write_TN[..., None] * leaves["y"][:, None])


class TransformerEngine(_ManifoldHyperConnections):
    """``mhc_generate_mix_and_aggregate`` and ``mhc_fused_expand_combine``; streams are its innermost axis."""

    name = "Transformer Engine mHC"
    package = "transformer_engine"

    def stacked(self, h_TND: Tensor) -> Tensor:
        """[T, D, N]."""
        return h_TND.transpose(1, 2).contiguous()

    def unstacked(self, h: Tensor) -> Tensor:
        """See ``_ManifoldHyperConnections``."""
        return h.transpose(1, 2)

    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """See ``Variant``."""
        from transformer_engine.pytorch.triton.mhc import mhc_fused_expand_combine, mhc_generate_mix_and_aggregate

        h, y = leaves["h"][:, None], leaves["y"][:, None]
        # One buffer lets its three kernels add up dH, as ours do.
        sums = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        phi, alpha, beta = leaves["phi"], leaves["alpha"], leaves["beta"][None]
        x, write, carry = mhc_generate_mix_and_aggregate(h, phi, alpha, beta, fused_grad_x_acc_buffer=sums)
        out = mhc_fused_expand_combine(y, None, write, h, carry, STREAMS, fused_grad_x_acc_buffer=sums)
        return x[:, 0], out[:, 0]


class Liger(_ManifoldHyperConnections):
    """``liger_mhc_coeffs``, ``liger_mhc_pre`` and ``liger_mhc_post_res``; compiles anew for every token count."""

    name = "Liger mHC"
    package = "liger_kernel"
    carry_reads_columns = False

    def outputs(self, problem: Problem, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """See ``Variant``."""
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

        h, alpha = leaves["h"], leaves["alpha"]
        # The half precision that it recommends for the tensor cores; here part of every call, 24 x 4D elements.
        phi = leaves["phi"].T.to(h.dtype)
        read, write, carry = liger_mhc_coeffs(
            h, phi, leaves["beta"], alpha[0], alpha[1], alpha[2], allow_fp32=h.dtype == torch.float32
        )
        return liger_mhc_pre(h, read), liger_mhc_post_res(h, leaves["y"], write, carry)
