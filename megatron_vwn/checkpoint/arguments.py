"""What Megatron's arguments of a run say about its model, in the words of a Hugging Face configuration, and back.

And the same arguments as flags, to train a converted checkpoint on by copying a line.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields

import torch

from megatron_vwn.checkpoint.settings import check_config
from megatron_vwn.checkpoint.vocabulary import tokens_of
from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig, VirtualWidthError
from megatron_vwn.hf import VWNConfig
from megatron_vwn.training.flags.machine import needed_flags

# Fields of VWNConfig and the arguments that mean the same.
_SAME = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "qk_layernorm": "qk_layernorm",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "add_qkv_bias",
    "position_embedding_type": "position_embedding_type",
    "max_position_embeddings": "max_position_embeddings",
    "intermediate_size": "ffn_hidden_size",
    "normalization": "normalization",
    "norm_eps": "layernorm_epsilon",
    "fp32_residual_connection": "fp32_residual_connection",
    "initializer_range": "init_method_std",
    "mtp_loss_scaling_factor": "mtp_loss_scaling_factor",
}
_OF_THE_LOSS = ("mtp_loss_scaling_factor",)
# Derived by Megatron from the pattern, which refuses to be told again.
_SAID_BY_THE_PATTERN = ("num_layers", "mtp_num_layers")
VIRTUAL_WIDTH = tuple(f"vwn_{field.name}" for field in fields(VirtualWidthConfig) if field.name not in OF_THE_RUN)
"""Settings that a VWNConfig and Megatron's arguments call the same."""
_SAME_OF_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_gate": "moe_shared_expert_gate",
    "moe_router_score_function": "moe_router_score_function",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor": "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias": "moe_router_enable_expert_bias",
    "moe_router_dtype": "moe_router_dtype",
}
# Arguments that change the function in a way that the Hugging Face model has not, and the value with which they do not.
_WITHOUT_COUNTERPART = {
    "spec": None,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "qk_l2_norm": False,
    "experimental_attention_variant": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "moe_router_num_groups": None,
    # Random or biased routing, for measurements of speed.
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    # Rows of gate and up in turn, in blocks of so many.
    "moe_mlp_glu_interleave_size": None,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "mtp_use_repeated_layer": False,
    "use_mup": False,
}
# Not among them, because a model in use does without: dropout, moe_input_jitter_eps, and moe_expert_capacity_factor,
# with which a token's experts would depend on the other tokens of its batch. Losses, precision and kernels (fp8,
# attention_softmax_in_fp32, apply_query_key_layer_scaling, ...) do not change what is computed, mtp_detach_heads only
# what is trained; heterogeneous and relative layers and use_rope_scaling are read by other models than a HybridModel.
_NO_SUCH_ROUTING = {
    "sinkhorn": "looks at a whole batch",
    "quantile_balancing": "chooses experts by thresholds that are no part of the model",
}


def hf_config(args: argparse.Namespace) -> VWNConfig:
    """The Hugging Face configuration of the model that was trained with Megatron's arguments.

    Raises:
        VirtualWidthError: for a model without a virtual width or one that the Hugging Face model cannot express.
    """
    if getattr(args, "vwn_m", None) is None:
        raise VirtualWidthError(
            "the checkpoint was trained without a virtual width: give it one with vwn-widen, or convert it with the "
            "tools for ordinary models."
        )
    # A checkpoint may be older than the latest of these settings.
    width = {name: getattr(args, name) for name in VIRTUAL_WIDTH if hasattr(args, name)}
    return valid_config("the checkpoint", **backbone(args), **width)


def backbone(args: argparse.Namespace) -> dict[str, object]:
    """The fields of a VWNConfig that describe the backbone and its head.

    Raises:
        VirtualWidthError: for a model that the Hugging Face model cannot express.
    """
    try:
        return _backbone(args)
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, VirtualWidthError):
            raise
        raise VirtualWidthError(
            "the checkpoint's arguments of its run lack some of the model's, or have values of another kind: give one "
            "that megatron_vwn.training.pretrain saved."
        ) from error


