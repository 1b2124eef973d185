"""Numbers and histograms of a snapshot under their tags.

    vwn/NAME/mean, min, max          over the trunk's connections
    vwn/NAME/birth, n                lines to read them by (reference.py)
    vwn/gradient_norm/KIND           of all parameters of a kind
    vwn_layers/NAME/layer_003        of one connection; the number is the symbol's place in --hybrid-layer-pattern
    vwn_layers/NAME/mtp_1_layer_001  of a connection of the first further prediction

Two prefixes, because TensorBoard folds what has a common first part: the summary stays short for a deep model.
"""

import math

from torch import Tensor

from megatron_vwn.training.monitoring.depth import carry_gains, depth_windows
from megatron_vwn.training.monitoring.snapshot import ConnectionStatistics, Place, Snapshot

_CARRY_GAINS = ("carry_gain_forward_max", "carry_gain_backward_max", "carry_gain_mean")
# What is written per connection. The first sublayer of a chain has no depth window: nothing comes before it.
PER_CONNECTION = {
    "effective_segments": "how many segments carry the stream's energy before this sublayer, copies included",
    "independent_segments": "how many segments are no copies of others; more than at birth means that width is used",
    "segment_norm_max": "largest root mean square of a segment",
    "segment_norm_min": "smallest root mean square of a segment",
    "dynamic_share": "of the coefficients' squares, the part that depends on the token",
    "gate_saturation": "fraction of gates beyond 0.95, which hardly learn any more",
    "read_spread": "standard deviation of A_read over tokens",
    "carry_spread": "standard deviation of A_carry over tokens",
    "write_spread": "standard deviation of B over tokens",
    "carry_kept": "mean diagonal of A_carry",
    "carry_mixed": "mean over segments of what A_carry takes from the others",
    "carry_gain_forward_max": "largest sum over sources of the carry product from here to the end",
    "carry_gain_backward_max": "largest sum over destinations of the carry product from here to the end",
    "carry_gain_mean": "mean of the sums of the carry product from here to the end",
    "depth_window": "how many sublayers back this one reads on average",
    "connection_gradient_norm": "gradient norm of all parameters of the connection, before clipping",
}
HISTOGRAMS = {
    "read_coefficients": "A_read, mean over tokens",
    "carry_coefficients": "A_carry, mean over tokens",
    "write_coefficients": "B, mean over tokens",
    "segment_norms": "root mean square of each segment",
}


def per_connection(snapshot: Snapshot) -> dict[str, dict[Place, float]]:
    """Every number of ``PER_CONNECTION`` for every connection."""
    found: dict[str, dict[Place, float]] = {name: {} for name in PER_CONNECTION}
    for depth, chain in snapshot.chains.items():
        gains = carry_gains([connection.carry for connection in chain.values()])
        windows = depth_windows(snapshot.receptive_fields[depth])
        for row, (place, connection) in enumerate(chain.items()):
            values = _of_connection(connection) | dict(zip(_CARRY_GAINS, gains[row].tolist(), strict=True))
            values["connection_gradient_norm"] = snapshot.connection_gradient_norms[place]
            if row > 0:
                values["depth_window"] = windows[row].item()
            for name, value in values.items():
                found[name][place] = value
    return found


def _of_connection(c: ConnectionStatistics) -> dict[str, float]:
    diagonal_N = c.carry.diagonal()
    return {
        "effective_segments": c.effective_segments,
        "independent_segments": c.independent_segments,
        "segment_norm_max": c.segment_norms.max().item(),
        "segment_norm_min": c.segment_norms.min().item(),
        "dynamic_share": c.dynamic_share,
        "gate_saturation": c.gate_saturation,
        "read_spread": _root_mean_square(c.spread[:, : c.m]),
        "carry_spread": _root_mean_square(c.spread[:, c.m : -c.m]),
        "write_spread": _root_mean_square(c.spread[:, -c.m :]),
        "carry_kept": diagonal_N.mean().item(),
        "carry_mixed": ((c.carry.abs().sum() - diagonal_N.abs().sum()) / c.n).item(),
    }


def _root_mean_square(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def scalars(snapshot: Snapshot, values: dict[str, dict[Place, float]]) -> dict[str, float]:
    """By tag.

    Args:
        snapshot: of one step.
        values: ``per_connection`` of it.
    """
    found = {}
    for name, of_place in values.items():
        trunk = [value for place, value in of_place.items() if not place.depth]
        if trunk:
            if not all(map(math.isfinite, trunk)):  # the least and largest of which depend on the order
                trunk = [math.nan]
            found |= {
                f"vwn/{name}/mean": math.fsum(trunk) / len(trunk),
                f"vwn/{name}/min": min(trunk),
                f"vwn/{name}/max": max(trunk),
            }
        found |= {f"vwn_layers/{name}/{place}": value for place, value in of_place.items()}
    norms = snapshot.gradient_norms
    found |= {f"vwn/gradient_norm/{kind}": norm for kind, norm in norms.items()}
    return found | {"vwn/gradient_norm/all": math.hypot(*norms.values())}


def histograms(snapshot: Snapshot) -> dict[str, Tensor]:
    """By tag."""
    found = {}
    for place, connection in snapshot.connections.items():
        tensors = connection.read, connection.carry, connection.write, connection.segment_norms
        found |= {f"vwn_layers/{name}/{place}": t for name, t in zip(HISTOGRAMS, tensors, strict=True)}
    return found
