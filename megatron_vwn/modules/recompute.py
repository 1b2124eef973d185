"""Stream recompute: one stored state per block of sublayers, the others rebuilt in the backward pass.

Autograd keeps the over-width state H of every connection: r times the backbone's width, twice per layer. Here it keeps
the first H of a block and every sublayer's output Y, and gets a handle for each later H. The first handle that the
backward pass opens rebuilds the whole block with the write chain, H_1 = write(H_0, Y_0), H_2 = write(H_1, Y_1), and so
on, and each H is let go again when its last handle has been opened. A sublayer's input X, which its norm keeps, is
emptied after use and filled again just before the sublayer's backward pass. Where the read does the norm, X stands for
the normalised input below, which the sublayer's first linear layers keep; the read itself keeps no input then, but a
number per token.

Per token and in elements, of C connections in blocks of K on one pipeline stage (D backbone width, r virtual width
factor; whole segments, that is the sequence and replicated partitions):

    kept for the backward pass   ceil(C / K) r D + C D             H of each block, Y of each sublayer
                                 + (ceil(C / K) - 1) D             X of each later block, where it came with a fused
                                                                   write_read, which only the block before could repeat
    while a block's backward     (K - 1) r D + D                   H rebuilt, one X at a time
    runs, in addition            (K - 1) (r + 1) D                 with a fused write_read: all X come with their H
                                                                   (and the first X of a stage when its turn comes)
    without any of this          C (r D + 2 D)                     H, X and Y of each connection

What is rebuilt equals what was there to the bit: it is the same function of the same arguments, in the same grad mode
(whether an operand requires a gradient decides how torch multiplies). Dropout lies before Y, so no random number is
drawn again. Nothing here is an FP8 product, so the rebuild needs no FP8 context. No rank communicates: the width
partition keeps its X, and its coefficients, which were summed over ranks.

A block belongs to one forward call. It is held by what autograd holds, never by a module, so micro-batches of a
pipeline do not see each other's; it ends where the next layer does not get the very tensor that the last one returned:
at stages, virtual stages, further predictions and the chunks that Megatron recomputes itself. Inside such a chunk the
first, gradient-free pass has no blocks, and the second has.
"""

import weakref
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_vwn.modules.connection import Connection


class Place(NamedTuple):
    """Where a sublayer is: the block and its number in it, counted from zero, which is also the number of its state."""

    block: "Block"
    index: int


class _Mark(NamedTuple):
    """What a state carries from one layer to the next; weak, because the last state outlives its block."""

    block: weakref.ref
    index: int
    version: int


class _Handle(NamedTuple):
    """What autograd keeps in place of a state."""

    block: "Block"
    index: int
    shape: torch.Size


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
        coefficients: what else ``Connection.write`` takes.
        x_by_read: whether x was read by itself, rather than together with the write before.
        following: the next sublayer's connection where its read was fused with this write.
        emptied: the input while its memory is gone.
    """

    connection: Connection
    x: Tensor | None
    y: Tensor
    coefficients: Tensor | None
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
        self._start = _argument(start)
        self._steps: list[Step] = []
        self._states: dict[int, Tensor] = {}
        self._packed, self._unopened = Counter(), Counter()

    def keeping(self, index: int, state: Tensor) -> AbstractContextManager:
        """Operations inside keep a handle where they would keep this state.

        Around our own operations only: a parameter that passed through such hooks has lost the attributes with which
        Megatron's linear layers find its main gradient.
        """
        address, elements = state.untyped_storage().data_ptr(), state.numel()

        def pack(tensor: Tensor):
            same = tensor.untyped_storage().data_ptr() == address and tensor.numel() == elements
            if same and tensor.is_contiguous():
                self._packed[index] += 1
                return _Handle(self, index, tensor.shape)
            # Not the tensor itself: what is an operation's output would hold the operation that holds it.
            return (tensor if tensor.is_leaf else tensor.detach()), tensor._version

        def unpack(kept):
            if isinstance(kept, _Handle):
                return kept.block._open(kept)
            tensor, version = kept
            if tensor._version != version:  # with hooks, autograd leaves this to them
                raise RuntimeError("a tensor that the backward pass needs was modified in place")
            return tensor

        return saved_tensors_hooks(pack, unpack)

    def add(self, step: Step, node: torch.autograd.graph.Node) -> None:
        """One more sublayer, whose input memory is let go.

        Args:
            step: the sublayer.
            node: computed the state after it, so that its gradient comes before anything of the sublayer's own.
        """
        index = len(self._steps)
        self._steps.append(step)
        step.y, step.coefficients = _argument(step.y), _argument(step.coefficients)
        # Under the width partition X took communication.
        from_here = step.x_by_read or index > 0
        if from_here and not step.connection.partition.splits_width and _alone(step.x, step.y):
            step.emptied = _Emptied(step.x)
            waiting = [self]  # for one backward pass: the graph, and with it this hook, may live on with the loss

            def fill(_gradients) -> None:
                if waiting:
                    waiting.pop()._fill(index)

            node.register_prehook(fill)
        step.x = None

    def _open(self, handle: _Handle) -> Tensor:
        state = self._state(handle.index)
        self._unopened[handle.index] -= 1
        self._let_go(handle.index)
        return state.detach().view(handle.shape)

    def _fill(self, index: int) -> None:
        step = self._steps[index]
        if step.emptied is None:  # filled with its state
            return
        state = self._state(index)
        if step.x_by_read:
            with torch.enable_grad():
                x, _ = step.connection.read(state)
            step.fill(x)
        self._let_go(index)

    def _state(self, index: int) -> Tensor:
        if index == 0:
            return self._start
        if index not in self._states:
            self._rebuild()
        return self._states[index]

    def _let_go(self, index: int) -> None:
        if self._unopened[index] <= 0:
            self._states.pop(index, None)

    def _rebuild(self) -> None:
        self._unopened = self._packed.copy()
        state = self._start
        for index, step in enumerate(self._steps[:-1], 1):
            with torch.enable_grad():
                if step.following is None:
                    next_TNE = step.connection.write(state, step.y, step.coefficients)
                else:
                    next_TNE, x = step.connection.write_read(state, step.y, step.following)
                    self._steps[index].fill(x)
            state = _argument(next_TNE.view(state.shape))
            self._states[index] = state


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
        if block is not None and mark.index < block.size:
            return Place(block, mark.index)
    return Place(Block(state, block_size), 0)


def mark_place(state: Tensor, place: Place) -> None:
    """Let the next layer know that its state follows from the block's."""
    state._vwn_mark = _Mark(weakref.ref(place.block), place.index, state._version)


def keeping(place: Place | None, state: Tensor) -> AbstractContextManager:
    """``Block.keeping`` of this place; nothing without one."""
    return nullcontext() if place is None else place.block.keeping(place.index, state)


def _argument(tensor: Tensor | None) -> Tensor | None:
    """The tensor without its graph, but with its answer to whether it requires a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


def _alone(x: Tensor, y: Tensor) -> bool:
    """Whether x has its storage to itself, all of it."""
    storage = x.untyped_storage()
    return storage.nbytes() == x.numel() * x.element_size() and storage.data_ptr() != y.untyped_storage().data_ptr()