def _backbone(args: argparse.Namespace) -> dict[str, object]:
    for name, harmless in _WITHOUT_COUNTERPART.items():
        if getattr(args, name, harmless) not in (harmless, None):
            raise VirtualWidthError(
                f"the run used --{name.replace('_', '-')} {getattr(args, name)}, which the Hugging Face model does not "
                "have: this checkpoint cannot be converted."
            )
    balancing = args.moe_router_load_balancing_type
    for name in balancing if isinstance(balancing, list) else [balancing]:
        if args.num_experts and name in _NO_SUCH_ROUTING:
            raise VirtualWidthError(
                f"{name} routing {_NO_SUCH_ROUTING[name]}, which the Hugging Face model has not: this checkpoint "
                "cannot be converted."
            )
    if not (args.hybrid_layer_pattern or args.hybrid_override_pattern) or not args.padded_vocab_size:
        raise VirtualWidthError(
            "the run was no HybridModel's (it has no layer pattern or no vocabulary size): train with "
            "megatron_vwn.training.pretrain."
        )
    pattern, *further = (args.hybrid_layer_pattern or args.hybrid_override_pattern).replace("|", "").split("/")
    if len(set(further)) > 1:
        raise VirtualWidthError(
            f"the further predictions {'/'.join(further)} differ, which the Hugging Face model's do not: this "
            "checkpoint cannot be converted."
        )
    # What weighs a loss is no part of the function: where it is not said, it is the default.
    said = {field: name for field, name in _SAME.items() if field not in _OF_THE_LOSS or hasattr(args, name)}
    model = {field: getattr(args, name) for field, name in said.items()}
    if args.num_experts:
        model |= {field: getattr(args, name) for field, name in _SAME_OF_EXPERTS.items()}
        model["shared_expert_intermediate_size"] = args.moe_shared_expert_intermediate_size or 0
    act, gated = _activation(args)
    return model | {
        "vocab_size": tokens_of(args),
        "hybrid_pattern": pattern,
        "num_mtp_layers": len(further),
        "mtp_hybrid_pattern": further[0] if further else "",
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        "hidden_act": act,
        "gated_mlp": gated,
        "rope_parameters": _rope(args),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        **_window(args, pattern, further),
    }


def megatron_arguments(config: VWNConfig) -> dict[str, object]:
    """The arguments of Megatron that mean the model of a Hugging Face configuration.

    Raises:
        VirtualWidthError: for a model that Megatron cannot express.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise VirtualWidthError(
            f"Megatron's HybridModel has no {rope['rope_type']} rotary embedding: only models with the plain one fit."
        )
    theta = rope.get("rope_theta", VWNConfig.default_theta)
    if theta != int(theta):
        raise VirtualWidthError(f"Megatron's --rotary-base is a whole number, and rope_theta {theta} is none.")
    further = f"/{config.mtp_hybrid_pattern}" * config.num_mtp_layers
    arguments = {name: getattr(config, field) for field, name in _SAME.items()}
    if config.num_experts:
        arguments |= {name: getattr(config, field) for field, name in _SAME_OF_EXPERTS.items()}
        arguments["moe_shared_expert_intermediate_size"] = config.shared_expert_intermediate_size or None
    return arguments | {
        **{name: getattr(config, name) for name in VIRTUAL_WIDTH},
        "vwn_ngrams": tuple(config.vwn_ngrams),
        "hybrid_layer_pattern": config.hybrid_pattern + further,
        "num_layers": len(config.hybrid_pattern),
        "mtp_num_layers": config.num_mtp_layers or None,
        "padded_vocab_size": config.vocab_size,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "swiglu": config.gated_mlp,
        **_activation_flags(config),
        "rotary_base": int(theta),
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        **_window_flags(config),
    }


def valid_config(where: object, **settings) -> VWNConfig:
    """A VWNConfig, whose refusals are VirtualWidthErrors.

    Args:
        where: the settings come from, for the sentence.
        settings: the fields.
    """
    check_config(settings, where)
    try:
        return VWNConfig(**settings)
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise VirtualWidthError(f"{where} describes no model: {reason}.") from error
    except Exception as error:  # whatever settings of transformers provoke
        raise VirtualWidthError(f"{where} describes no model that transformers knows: correct it.") from error


def _activation(args: argparse.Namespace) -> tuple[str, bool]:
    """Name of the activation, and whether it gates."""
    if args.swiglu:
        return "silu", True
    if args.squared_relu:
        return "relu2", False
    if getattr(args, "use_te_activation_func", False):
        # Without a warning its gelu is the approximation by tanh, with biases or not.
        return "gelu_pytorch_tanh", False
    # Megatron's fused bias and gelu is that approximation too; it fuses only where there is a bias.
    return ("gelu_pytorch_tanh" if args.bias_gelu_fusion and args.add_bias_linear else "gelu"), False


def _activation_flags(config: VWNConfig) -> dict[str, object]:
    known = {("silu", True), ("relu2", False), ("gelu", False)}
    if config.add_bias_linear:
        known |= {("gelu_pytorch_tanh", False)}
    if (config.hidden_act, config.gated_mlp) not in known:
        gated = "a gated" if config.gated_mlp else "an ungated"
        raise VirtualWidthError(
            f"Megatron has no MLP with {gated} {config.hidden_act}: only SwiGLU, relu2, gelu and, with biases, "
            "gelu_pytorch_tanh."
        )
    return {
        "squared_relu": config.hidden_act == "relu2",
        "bias_gelu_fusion": config.hidden_act == "gelu_pytorch_tanh",
    }


def _rope(args: argparse.Namespace) -> dict[str, object]:
    """Megatron's --use-rope-scaling is not read by a HybridModel."""
    return {
        "rope_type": "default",
        "rope_theta": float(args.rotary_base),
        "partial_rotary_factor": args.rotary_percent,
    }


