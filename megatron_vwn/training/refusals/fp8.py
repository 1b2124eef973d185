"""What FP8 needs of machine, packages and shapes. Transformer Engine says it too, but in the first forward pass."""

import argparse
from collections.abc import Callable
from dataclasses import fields

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.utils import is_te_min_version

from megatron_vwn.training.refusals.layers import pattern_of

Args = argparse.Namespace


def _compute_capability(recipe: Fp8Recipe) -> tuple[int, int]:
    """The least for which Transformer Engine multiplies with this recipe's scales."""
    return {Fp8Recipe.mxfp8: (10, 0), Fp8Recipe.blockwise: (9, 0)}.get(recipe, (8, 9))


def _no_gpu_for(recipe: Fp8Recipe) -> Callable[[Args], bool]:
    def applies(args: Args) -> bool:
        if not args.fp8 or args.fp8_recipe != recipe:
            return False
        return torch.cuda.get_device_capability() < _compute_capability(recipe)

    return applies


def _needs_gpu(recipe: Fp8Recipe) -> tuple[Callable[[Args], bool], str]:
    major, minor = _compute_capability(recipe)
    return (
        _no_gpu_for(recipe),
        f"--fp8-recipe {recipe.value} needs a GPU of compute capability {major}.{minor} or later, and there is none "
        "here: drop --fp8-format or train elsewhere.",
    )


def _weight_gradients_stay(args: Args) -> bool:
    """Whether Transformer Engine would compute weight gradients in FP8 although the flag says no."""
    if not args.fp8 or args.fp8_wgrad:
        return False
    from transformer_engine.common.recipe import DelayedScaling

    heard = any(field.name == "override_linear_precision" for field in fields(DelayedScaling))
    return args.fp8_recipe != Fp8Recipe.delayed or not heard


def _alignment(args: Args) -> int:
    return get_fp8_align_size(args.fp8_recipe)


def _tokens_do_not_divide(args: Args) -> bool:
    """A product has all tokens of a context-parallel rank as its longest sum, and under sequence parallelism a
    tensor-parallel rank's share of them as rows."""
    if not args.fp8 or not args.seq_length or not args.micro_batch_size:
        return False
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    rows = tokens // args.tensor_model_parallel_size if args.sequence_parallel else tokens
    return tokens % _alignment(args) != 0 or rows % (32 if args.fp8_recipe == Fp8Recipe.mxfp8 else 8) != 0


def _width_that_does_not_divide(args: Args) -> bool:
    if not args.fp8 or args.hidden_size is None:
        return False
    tensor_parallel = args.tensor_model_parallel_size
    expert_parallel = args.expert_tensor_parallel_size or tensor_parallel
    widths = (
        (args.hidden_size, 1),
        (args.ffn_hidden_size, tensor_parallel),
        (args.moe_ffn_hidden_size, expert_parallel),
        (args.moe_shared_expert_intermediate_size, tensor_parallel),
    )
    return any(width and width // ranks % _alignment(args) for width, ranks in widths)


def _recomputes_further_predictions_with_histories(args: Args) -> bool:
    delayed = args.fp8 and args.fp8_recipe == Fp8Recipe.delayed
    return delayed and args.recompute_granularity == "full" and Symbols.MTP_SEPARATOR in pattern_of(args)


# Whether a rule applies to parsed (not yet validated) flags, and the sentence that is then printed.
FP8_RULES: tuple[tuple[Callable[[Args], object], str], ...] = (
    (
        lambda args: args.fp8 and not HAVE_TE,
        "--fp8-format needs Transformer Engine, which is not installed here: install the extra te or drop it.",
    ),
    *(_needs_gpu(recipe) for recipe in Fp8Recipe),
    (
        lambda args: not args.fp8 and args.fp8_recipe != Fp8Recipe.delayed,
        "--fp8-recipe says how --fp8-format scales, which is not given: add it or drop --fp8-recipe.",
    ),
    (
        lambda args: args.first_last_layers_bf16 and not (args.fp8 or args.fp4),
        "--first-last-layers-bf16 leaves layers out of --fp8-format or --fp4-format, of which none is given: add one "
        "or drop it.",
    ),
    (
        lambda args: (
            not args.first_last_layers_bf16
            and (args.num_layers_at_start_in_bf16, args.num_layers_at_end_in_bf16) != (1, 1)
        ),
        "--num-layers-at-start-in-bf16 and --num-layers-at-end-in-bf16 mean nothing without --first-last-layers-bf16: "
        "add it or drop them.",
    ),
    (
        lambda args: args.fp8 and args.fp8_recipe == Fp8Recipe.delayed and args.first_last_layers_bf16,
        "--fp8-recipe delayed cannot leave layers out: drop --first-last-layers-bf16 or choose --fp8-recipe tensorwise "
        "or blockwise.",
    ),
    (
        _recomputes_further_predictions_with_histories,
        "--fp8-recipe delayed with --recompute-granularity full and further predictions (/ in the pattern) gets other "
        "gradients than without recompute, in Megatron itself: choose --fp8-recipe tensorwise or blockwise, or drop "
        "the recompute.",
    ),
    # The ends of the stream take current scales, which came with this release, wherever others have histories.
    (
        lambda args: args.fp8 and args.vwn_m is not None and not is_te_min_version("2.2.0"),
        "--fp8-format with a virtual width needs Transformer Engine 2.2 or later: upgrade it or drop the flag.",
    ),
    (
        _weight_gradients_stay,
        "--no-fp8-wgrad is not heard by this recipe of the installed Transformer Engine: drop it.",
    ),
    (
        _tokens_do_not_divide,
        "FP8 multiplies tokens in blocks of 16 (mxfp8: 32) per context-parallel rank, and of 8 (mxfp8: 32) per "
        "tensor-parallel rank under sequence parallelism: change --seq-length, --micro-batch-size or the layout.",
    ),
    (
        _width_that_does_not_divide,
        "FP8 multiplies channels in blocks of 16 (mxfp8: 32) on every tensor-parallel rank: change --hidden-size, "
        "--ffn-hidden-size, --moe-ffn-hidden-size, --moe-shared-expert-intermediate-size or the layout.",
    ),
)
