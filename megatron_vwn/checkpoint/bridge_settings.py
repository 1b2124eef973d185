"""A Hugging Face configuration as settings of a Megatron-Bridge provider, and back; nothing of Bridge is needed.

The way to the provider is ``arguments.megatron_arguments``, in the provider's words; the way back is
``arguments.hf_config``. A field is carried if it comes back: every other one is refused, of this version or of another.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from megatron.core.activations import squared_relu
from transformers import PreTrainedConfig

from megatron_vwn.checkpoint.arguments import hf_config, megatron_arguments, valid_config
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig

# Arguments of Megatron that a provider calls otherwise.
_CALLED = {
    "num_experts": "num_moe_experts",
    "padded_vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
}
# Fields of a VWNConfig that no argument is made of, because a model in use does without.
_OF_TRAINING = {"attention_dropout": "attention_dropout", "router_aux_loss_coef": "moe_aux_loss_coeff"}
OF_HUGGING_FACE = (
    *("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "output_router_logits", "output_wide_hidden_states", "output_hidden_states", "output_attentions"),
)
"""Settings that say where a configuration comes from or how transformers runs the model; ``dtype`` a provider has."""
_ACTIVATIONS = {"silu": torch.nn.functional.silu, "relu2": squared_relu}


@contextmanager
def megatron_bridge_needed() -> Iterator[None]:
    """For imports of Megatron-Bridge.

    Raises:
        VirtualWidthError: where one fails.
    """
    try:
        yield
    except ImportError as error:
        raise VirtualWidthError(
            f"Megatron-Bridge cannot be imported ({error}): install megatron-bridge and what it needs, or use "
            "vwn-convert."
        ) from error


def known_config(settings: PreTrainedConfig, where: object) -> VWNConfig:
    """A configuration as this version's class, whatever class (of a folder's own code, too) it was read with.

    Args:
        settings: the configuration.
        where: it comes from, for sentences.

    Raises:
        VirtualWidthError: for settings that no model can have.
    """
    found = settings.to_dict()
    return valid_config(where, **{name: value for name, value in found.items() if name != "model_type"})


def provider_settings(config: VWNConfig) -> dict[str, object]:
    """The settings of a provider that mean the model of a configuration, by the names of the provider's fields.

    Raises:
        VirtualWidthError: for a model that Megatron cannot express.
    """
    said = megatron_arguments(config)
    # A provider counts layers by the pattern, and always has the number of key-value heads.
    for name in ("num_layers", "group_query_attention", "squared_relu"):
        del said[name]
    gated, tanh, untied = (
        said.pop(name) for name in ("swiglu", "bias_gelu_fusion", "untie_embeddings_and_output_weights")
    )
    return {_CALLED.get(name, name): value for name, value in said.items()} | {
        "share_embeddings_and_output_weights": not untied,
        "gated_linear_unit": gated,
        "activation_func": _ACTIVATIONS.get(config.hidden_act, torch.nn.functional.gelu),
        # Megatron's fused bias and gelu is the approximation by tanh; its fused SwiGLU is exact.
        "bias_activation_fusion": gated or tanh,
        "is_hybrid_model": True,
        "hidden_dropout": 0.0,
        "params_dtype": config.dtype or torch.float32,
        "bf16": config.dtype == torch.bfloat16,
        "fp16": config.dtype == torch.float16,
        **{theirs: getattr(config, ours) for ours, theirs in _OF_TRAINING.items()},
    }


def config_of(provider: object) -> VWNConfig:
    """The configuration of the model that a provider builds.

    Args:
        provider: a dataclass with the fields that ``provider_settings`` names.

    Raises:
        VirtualWidthError: for a model that the Hugging Face model cannot express.
    """
    said = {field.name: getattr(provider, field.name) for field in fields(provider)}
    act, gated = provider.activation_func, provider.gated_linear_unit
    if (act, gated) not in {(_ACTIVATIONS["silu"], True), (squared_relu, False), (torch.nn.functional.gelu, False)}:
        raise VirtualWidthError(
            f"the Hugging Face model has no {'gated' if gated else 'ungated'} MLP with "
            f"{getattr(act, '__name__', act)}: choose SwiGLU, relu2 or gelu."
        )
    arguments = argparse.Namespace(
        **said
        | {ours: said[theirs] for ours, theirs in _CALLED.items()}
        | {
            "spec": said["hybrid_stack_spec"],
            "group_query_attention": True,
            "num_query_groups": provider.num_query_groups or provider.num_attention_heads,
            "swiglu": gated,
            "squared_relu": act is squared_relu,
            "bias_gelu_fusion": not gated and provider.bias_activation_fusion,
            "untie_embeddings_and_output_weights": not provider.share_embeddings_and_output_weights,
        }
    )
    config = hf_config(arguments)
    for ours, theirs in _OF_TRAINING.items():
        setattr(config, ours, said[theirs])
    config.dtype = provider.params_dtype
    return config


def refuse_what_is_lost(config: VWNConfig, provider: object, where: object) -> None:
    """Refuse a configuration that a provider does not carry whole.

    Args:
        config: the configuration that the provider was made of.
        provider: as for ``config_of``.
        where: the configuration comes from, for the sentence.

    Raises:
        VirtualWidthError: names the first field that would be lost.
    """
    carried, wanted = config_of(provider).to_dict(), config.to_dict()
    for name, value in wanted.items():
        if name in OF_HUGGING_FACE:
            continue
        if name not in carried:
            raise VirtualWidthError(f"{where} has {name}, which no provider knows: install a newer megatron_vwn.")
        if _effective(name, carried[name]) != _effective(name, value):
            raise VirtualWidthError(
                f"{where} has {name} = {value!r}, which Megatron-Bridge cannot carry in this model: set it to "
                f"{carried[name]!r}, or use vwn-convert."
            )


def _effective(name: str, value: object) -> object:
    if name != "rope_parameters":
        return value
    plain = {"rope_type": "default", "rope_theta": VWNConfig.default_theta, "partial_rotary_factor": 1.0}
    return plain | (value or {})
