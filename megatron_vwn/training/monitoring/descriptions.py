"""What every tag means, in words: TensorBoard shows them behind the (i) of a card."""

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.training.monitoring.reference import at_birth
from megatron_vwn.training.monitoring.scalars import HISTOGRAMS, PER_CONNECTION
from megatron_vwn.training.monitoring.snapshot import Snapshot

_GRADIENTS = {
    "all": "all parameters of the virtual width",
    "routing": "the static coefficients of all connections",
    "scale": "the scales of their dynamic part",
    "weight": "the matrices that make coefficients of tokens",
    "norm": "the norms before these",
    "expand": "W_expand of the embedding",
    "reduce": "W_reduce before the head",
    "fusion": "what joins stream and embedding for further predictions",
    "ngrams": "the tables of n-grams",
}
_IMAGES = {
    "routing": "A_read | A_carry | B of every connection, means over tokens: blue -1, white 0, red 1.",
    "routing_static": "The same without the part that depends on the token.",
    "routing_spread": "Standard deviation over tokens of the same.",
    "segment_norms": "Root mean square of every segment before every sublayer, over the mean of that layer.",
    "depth_receptive_field": "How much each sublayer (row) reads of what each earlier one (column) wrote; column 0 is "
    "the embedding; 1 is an ordinary residual connection.",
}
_OVER = {"mean": "Mean over the trunk's connections", "min": "Least of them", "max": "Largest of them"}


class Descriptions:
    """Of the tags of one run.

    Args:
        virtual_width: of the run.
        snapshot: any of its steps.
    """

    def __init__(self, virtual_width: VirtualWidthConfig, snapshot: Snapshot):
        layers = len(snapshot.chains[0])
        self._birth = at_birth(virtual_width, layers)
        self._stream = f"(m, n) = ({virtual_width.m}, {virtual_width.n}), {layers} connections"

    def of(self, tag: str) -> str:
        """The description of a tag; every tag that monitoring writes has one."""
        family, name, *rest = tag.split("/")
        (which,) = rest or ("",)
        if family == "vwn" and not rest:
            return f"{_IMAGES[name.partition('_mtp_')[0]]} {self._stream}."
        if name == "gradient_norm":
            return f"Gradient norm of {_GRADIENTS[which]}, before clipping."
        what = {**PER_CONNECTION, **HISTOGRAMS}[name]
        if which == "n":
            return f"The number of segments n, which {name} cannot exceed: {what}. {self._stream}."
        if which == "birth":
            return f"What {name} is in a model that has just been made: {what}. {self._stream}."
        place = _OVER.get(which) or _spoken(which)
        birth = f" {self._birth[name]:g} in a model that has just been made." if name in self._birth else ""
        return f"{place}: {what}.{birth} {self._stream}."


def _spoken(place: str) -> str:
    """layer_003 and mtp_1_layer_003 in words."""
    further, _, number = place.rpartition("layer_")
    where = f" of further prediction {further.strip('mtp_')}" if further else ""
    return f"Layer {int(number)}{where}, by its place in --hybrid-layer-pattern"
