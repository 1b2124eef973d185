"""Which sublayers can run: rules about the hybrid pattern and the kinds of attention, for every model."""

import argparse
from collections.abc import Callable

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.gated_delta_net.common import HAVE_FLA
from megatron.core.ssm.mamba_mixer import HAVE_MAMBA_SSM
from megatron.core.transformer.moe.fused_a2a import HAVE_DEEP_EP, HAVE_HYBRIDEP, HAVE_TE_EP
from megatron.core.transformer.moe.moe_utils import fused_topk_with_score_function

Args = argparse.Namespace
_LATENT = {Symbols.MLA, Symbols.DS_ATTENTION}
_NEEDS_SEQUENCE_PARALLEL = {
    Symbols.MLA: "latent attention layers",
    Symbols.DS_ATTENTION: "sparse attention layers",
    Symbols.GDN: "gated delta nets",
    Symbols.MOE: "experts",
}
_LOCAL_SYMBOLS = {Symbols.ATTENTION, Symbols.MLA, Symbols.MLP, Symbols.MOE, Symbols.PIPE, Symbols.MTP_SEPARATOR}
# Recomputed without keeping their output, for which Megatron asks Transformer Engine whether fp8 is on.
_RECOMPUTED_WITHOUT_OUTPUT = {"layernorm", "moe_act", "mla_up_proj"}


def pattern_of(args: Args) -> str:
    """The hybrid pattern, under either of its flags."""
    return args.hybrid_layer_pattern or args.hybrid_override_pattern or ""


def _is_local(args: Args) -> bool:
    return args.transformer_impl == "local"


def _has_latent_attention(args: Args) -> bool:
    return bool(_LATENT & set(pattern_of(args)))


def _without_sequence_parallel(args: Args) -> bool:
    return args.tensor_model_parallel_size > 1 and not args.sequence_parallel


def _lacks_dispatcher(args: Args) -> bool:
    """Whether experts would send by a package that is not installed."""
    if args.moe_token_dispatcher_type != "flex" or Symbols.MOE not in pattern_of(args):
        return False
    backends = {"deepep": HAVE_DEEP_EP, "hybridep": HAVE_HYBRIDEP, "ncclep": HAVE_TE_EP}
    return not backends.get(args.moe_flex_dispatcher_backend, False)


def _looks_elsewhere(window: tuple[int, ...] | None) -> bool:
    """A window that Megatron's local mask takes for one into the future, or for none."""
    return window is not None and not (len(window) == 2 and window[0] >= 0 == window[1])


# Whether a rule applies to parsed (not yet validated) flags, and the sentence that is then printed.
LAYER_RULES: tuple[tuple[Callable[[Args], object], str], ...] = (
    # Megatron's local layers would take an identity in place of every other kind of sublayer, without a word.
    (
        lambda args: _is_local(args) and set(pattern_of(args)) - _LOCAL_SYMBOLS,
        "--transformer-impl local has only the sublayers * (attention), + (latent attention), - (MLP) and E (experts): "
        "change --hybrid-layer-pattern or install Transformer Engine.",
    ),
    (
        lambda args: Symbols.MAMBA in pattern_of(args) and not HAVE_MAMBA_SSM,
        "the sublayer M (Mamba) needs the package mamba-ssm: install it or change --hybrid-layer-pattern.",
    ),
    (
        lambda args: Symbols.GDN in pattern_of(args) and not HAVE_FLA,
        "the sublayer G (gated delta net) needs the package flash-linear-attention: install it or change "
        "--hybrid-layer-pattern.",
    ),
    # Megatron then gives ordinary attention no rotary positions.
    (
        lambda args: args.multi_latent_attention and not _has_latent_attention(args),
        "--multi-latent-attention is written into --hybrid-layer-pattern, as + in place of *: do so or drop it.",
    ),
    # Megatron stops for experts; in the others the heads of all ranks share a norm or a part of the keys, of which
    # Megatron leaves each rank the gradient of its own heads only.
    *(
        (
            lambda args, symbol=symbol: symbol in pattern_of(args) and _without_sequence_parallel(args),
            f"{layers} under tensor parallelism need --sequence-parallel: add it.",
        )
        for symbol, layers in _NEEDS_SEQUENCE_PARALLEL.items()
    ),
    (
        lambda args: _is_local(args) and _has_latent_attention(args) and args.qk_layernorm and args.q_lora_rank is None,
        "--qk-layernorm finds no query latent in local latent attention: add --q-lora-rank or drop it.",
    ),
    (
        lambda args: _is_local(args) and args.mla_down_proj_fusion,
        "--mla-down-proj-fusion needs Transformer Engine, which --transformer-impl local does not use: drop it.",
    ),
    (
        lambda args: _is_local(args) and _looks_elsewhere(args.window_size),
        "--window-size of --transformer-impl local is LEFT,0, as in 1023,0: give that.",
    ),
    # Megatron's fused softmax kernel knows no window and would compute full attention.
    (
        lambda args: _is_local(args) and args.window_size and args.masked_softmax_fusion,
        "--window-size needs the unfused softmax of --transformer-impl local: add --no-masked-softmax-fusion.",
    ),
    (
        lambda args: (
            _is_local(args) and args.group_query_attention and args.num_query_groups % args.tensor_model_parallel_size
        ),
        "--transformer-impl local cannot share a query group between tensor-parallel ranks: make --num-query-groups a "
        "multiple of --tensor-model-parallel-size.",
    ),
    (
        lambda args: (
            _is_local(args)
            and args.context_parallel_size > 1
            and {Symbols.ATTENTION, Symbols.MLA} & set(pattern_of(args))
        ),
        "attention under context parallelism needs Transformer Engine, which --transformer-impl local does not use: "
        "drop --context-parallel-size.",
    ),
    (
        lambda args: _is_local(args) and Symbols.MOE in pattern_of(args) and args.add_bias_linear,
        "--transformer-impl local cannot train experts with biases: add --disable-bias-linear.",
    ),
    # Both end in a traceback of Megatron's, the first only in step 1.
    (
        lambda args: args.moe_router_fusion and fused_topk_with_score_function is None,
        "--moe-router-fusion needs Transformer Engine 2.6 or later: install it, or drop the flag.",
    ),
    (
        _lacks_dispatcher,
        "--moe-token-dispatcher-type flex finds no package of its --moe-flex-dispatcher-backend (deepep: deep_ep): "
        "install it, or give alltoall.",
    ),
    (
        lambda args: not HAVE_TE and _RECOMPUTED_WITHOUT_OUTPUT & set(args.recompute_modules or ()),
        "--recompute-modules layernorm, moe_act and mla_up_proj need Transformer Engine: leave them out.",
    ),
)
