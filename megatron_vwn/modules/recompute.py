"""Stream recompute: one stored state per block of sublayers, the others rebuilt in the backward pass.

Autograd keeps the over-width state H of every connection, r times the backbone's width and twice per layer, and its
gates. Here it keeps the first H of a block with its gates and every sublayer's output Y, and gets a handle for whatever
later H and gates it would keep. The first handle that the backward pass opens rebuilds the whole block with the chain
(H_1, X_1, gates_1) = write_read(H_0, Y_0, gates_0) and so on, and each H is let go again when its last handle has been
opened. A sublayer's input X, which its norm keeps, is emptied after use and filled again with its H.

Per token and in elements, of C connections in blocks of K on one pipeline stage (D backbone width, r virtual width
factor, z what the gates of one state take; whole segments, that is the sequence and replicated partitions):

    kept for the backward pass   ceil(C / K) (r D + z) + C D       H and gates of each block, Y of each sublayer
                                 + (ceil(C / K) - 1) D             X of each later block, which only the block before
                                                                   could repeat
    while a block's backward     (K - 1) ((r + 1) D + z)           H, X and gates rebuilt
    runs, in addition                                              (and the first X of a stage when its turn comes)
    without any of this          C (r D + z + 2 D)                 H and gates, X and Y of each connection

What is rebuilt equals what was there to the bit: it is the same function of the same arguments. Dropout lies before Y,
so no random number is drawn again. Nothing here is an FP8 product, so the rebuild needs no FP8 context. No rank
communicates: the width partition, whose reads do, keeps every X and all gates and rebuilds H alone.

A block belongs to one forward call. It is held by what autograd holds, never by a module, so micro-batches of a
pipeline do not see each other's; it ends where the next layer does not get the very tensor that the last one returned:
at stages, virtual stages, further predictions and the chunks that Megatron recomputes itself. Inside such a chunk the
first, gradient-free pass has no blocks, and the second has.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_vwn.modules.connection import Connection
from megatron_vwn.ops import Gates


class Place(NamedTuple):
    """Where a sublayer is: the block and its number in it, counted from zero, which is also the number of its state."""

    block: "Block"
    index: int


class _Mark(NamedTuple):
    """What a state carries from one layer to the next; weak, because the last state outlives its block."""

    block: weakref.ref
    index: int
    version: int


class _Point(NamedTuple):
    """A state [s, b, N * E] and its gates, None for a static connection."""

    state: Tensor
    gates: Gates | None

    def named(self) -> dict[str, Tensor]:
        """The tensors of which autograd may keep handles."""
        return {"state": self.state, **(self.gates._asdict() if self.gates else {})}


class _Handle(NamedTuple):
    """What autograd keeps in place of a tensor of a later point of the block."""

    block: "Block"
    index: int
    name: str
    shape: torch.Size


class _Kept:
    """What autograd keeps of an operation inside ``Block.keeping``: a tensor, or a handle once that is known."""

    def __init__(self, tensor: Tensor):
        # Not the tensor itself: what is an operation's output would hold the operation that holds it.
        self.what: Tensor | _Handle = tensor if tensor.is_leaf else tensor.detach()
        self._version = tensor._version

    def open(self) -> Tensor:
        """The tensor, rebuilt if need be."""
        if isinstance(self.what, _Handle):
            return self.what.block._open(self.what)
        if self.what._version != self._version:  # with hooks, autograd leaves this to them
            raise RuntimeError("a tensor that the backward pass needs was modified in place")
        return self.what


class _Emptied:
    """A sublayer's input whose memory is gone, until ``fill``."""

    def __init__(self, x: Tensor):
        # Another handle on the same storage, which every tensor that autograd keeps shares, views included; .data has a
        # version counter of its own, so filling is no modification.
        self._alias = x.data
        self._bytes = x.untyped_storage().nbytes()
        x.untyped_storage().resize_(0)

    def fill(self, x: Tensor) -> None:
        """Give it back its memory and the values of x, of any shape."""
        self._alias.untyped_storage().resize_(self._bytes)
        self._alias.copy_(x.detach().view(self._alias.shape))


@dataclass(kw_only=True)
class Step:
    """What it takes to pass one sublayer again.

    Attributes:
        connection: the sublayer's.
        x: the sublayer's input, as the layer got it; not held once the step belongs to a block.
        y: the sublayer's output as ``Connection.write`` takes it.
        gates: those of the sublayer's read; held by the first step of a block, and under the width partition.
        x_by_read: whether x was read by itself, rather than together with the write before.
        following: the next sublayer's connection where its read was fused with this write.
        emptied: the input while its memory is gone.
    """

    connection: Connection
    x: Tensor | None
    y: Tensor
    gates: Gates | None
    x_by_read: bool
    following: Connection | None = None
    emptied: _Emptied | None = None

    def fill(self, x: Tensor) -> None:
        """Fill x again, if it was emptied, and hold it no longer."""
        if self.emptied is not None:
            self.emptied.fill(x)
            self.emptied = None


