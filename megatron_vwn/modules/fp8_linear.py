"""FP8 for the two ends of the stream: the products with W_expand and W_reduce, by Transformer Engine's linear layer.

Megatron's FP8 region covers sublayers only, and these products lie before and behind it, so each enters a region of its
own. The weight stays a parameter of this package, in the model's dtype, with its name, its three dimensions and its
partition: Transformer Engine quantizes it anew in every pass, whatever --fp8-param-gather says of other weights. What
is no product stays as it is: tiling, averaging, connections, norms, and the fusion of further predictions, whose map
[2E -> E] is small.

With --fp8-recipe delayed the two ends take their scales from the tensors themselves (current scaling, which Megatron
calls tensorwise). A history would begin with weights of zero, which have no scale, and the first updates would be
rounded to nothing; and it would be one more thing in checkpoints, which now are the same with and without FP8.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context, is_first_last_bf16_layer
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import log_single_rank
from torch import Tensor

logger = logging.getLogger(__name__)


class Fp8Linear:
    """x W^T in FP8, forward and backward, for a weight that belongs to somebody else.

    Not a module, so that what Transformer Engine keeps is in no state dict and no optimizer.

    Args:
        config: the backbone's config, with ``fp8``.
        in_features: columns of the weight on this rank.
        out_features: rows of the weight on this rank.
    """

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int):
        import transformer_engine.pytorch as te

        self.alignment = get_fp8_align_size(config.fp8_recipe)
        self.delayed = config.fp8_recipe == Fp8Recipe.delayed
        self._config = copy.copy(config)
        if self.delayed:
            self._config.fp8_recipe = Fp8Recipe.tensorwise
        # Further predictions are built where Megatron makes weights in FP8; this one is a mere placeholder.
        with te.fp8_model_init(enabled=False):
            self._linear = te.Linear(
                in_features, out_features, bias=False, params_dtype=config.params_dtype, device="meta"
            )

    def __call__(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """[..., I] and [O, I], both in the model's dtype, to [..., O] in that dtype."""
        x_TI = x.flatten(0, -2)
        tokens = x_TI.shape[0]
        # Rows of zeros change neither a scale nor a gradient.
        x_TI = torch.nn.functional.pad(x_TI, (0, 0, 0, -tokens % self.alignment))
        with self._region():
            out_TO = torch.func.functional_call(self._linear, {"weight": weight_OI}, (x_TI,))
        return out_TO[:tokens].view(*x.shape[:-1], -1)

    @contextmanager
    def _region(self) -> Iterator[None]:
        if not self.delayed:
            with get_fp8_context(self._config):
                yield
            return
        # What leaves an outermost FP8 region, and the backward pass of the first layer in it, reduces the sublayers'
        # amax histories over ranks and moves them on by one: once for the sublayers' own region, and not for this one.
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        with te.fp8_autocast(enabled=False), get_fp8_context(self._config):
            FP8GlobalStateManager.is_first_fp8_module()  # true for the first caller only
            yield


def fp8_linear(
    config: TransformerConfig, in_features: int, out_features: int, *, end: Literal["first", "last"]
) -> Fp8Linear | None:
    """The FP8 product of one end of the stream, None where it is computed in the model's dtype.

    That is without --fp8-format; where --first-last-layers-bf16 leaves the sublayers beside it in bf16, the first for
    W_expand and the last for W_reduce (those of further predictions too, whose sublayers Megatron always computes in
    FP8); and, said once, where a rank's part of the weight does not divide as FP8 products need it.

    Args:
        config: the backbone's config.
        in_features: columns of the weight on this rank.
        out_features: rows of the weight on this rank.
        end: which end.
    """
    if not config.fp8 or not HAVE_TE or config.transformer_impl == "local":
        return None
    if is_first_last_bf16_layer(config, 0 if end == "first" else config.num_layers - 1):
        return None
    alignment = get_fp8_align_size(config.fp8_recipe)
    if in_features % alignment or out_features % alignment:
        log_single_rank(
            logger,
            logging.WARNING,
            f"W_{'expand' if end == 'first' else 'reduce'} stays out of FP8: {out_features} x {in_features} on each "
            f"rank are no multiples of {alignment}.",
        )
        return None
    return Fp8Linear(config, in_features, out_features)


def product(x: Tensor, weight_OI: Tensor, fp8: Fp8Linear | None) -> Tensor:
    """x [..., I] times the transposed weight [O, I], in FP8 if that is given."""
    return x @ weight_OI.T if fp8 is None else fp8(x, weight_OI)
