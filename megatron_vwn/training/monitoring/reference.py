"""What numbers are in a model that has just been made, and what they are at most: lines to read a chart by."""

from megatron_vwn.config import VirtualWidthConfig


def fresh_window(place: int) -> float:
    """Depth window of a sublayer, by its place counted from one: it reads all outputs before it alike."""
    return place / 2


def at_birth(virtual_width: VirtualWidthConfig, layers: int) -> dict[str, float]:
    """Values of a fresh model, by name, as far as they do not depend on what is drawn.

    Segments are then copies of the first m, unless the embedding is as wide as the stream or has n-grams: such segments
    are independent before the first sublayer, and less so the more sublayers have written copies to them.

    Args:
        virtual_width: of the run.
        layers: connections of the trunk.
    """
    m, n = virtual_width.m, virtual_width.n
    known = {
        "dynamic_share": 0.0,
        "gate_saturation": 0.0,
        "carry_kept": 1.0,
        "carry_mixed": 0.0,
        "carry_gain_forward_max": 1.0,
        "carry_gain_backward_max": 1.0,
        "depth_window": sum(map(fresh_window, range(2, layers + 1))) / max(1, layers - 1),
    }
    if virtual_width.embedding != "wide" and not virtual_width.ngrams:
        copies = [len(range(first, n, m)) for first in range(m)]
        known |= {"effective_segments": float(n), "independent_segments": n**2 / sum(count**2 for count in copies)}
    return known


def reference_scalars(virtual_width: VirtualWidthConfig, layers: int) -> dict[str, float]:
    """By tag, the same in every step: ``vwn/NAME/birth``, and ``vwn/NAME/n`` of what counts segments."""
    most = {f"vwn/{name}/n": float(virtual_width.n) for name in ("effective_segments", "independent_segments")}
    return most | {f"vwn/{name}/birth": value for name, value in at_birth(virtual_width, layers).items()}
