"""The composed connection that keeps its arguments alone for the backward pass, and computes the rest again.

Autograd keeps many intermediates of ``ops.composed``: the state in fp32, its squares' sums, logits, gates, deviations.
The kernels keep H and Y; so do these. The graph is that of ``ops.composed``, node for node, and so are the gradients,
to the bit: ``torch.utils.checkpoint`` fills its nodes again, where an ``autograd.Function`` of our own would add the
parts of dH in another order. On a CPU a read and a write take 40 to 80 % longer, so only who asks for stream recompute
gets these.

None of them communicates: under the width partition the caller sums over ranks between the stages.
"""

from collections.abc import Callable
from functools import partial

from torch.utils.checkpoint import checkpoint

from megatron_vwn.ops import composed


def _recomputed(function: Callable) -> Callable:
    # Nothing in a connection is random.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


read = _recomputed(composed.read)
write = _recomputed(composed.write)
write_read = _recomputed(composed.write_read)
project = _recomputed(composed.project)
deviations = _recomputed(composed.deviations)
mix_read = _recomputed(composed.mix_read)
mix_write = _recomputed(composed.mix_write)
