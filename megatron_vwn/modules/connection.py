"""Generalized Hyper-Connection: what replaces the residual connection of one sublayer."""

from types import ModuleType

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn import ops
from megatron_vwn.config import VirtualWidthConfig
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
    """

    def __init__(
        self, config: TransformerConfig, virtual_width: VirtualWidthConfig, pg_collection: ProcessGroupCollection
    ):
        super().__init__(config, virtual_width, pg_collection)
        self.num_coefficients = 2 * virtual_width.m + virtual_width.num_carry
        self._implementations: dict[tuple[torch.dtype, bool], ModuleType] = {}
        self.add_parameter("routing", virtual_width.n * self.num_coefficients)
        if virtual_width.dynamic:
            self.add_parameter("scale", virtual_width.n * self.num_coefficients)
            self.add_parameter("weight", self.segment_size, self.num_coefficients, channel_dim=0)
            self.add_parameter("norm", self.segment_size, value=1.0, channel_dim=0)

    def forward(self) -> ops.ConnectionParameters:
        """The parameters as ops/ takes them.

        Called as a module, because that is where Megatron's data parallelism waits for parameters that are still being
        gathered (--overlap-param-gather); read directly, they would be those of the step before. It does not compute,
        because a ``write_read`` wants the parameters of two connections, each from its own module's call.
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
            sum_over_ranks=self.partition.sum_in_place if self.partition.splits_width else None,
            ranks=self.tp_group.size() if self.partition.splits_width else 1,
            kernels=vw.kernels,
        )

    def implementation(self, hidden_states: Tensor) -> ModuleType:
        """What computes this connection; decided when the first state of this dtype and kind of device arrives."""
        key = hidden_states.dtype, hidden_states.is_cuda
        if key not in self._implementations:
            self._implementations[key] = ops.implementation(self.segments(hidden_states), self())
        return self._implementations[key]

    @property
    def fuses_write_read(self) -> bool:
        """Whether ``write_read`` may be called: not under the width partition, whose reads communicate, because stream
        recompute repeats it."""
        return not self.partition.splits_width

    def read(self, hidden_states: Tensor) -> tuple[Tensor, ops.Gates | None]:
        """The sublayer's input. Under the width partition the ranks communicate.

        Args:
            hidden_states: this rank's over-width state [s, b, N * E].

        Returns:
            The input [s, b, D] in the state's dtype, and the gates that ``write`` wants back; None for a static
            connection.
        """
        x_TD, gates = self.implementation(hidden_states).read(self.segments(hidden_states), self())
        if self.partition.splits_width:
            # Gathered on E while M is still a dimension of its own: flattened to D first, it would be rank-major.
            x_TD = self.partition.gather_channels(x_TD.unflatten(-1, (self.virtual_width.m, -1)))
        return x_TD.reshape(*hidden_states.shape[:-1], self.config.hidden_size), gates

    def share(self, output: Tensor) -> Tensor:
        """What this rank writes of a sublayer's output [s, b, D], as ``write`` takes it: [T, D], or under the width
        partition its channels of each segment, [T, M * E]."""
        y_TD = output.reshape(-1, output.shape[-1])
        if not self.partition.splits_width:
            return y_TD
        return self.partition.scatter_channels(y_TD.unflatten(-1, (self.virtual_width.m, self.segment_size))).flatten(1)

    def write(self, hidden_states: Tensor, y_TD: Tensor, gates: ops.Gates | None) -> Tensor:
        """The next over-width state. No rank communicates, so a rank may repeat it when it likes.

        Args:
            hidden_states: the state that was read, [s, b, N * E].
            y_TD: the sublayer's output, without a residual, as ``share`` gave it.
            gates: what ``read`` returned.

        Returns:
            The next state [T, N, E] of this rank, in the dtype of hidden_states.
        """
        return self.implementation(hidden_states).write(self.segments(hidden_states), y_TD, gates, self())

    def write_read(
        self, hidden_states: Tensor, y_TD: Tensor, gates: ops.Gates | None, following: "Connection"
    ) -> tuple[Tensor, Tensor, ops.Gates | None]:
        """This connection's write and the following one's read at once; only where ``fuses_write_read``.

        Args:
            hidden_states: the state that this connection read, [s, b, N * E].
            y_TD: as ``write`` takes it.
            gates: as ``write`` takes them.
            following: the connection of the next sublayer.

        Returns:
            The next state [T, N, E], the next sublayer's input [T, D], and the gates of ``following``.
        """
        compute = self.implementation(hidden_states)
        return compute.write_read(self.segments(hidden_states), y_TD, gates, self(), following())