class Block:
    """Sublayers in a row of one forward call, and the first of their states.

    Args:
        start: the state [s, b, N * E] that the first of them reads.
        size: how many they may become.
    """

    def __init__(self, start: Tensor, size: int):
        self.size = size
        self._start = start.detach()
        self._steps: list[Step] = []
        self._points: dict[int, _Point] = {}
        self._packed, self._unopened = Counter(), Counter()

    @property
    def length(self) -> int:
        """How many sublayers there are by now."""
        return len(self._steps)

    @contextmanager
    def keeping(self) -> Iterator[list[_Kept]]:
        """Operations inside keep what ``hand_over`` can exchange for handles; gives the list of it.

        Around our own operations only: a parameter that passed through such hooks has lost the attributes with which
        Megatron's linear layers find its main gradient.
        """
        everything: list[_Kept] = []

        def pack(tensor: Tensor) -> _Kept:
            everything.append(_Kept(tensor))
            return everything[-1]

        with saved_tensors_hooks(pack, _Kept.open):
            yield everything

    def hand_over(self, everything: list[_Kept], index: int, state: Tensor, gates: Gates | None) -> None:
        """Exchange what an operation kept of a point of this block for handles.

        Args:
            everything: what ``keeping`` gave.
            index: the number of the point; the first is kept, and that after the last is another block's.
            state: the point's state [s, b, N * E].
            gates: the point's gates, if this block can rebuild them.
        """
        if not 0 < index < self.size:
            return
        names = {_identity(tensor): name for name, tensor in _Point(state, gates).named().items()}
        for kept in everything:
            if isinstance(kept.what, Tensor) and (name := names.get(_identity(kept.what))):
                kept.what = _Handle(self, index, name, kept.what.shape)
                self._packed[index] += 1

    def add(self, step: Step, node: torch.autograd.graph.Node) -> None:
        """One more sublayer, whose input memory is let go.

        Args:
            step: the sublayer.
            node: computed the state after it, so that its gradient comes before anything of the sublayer's own.
        """
        index, splits_width = len(self._steps), step.connection.partition.splits_width
        self._steps.append(step)
        step.y = step.y.detach()
        holds_gates = step.gates is not None and (index == 0 or splits_width)
        step.gates = Gates(*(tensor.detach() for tensor in step.gates)) if holds_gates else None
        # Under the width partition X took communication.
        if (step.x_by_read or index > 0) and not splits_width and _alone(step.x, step.y):
            step.emptied = _Emptied(step.x)
        step.x = None
        # What holds the block until a later operation has a handle of it; for one backward pass, because the graph, and
        # with it this hook, may live on with the loss.
        waiting = [self]

        def fill(_gradients) -> None:
            if waiting:
                waiting.pop()._fill(index)

        node.register_prehook(fill)

    def _open(self, handle: _Handle) -> Tensor:
        tensor = self._point(handle.index).named()[handle.name]
        self._unopened[handle.index] -= 1
        self._let_go(handle.index)
        return tensor.view(handle.shape)

    def _fill(self, index: int) -> None:
        step = self._steps[index]
        if step.emptied is None:  # filled with its state
            return
        if index > 0:
            self._point(index)
            self._let_go(index)
        else:
            with torch.no_grad():
                step.fill(step.connection.read(self._start)[0])

    def _point(self, index: int) -> _Point:
        if index not in self._points:
            self._rebuild()
        return self._points[index]

    def _let_go(self, index: int) -> None:
        if self._unopened[index] <= 0:
            self._points.pop(index, None)

    @torch.no_grad()
    def _rebuild(self) -> None:
        self._unopened = self._packed.copy()
        state, gates = self._start, self._steps[0].gates
        for index, step in enumerate(self._steps[:-1], 1):
            following = self._steps[index]
            if step.following is not None:
                next_TNE, x, gates = step.connection.write_read(state, step.y, gates, step.following)
                state = next_TNE.view(state.shape)
                following.fill(x)
            else:
                state = step.connection.write(state, step.y, gates).view(state.shape)
                if step.connection.partition.splits_width:
                    gates = following.gates
                else:
                    x, gates = following.connection.read(state)
                    following.fill(x)
            self._points[index] = _Point(state, gates)


def place_of(state: Tensor, block_size: int | None) -> Place | None:
    """Where the sublayer that gets this state is: further on in the block of the layer before, or at a new block.

    Args:
        state: [s, b, N * E].
        block_size: sublayers of a block; None for no stream recompute.

    Returns:
        None where nothing is kept for a backward pass, or everything.
    """
    if block_size is None or not torch.is_grad_enabled():
        return None
    mark = getattr(state, "_vwn_mark", None)
    if mark is not None and mark.version == state._version:  # modified since, the chain would not lead to it
        block = mark.block()
        # Whoever reads the same state once more is not next in the chain.
        if block is not None and mark.index == block.length < block.size:
            return Place(block, mark.index)
    return Place(Block(state, block_size), 0)


def mark_place(state: Tensor, place: Place) -> None:
    """Let the next layer know that its state follows from the block's."""
    state._vwn_mark = _Mark(weakref.ref(place.block), place.index, state._version)


def keeping(place: Place | None) -> AbstractContextManager[list[_Kept]]:
    """``Block.keeping`` of this place; without one, nothing is looked at."""
    return nullcontext([]) if place is None else place.block.keeping()


def hand_over(everything: list[_Kept], place: Place | None, state: Tensor, gates: Gates | None) -> None:
    """``Block.hand_over`` for the point at this place; nothing without one."""
    if place is not None:
        place.block.hand_over(everything, place.index, state, gates)


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Equal for views of all of one storage."""
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def _alone(x: Tensor, y: Tensor) -> bool:
    """Whether x has its storage to itself, all of it."""
    storage = x.untyped_storage()
    return storage.nbytes() == x.numel() * x.element_size() and storage.data_ptr() != y.untyped_storage().data_ptr()
