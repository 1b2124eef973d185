"""How a sublayer passes by the stream: it arrives with a read and leaves with a write.

Between two sublayers of a stack the write may wait for the next one's read, so that a single kernel does both: it loads
H and Y, and stores H' and the next X. Then the first layer returns a ``PendingWrite`` in place of a tensor. Whatever is
no layer of ours gets tensors: see ``join_boundaries``.
"""

from dataclasses import dataclass

from megatron.core.models.hybrid.hybrid_block import HybridStack
from torch import Tensor

from megatron_vwn.modules.connection import Connection
from megatron_vwn.modules.recompute import Place, Step, hand_over, keeping, mark_place, place_of
from megatron_vwn.ops import Gates


@dataclass(kw_only=True)
class Arrival:
    """A sublayer that has read its input.

    Attributes:
        connection: the sublayer's.
        state: this rank's over-width state [s, b, N * E] that it read.
        x: its input [s, b, D] in the backbone's dtype.
        gates: what the read gave for the write.
        place: the sublayer's place for stream recompute; None without.
        x_by_read: whether x was read by itself, rather than together with the write before.
    """

    connection: Connection
    state: Tensor
    x: Tensor
    gates: Gates | None
    place: Place | None
    x_by_read: bool

    def leave(self, output: Tensor, *, wait: bool) -> "Tensor | PendingWrite":
        """Write the sublayer's output [s, b, D], or leave that to the next sublayer if it may wait and both can be done
        at once."""
        write = PendingWrite(self, self.connection.share(output))
        return write if wait and self.connection.fuses_write_read else write.finish()


class PendingWrite:
    """H' = write(H, Y) that has not been computed; for one use, after which it holds nothing, because Megatron's loop
    holds it while the next layer runs.

    Args:
        arrival: how the sublayer came to its input.
        y: its output as ``Connection.write`` takes it.
    """

    def __init__(self, arrival: Arrival, y: Tensor):
        self._parts = arrival, y

    def finish(self) -> Tensor:
        """The next state [s, b, N * E]."""
        this, y = self._take()
        with keeping(this.place) as kept:
            next_TNE = this.connection.write(this.state, y, this.gates)
        hand_over(kept, this.place, this.state, _rebuilt(this.gates, this.connection))
        return _next_state(next_TNE, this, y)

    def read_by(self, following: Connection) -> Arrival:
        """The next sublayer's arrival, whose read is done together with this write."""
        this, y = self._take()
        with keeping(this.place) as kept:
            next_TNE, x_TD, gates = this.connection.write_read(this.state, y, this.gates, following)
        hand_over(kept, this.place, this.state, this.gates)
        hand_over(kept, _next_place(this), next_TNE, gates)
        state = _next_state(next_TNE, this, y, following)
        return Arrival(
            connection=following,
            state=state,
            x=_for_backbone(x_TD.view(*state.shape[:-1], x_TD.shape[-1]), following),
            gates=gates,
            place=place_of(state, following.virtual_width.recompute_block),
            x_by_read=False,
        )

    def _take(self) -> tuple[Arrival, Tensor]:
        parts, self._parts = self._parts, None
        return parts


def _next_state(next_TNE: Tensor, this: Arrival, y: Tensor, following: Connection | None = None) -> Tensor:
    state, next_place = next_TNE.view(this.state.shape), _next_place(this)
    if next_place is not None and next_TNE.grad_fn is not None:
        step = Step(
            connection=this.connection,
            x=this.x,
            y=y,
            gates=this.gates,
            x_by_read=this.x_by_read,
            following=following,
        )
        next_place.block.add(step, next_TNE.grad_fn)
        mark_place(state, next_place)
    return state


def _next_place(this: Arrival) -> Place | None:
    return None if this.place is None else this.place._replace(index=this.place.index + 1)


def arrive(connection: Connection, hidden_states: Tensor | PendingWrite) -> Arrival:
    """The sublayer with this connection reads its input from a state [s, b, N * E] or from the write that leads to
    one."""
    if isinstance(hidden_states, PendingWrite):
        return hidden_states.read_by(connection)
    place = place_of(hidden_states, connection.virtual_width.recompute_block)
    with keeping(place) as kept:
        x, gates = connection.read(hidden_states)
    hand_over(kept, place, hidden_states, _rebuilt(gates, connection))
    return Arrival(
        connection=connection,
        state=hidden_states,
        x=_for_backbone(x, connection),
        gates=gates,
        place=place,
        x_by_read=True,
    )


def _rebuilt(gates: Gates | None, connection: Connection) -> Gates | None:
    # Under the width partition gates took communication.
    return None if connection.partition.splits_width else gates


def join_boundaries(stack: HybridStack) -> None:
    """Let the layers of a stack leave their writes to the next one wherever Megatron's loop hands on what a layer
    returns: not at the end, and not at the end of a chunk that Megatron recomputes, whose checkpoint takes tensors.

    Args:
        stack: a stack whose layers all have connections.
    """
    config = stack.config
    chunk, one_by_one = len(stack.layers), 0
    if config.recompute_granularity == "full":
        if config.recompute_method == "uniform":
            chunk = config.recompute_num_layers
        else:  # in low precision Megatron looks at what each layer returns before it chooses those that it recomputes
            one_by_one = chunk if config.fp8 or config.fp4 else config.recompute_num_layers
    for number, layer in enumerate(stack.layers[:-1], 1):
        layer.leaves_write = number > one_by_one and number % chunk != 0


def _for_backbone(x: Tensor, connection: Connection) -> Tensor:
    """The stream may be fp32 around a bf16 backbone (--fp32-residual-connection)."""
    return x.to(connection.config.params_dtype)
