"""A stand-in for the kernels, which need a GPU: from the composed operations, write and read at once, keeping H and Y
alone."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

from torch.utils.checkpoint import checkpoint

from megatron_vwn import ops
from megatron_vwn.ops import eager
from megatron_vwn.ops.eager import recomputed


def _write_then_read(h_TNE, y_TD, p, following, input_norm=None):
    next_TNE = eager.write(h_TNE, y_TD, p)
    # Seen as another tensor, so that the parts of its gradient are added in the order in which they are unfused.
    return next_TNE, eager.read(next_TNE.view_as(next_TNE), following, input_norm)


@contextmanager
def fused_write_read():
    """Inside, ``ops`` plans as it does where the kernels run; gives a list that says of every ``write_read`` whether it
    was given a norm."""
    normed = []
    rebuilding = partial(checkpoint, _write_then_read, use_reentrant=False, preserve_rng_state=False)

    def write_read(h_TNE, y_TD, p, following, input_norm=None):
        normed.append(input_norm is not None)
        return rebuilding(h_TNE, y_TD, p, following, input_norm)

    stand_in = SimpleNamespace(read=recomputed.read, write=recomputed.write, write_read=write_read)
    plan = ops.Plan(stand_in, normalizes_input=True, fuses_write_read=True)
    with patch.object(ops, "plan", lambda h_TNE, p: plan):
        yield normed
