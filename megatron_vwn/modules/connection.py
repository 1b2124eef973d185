"""Generalized Hyper-Connection: what replaces the residual connection of one sublayer."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.modules.norm import SharedNorm
from megatron_vwn.modules.stream_module import PartitionedModule


class Connection(PartitionedModule):
    """Reads a sublayer's input from the over-width state and writes its output back.

        X  = A_read^T H          H' = B^T Y + A_carry^T H

    with A and B static or computed from H (``ops.reference`` has the equations). Parameters are deviations from the
    paper's initial values: all zeros, but for the norm weight. A, B and S are stored flat, because Megatron's standard
    rule exempts one-dimensional parameters from weight decay; W has two dimensions and decays.

    Args:
        config: the backbone's config; D = hidden_size, eps = layernorm_epsilon.
        virtual_width: the stream.
        pg_collection: process groups; ``tp`` is used.
        input_norm: the sublayer's own, if the read may do it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        virtual_width: VirtualWidthConfig,
        pg_collection: ProcessGroupCollection,
        input_norm: SharedNorm | None = None,
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.input_norm = input_norm
        self.num_coefficients = 2 * virtual_width.m + virtual_width.num_carry
        self._plans: dict[tuple[torch.dtype, bool], ops.Plan] = {}
        self.add_parameter("routing", virtual_width.n * self.num_coefficients)
        if virtual_width.dynamic:
            self.add_parameter("scale", virtual_width.n * self.num_coefficients)
            self.add_parameter("weight", self.segment_size, self.num_coefficients, channel_dim=0)
            self.add_parameter("norm", self.segment_size, value=1.0, channel_dim=0)

    def forward(self) -> ops.ConnectionParameters:
        """The parameters as ops/ takes them.

        Called as a module, because that is where Megatron's data parallelism waits for parameters that are still being
        gathered (--overlap-param-gather); read directly, they would be those of the step before. It does not compute,
        because a ``write_read`` wants the parameters of two connections and a norm, each from its own module's call.
        """
        vw, k = self.virtual_width, self.num_coefficients
        return ops.ConnectionParameters(
            m=vw.m,
            n=vw.n,
            gate=vw.gate,
            eps=self.config.layernorm_epsilon,
            routing_NK=self.routing.view(vw.n, k),
            scale_NK=self.scale.view(vw.n, k) if vw.dynamic else None,
            weight_EK=self.weight if vw.dynamic else None,
            norm_E=self.norm if vw.dynamic else None,
            doubly_stochastic=vw.carry == "doubly-stochastic",
            recompute=vw.recompute_block is not None,
            kernels=vw.kernels,
        )

    def plan(self, hidden_states: Tensor) -> ops.Plan:
        """What computes this connection; decided when the first state of this dtype and kind of device arrives."""
        key = hidden_states.dtype, hidden_states.is_cuda
        if key not in self._plans:
            p = self()
            # No kernel takes a share of the channels.
            plan = ops.composed(p) if self.partition.splits_width else ops.plan(self.segments(hidden_states), p)
            if self.input_norm is None:
                plan = plan._replace(normalizes_input=False)
            self._plans[key] = plan
        return self._plans[key]

    def read(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sublayer's input.

        Args:
            hidden_states: this rank's over-width state [s, b, N * E].

        Returns:
            The input [s, b, D] in the state's dtype, or its norm where the plan says so, and what ``write`` wants
            back: under the width partition the carry and write deviations, whose sums over ranks came with those of
            the read; else None.
        """
        h_TNE, plan = self.segments(hidden_states), self.plan(hidden_states)
        p, compute = self(), plan.implementation
        shape = (*hidden_states.shape[:-1], self.config.hidden_size)
        if not self.partition.splits_width:
            return compute.read(h_TNE, p, self.input_norm() if plan.normalizes_input else None).view(shape), None
        everything = slice(0, self.num_coefficients)
        sums_TNK = self.partition.sum_over_channels(compute.project(h_TNE, p, everything)) if p.dynamic else None
        deviation_TNK = self.partition.complete_gradient(compute.deviations(sums_TNK, p, everything, self.segment_size))
        x_TME = compute.mix_read(h_TNE, deviation_TNK[..., p.read_columns], p)
        return self.partition.gather_channels(x_TME).reshape(shape), deviation_TNK[..., p.write_columns]

    def share(self, output: Tensor) -> Tensor:
        """What this rank writes of a sublayer's output [s, b, D], as ``write`` takes it: [T, D], or under the width
        partition its channels [T, M, E]."""
        y_TD = output.reshape(-1, output.shape[-1])
        if not self.partition.splits_width:
            return y_TD
        return self.partition.scatter_channels(y_TD.unflatten(-1, (self.virtual_width.m, self.segment_size)))

    def write(self, hidden_states: Tensor, y: Tensor, deviation_TNK: Tensor | None) -> Tensor:
        """The next over-width state. No rank communicates, so a rank may repeat it when it likes.

        Args:
            hidden_states: the state that was read, [s, b, N * E].
            y: the sublayer's output, without a residual, as ``share`` gave it.
            deviation_TNK: what ``read`` returned.

        Returns:
            The next state [T, N, E] of this rank, in the dtype of hidden_states.
        """
        h_TNE = self.segments(hidden_states)
        p, compute = self(), self.plan(hidden_states).implementation
        if not self.partition.splits_width:
            return compute.write(h_TNE, y, p)
        return compute.mix_write(h_TNE, y, deviation_TNK, p)

    def write_read(self, hidden_states: Tensor, y: Tensor, following: "Connection") -> tuple[Tensor, Tensor]:
        """This connection's write and the following one's read at once; only where the plan says so.

        Args:
            hidden_states: the state that this connection read, [s, b, N * E].
            y: as ``write`` takes it.
            following: the connection of the next sublayer.

        Returns:
            The next state [T, N, E] and the next sublayer's input [T, D], its norm where ``following`` plans so.
        """
        h_TNE, compute = self.segments(hidden_states), self.plan(hidden_states).implementation
        p_next = following()
        norm = following.input_norm() if following.plan(hidden_states).normalizes_input else None
        return compute.write_read(h_TNE, y, self(), p_next, norm)
