"""Kinds of recompute that a search tries: Megatron's, whole or of some modules, and that of the stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_vwn.ops.costs import best_block
from megatron_vwn.planner.shape import Shape

# Keys of a recipe that say something of recompute, with what they are without any.
NO_RECOMPUTE = {
    "recompute-granularity": None,
    "recompute-method": None,
    "recompute-num-layers": None,
    "recompute-modules": None,
}


@dataclass(frozen=True)
class Recompute:
    """One kind; the names are those of ``Shape``."""

    granularity: str = ""
    method: str = ""
    recompute_layers: int = 1
    modules: tuple[str, ...] = ("core_attn",)
    block: int | None = None

    def flags(self) -> dict[str, object]:
        """As keys of a recipe."""
        flags: dict[str, object] = {"recompute-granularity": self.granularity or None}
        if self.granularity == "full":
            flags |= {"recompute-method": self.method, "recompute-num-layers": self.recompute_layers}
        elif self.granularity == "selective":
            flags["recompute-modules"] = list(self.modules)
        return flags | ({"vwn-recompute-block": self.block} if self.block else {})


def kinds(shape: Shape, *, grouped: bool) -> Iterator[Recompute]:
    """Kinds that are worth a look in a layout, nothing first.

    The core of attention is not among the modules, because FlashAttention keeps next to nothing of it; nor are several
    sublayers at a time where further tokens are predicted, which Megatron recomputes one by one.

    Args:
        shape: the layout.
        grouped: whether experts are grouped, without which Megatron does not recompute their activation functions.
    """
    longest = max(map(len, (*shape.stages, *shape.predictions)))
    blocks = [None, *sorted({2, 4, best_block(longest)} - {1})] if shape.width else [None]
    modules: list[tuple[str, ...]] = [()]
    if shape.experts:
        # Only experts have a norm that is no part of a product.
        parts = [("layernorm",), ("moe_act",), ("layernorm", "moe_act")] if grouped else [("layernorm",)]
        if shape.shared_ffn and not shape.overlaps_shared:  # whose recompute Megatron does not overlap
            parts.append((*parts[-1], "shared_experts"))
        modules += [*parts, ("mlp", "moe")]
    else:
        modules.append(("mlp",))
    for chosen, block in product(modules, blocks):
        yield Recompute("selective", modules=chosen, block=block) if chosen else Recompute(block=block)
    yield Recompute("full", "uniform", 1)
    if not shape.predictions and longest > 1:
        yield Recompute("full", "uniform", 2)