def _window(args: argparse.Namespace, pattern: str, further: list[str]) -> dict[str, object]:
    """Which attentions see only so many tokens back; Megatron counts all sublayers, from one."""
    if args.window_size is None:
        return {}
    left, right = args.window_size
    if left < 0 or right != 0:
        raise VirtualWidthError(
            f"--window-size {left},{right} is no causal window: this checkpoint cannot be converted."
        )
    skip = args.window_attn_skip_freq
    if skip is not None and "*" in "".join(further):
        raise VirtualWidthError(
            "--window-attn-skip-freq gives attention of further predictions a rule of their own, which the Hugging "
            "Face model does not have: this checkpoint cannot be converted."
        )
    if isinstance(skip, list) and len(skip) < len(pattern):
        raise VirtualWidthError(
            f"--window-attn-skip-freq says something of {len(skip)} sublayers, and the model has {len(pattern)}: this "
            "checkpoint cannot be converted."
        )
    attentions = [match.start() + 1 for match in re.finditer(r"\*", pattern)]
    everything = [_sees_everything(number, skip) for number in attentions]
    return {
        "sliding_window": left + 1,
        "layer_types": ["full_attention" if all_ else "sliding_attention" for all_ in everything],
    }


def _sees_everything(layer_number: int, skip_freq: int | list[int] | None) -> bool:
    if skip_freq is None:
        return False
    if isinstance(skip_freq, int):
        return layer_number % skip_freq == 0
    return not skip_freq[layer_number - 1]


def _window_flags(config: VWNConfig) -> dict[str, object]:
    if "sliding_attention" not in config.layer_types:
        return {"window_size": None, "window_attn_skip_freq": None}
    kinds = iter(config.layer_types)
    # One entry per sublayer; those that are no attention do not look.
    windows = [int(symbol == "*" and next(kinds) == "sliding_attention") for symbol in config.hybrid_pattern]
    skip = None if "full_attention" not in config.layer_types else windows
    return {"window_size": (config.sliding_window - 1, 0), "window_attn_skip_freq": skip}


def backend_here() -> str:
    """The ``--transformer-impl`` that a training chooses on this machine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    needed = needed_flags(gpu=torch.cuda.is_available(), transformer_engine=HAVE_TE)
    return next((each.value for each in needed if each.flag == "--transformer-impl"), "transformer_engine")


def command_line(arguments: Mapping[str, object]) -> list[str]:
    """The flags that make Megatron's parser return these arguments: what differs from its defaults, and no more.

    The backend is typed in any case: tensors are named for it, and a training may choose another one by itself.

    Args:
        arguments: values by the names of parsed arguments, such as ``megatron_arguments`` gives; without
            ``--group-query-attention`` and biases, what Megatron derives from their absence is left out.
    """
    # Here, because only training on needs the parser, and importing it imports all of Megatron.
    from megatron_vwn.training.flags.defaults import megatron_parser
    from megatron_vwn.training.flags.vwn import add_arguments

    parser = add_arguments(megatron_parser())
    wanted = {name: value for name, value in arguments.items() if name not in _SAID_BY_THE_PATTERN}
    if not wanted.get("group_query_attention"):
        wanted.pop("num_query_groups", None)
    if wanted.get("swiglu") or wanted.get("squared_relu") or not wanted.get("add_bias_linear", True):
        wanted.pop("bias_gelu_fusion", None)
    words, said = [], set()
    for action in parser._actions:
        name = action.dest
        by_default = wanted.get(name) in (action.default, None, ()) and name != "transformer_impl"
        if name in said or name not in wanted or by_default:
            continue
        said.add(name)
        words += _typed(action, wanted[name])
    return words


def _typed(action: argparse.Action, value: object) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else next(each for each in action.option_strings if each.startswith("--no-"))]
    if action.nargs == 0:  # a switch, whose presence sets the other value than its default
        return [flag]
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(str, value)]
    if isinstance(value, list):
        return [flag, f"[{','.join(map(str, value))}]"]  # Megatron evaluates it as an expression
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]
