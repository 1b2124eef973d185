"""How the tensor-parallel ranks of one group hold the over-width stream between sublayers.

    sequence     each rank holds its share of the tokens, all D' channels; needs sequence parallelism
    width        each rank holds all tokens and channels [t E/TP, (t+1) E/TP) of EVERY segment
    replicated   each rank holds everything

Under sequence and replicated a connection is local: it reads and writes whole segments. Under width the mixing is
local too, but coefficients need sums over all channels, and a sublayer needs whole backbone vectors; the collectives
for that are here. Their backward directions are the part that goes wrong silently, so each one says why it is what it
is.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vwn.config import Partition, VirtualWidthConfig


@dataclass(frozen=True)
class StreamPartition:
    """The partition of the stream over one tensor-parallel group.

    Attributes:
        kind: sequence, width or replicated; always replicated for a group of one rank.
        group: the tensor-parallel process group.
    """

    kind: Partition
    group: torch.distributed.ProcessGroup

    @classmethod
    def of(
        cls, config: TransformerConfig, virtual_width: VirtualWidthConfig, group: torch.distributed.ProcessGroup
    ) -> "StreamPartition":
        """The partition that a Megatron config and a virtual width mean on this group.

        Raises:
            VirtualWidthError: if the layout cannot have it.
        """
        layout = {"tensor_parallel_size": group.size(), "sequence_parallel": config.sequence_parallel}
        virtual_width.check_parallel(hidden_size=config.hidden_size, **layout)
        return cls(kind=virtual_width.resolve_partition(**layout), group=group)

    @property
    def splits_width(self) -> bool:
        """Whether a rank holds only some channels of each segment."""
        return self.kind == "width"

    def local_segment_size(self, segment_size: int) -> int:
        """Channels of a segment that this rank holds; ``of`` has refused ranks that do not divide them."""
        return segment_size // self.group.size() if self.splits_width else segment_size

    def mark(self, parameter: torch.nn.Parameter, channel_dim: int | None = None) -> torch.nn.Parameter:
        """Tell Megatron how a VWN parameter's gradient comes about.

        Args:
            parameter: the parameter of this rank.
            channel_dim: its dimension of E, or None where it has none.

        Returns:
            The parameter: under sequence marked so that Megatron sums its gradient over the group (each rank saw other
            tokens); under width, with a channel dimension, marked as a shard; else left as an equal replica.
        """
        if self.kind == "sequence":
            parameter.sequence_parallel = True
        elif self.splits_width and channel_dim is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=channel_dim, stride=1)
        return parameter

    def sum_over_channels(self, partial: Tensor) -> Tensor:
        """Complete sums over E. Forward: sum over ranks. Backward: identity.

        Where what follows makes the gradient of the sum complete on every rank, each rank's partial sum enters it with
        weight one; summing once more would count it TP times.
        """
        return reduce_from_tensor_model_parallel_region(partial, self.group) if self.splits_width else partial

    def complete_gradient(self, shared: Tensor) -> Tensor:
        """Of what every rank uses for its own channels. Forward: identity. Backward: sum over ranks."""
        return copy_to_tensor_model_parallel_region(shared, self.group) if self.splits_width else shared

    def sum_in_place(self, partial: Tensor) -> Tensor:
        """A sum over ranks outside of autograd, for ``ConnectionParameters.sum_over_ranks``.

        A connection's forward pass sums (squares, H gW), its backward pass the gradient of the COEFFICIENTS, which mix
        only this rank's channels. Behind that point dS, dA, dB, dW, dg and dH are all exact; with the sum placed on the
        logits, dS, dA and dB would stay partial.
        """
        torch.distributed.all_reduce(partial, group=self.group)
        return partial

    def total(self, partial: Tensor) -> Tensor:
        """A sum over ranks that every rank then uses for its own channels: summed forward and backward."""
        return self.complete_gradient(self.sum_over_channels(partial))

    def gather_channels(self, x_TME: Tensor) -> Tensor:
        """Whole backbone segments from the ranks' channels. Backward: this rank's channels of an equal gradient.

        Gathered on E while M is still a dimension of its own: flattened to D first, the result would be rank-major.
        """
        return gather_from_tensor_model_parallel_region(x_TME, self.group) if self.splits_width else x_TME

    def scatter_channels(self, y_TME: Tensor) -> Tensor:
        """This rank's channels of whole segments that all ranks hold equally. Backward: gathered, so equal on all."""
        return scatter_to_tensor_model_parallel_region(y_TME, self.group) if self.splits_width else y_TME
