"""Which tensor of a Megatron checkpoint is which of a Hugging Face checkpoint, one tensor at a time.

Megatron's keys and whole shapes are those of ``VirtualWidthModel.sharded_state_dict``: layers by index, experts stacked
[experts, ...]. Most tensors are only renamed. Three rules are not, each a split on the way out and a merge on the way
back:

    linear_qkv   [kv heads x (queries per group + 2) x head_dim, ...]   q_proj, k_proj, v_proj
    linear_fc1   [2 F, D] of a gated MLP                                gate_proj, up_proj
    vocabulary   [padded vocabulary, ...]                               rows beyond vocab_size are dropped

The last one has no inverse: a merged table has vocab_size rows, which Megatron's loading pads with zeros. ``config`` is
any object with the fields of ``megatron_vwn.hf.VWNConfig``. Nothing here imports transformers or Megatron.

    for key in megatron_keys:    for hf_key, part in to_hf(key, tensor, config): ...
    for hf_key in hf_keys:       wanted.add(megatron_key(hf_key, config))
    for key in wanted:           tensor = from_hf(key, read, config)        read(hf_key) -> Tensor
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Prefixes, the first that matches wins; "#" stands for an index.
_PREFIXES = (
    ("embedding.word_embeddings.", "model.embed_tokens."),
    ("embedding.position_embeddings.", "model.embed_positions."),
    ("embedding.expansion.", "model.embed_expansion."),
    ("embedding.ngram_embeddings.", "model.embed_ngrams."),
    ("decoder.final_norm.", "model.norm."),
    ("decoder.reduction.", "model.reduction."),
    ("output_layer.", "lm_head."),
    ("mtp.layers.#.final_layernorm.", "model.mtp.#.norm."),
    ("mtp.layers.#.fusion.", "model.mtp.#.fusion."),
    ("mtp.layers.#.reduction.", "model.mtp.#.reduction."),
    ("mtp.layers.#.expansion.", "model.mtp.#.expansion."),
)
_LAYERS = (
    ("decoder.layers.#.", "model.layers.#."),
    ("mtp.layers.#.mtp_model_layer.layers.#.", "model.mtp.#.layers.#."),
)
# Inside a layer; ends of names that differ and are not split. Pre-norms are apart, see _NORMS.
_RENAMED = (
    ("connection.", "connection."),
    ("self_attention.linear_proj.", "self_attn.o_proj."),
    ("self_attention.q_layernorm.", "self_attn.q_norm."),
    ("self_attention.k_layernorm.", "self_attn.k_norm."),
    ("mlp.linear_fc2.", "mlp.down_proj."),
    ("mlp.router.", "mlp.gate."),
    ("mlp.experts.experts.linear_fc2.weight", "mlp.experts.down_proj"),
    ("mlp.shared_experts.linear_fc2.", "mlp.shared_expert.down_proj."),
    ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
)
_QKV = ("self_attention.linear_qkv.", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."))
_FC1 = (
    ("mlp.linear_fc1.", ("mlp.gate_proj.", "mlp.up_proj.")),
    ("mlp.shared_experts.linear_fc1.", ("mlp.shared_expert.gate_proj.", "mlp.shared_expert.up_proj.")),
)
# Transformer Engine keeps a pre-norm in the linear layer behind it.
_NORMS = {
    "*": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "-": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    "E": ("pre_mlp_layernorm.", "pre_mlp_layernorm."),
}
_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def to_hf(key: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that one whole Megatron tensor becomes.

    Args:
        key: Megatron's key; its _extra_state entries (of Transformer Engine) become nothing.
        tensor: the whole tensor.
        config: a VWNConfig.

    Yields:
        Key and tensor, views of the input where possible.

    Raises:
        KeyError: for a key that no model of this config has.
    """
    if "_extra_state" in key:
        return
    names = hf_keys(key, config)
    if key in _TABLES:
        tensor = tensor[: config.vocab_size]
    yield from zip(names, _split(key, tensor, config) if len(names) > 1 else (tensor,), strict=True)


def from_hf(key: str, read: Callable[[str], Tensor], config: Any) -> Tensor:
    """One whole Megatron tensor from the Hugging Face tensors it is made of.

    Args:
        key: Megatron's key, of either backend.
        read: gives the tensor of a Hugging Face key.
        config: a VWNConfig.
    """
    parts = [read(name) for name in hf_keys(key, config)]
    return parts[0] if len(parts) == 1 else _merge(key, parts, config)


def hf_keys(key: str, config: Any) -> tuple[str, ...]:
    """The Hugging Face keys that hold the Megatron tensor called key, in the order of its parts.

    Raises:
        KeyError: for a key that no model of this config has.
    """
    for ours, theirs in _PREFIXES:
        if (renamed := _swap(key, ours, theirs)) is not None:
            return (renamed,)
    for ours, theirs in _LAYERS:
        if (match := re.match(_pattern(ours), key)) is not None:
            inside = key[match.end() :]
            return tuple(_numbered(theirs, match.groups()) + name for name in _inside_layer(inside, key, config))
    raise KeyError(f"{key} is no tensor of a VWN model.")


def megatron_key(hf_key: str, config: Any, *, transformer_engine: bool = False) -> str:
    """The Megatron tensor that a Hugging Face tensor is, or is a part of.

    Args:
        hf_key: the Hugging Face key.
        config: a VWNConfig.
        transformer_engine: name pre-norms as the layers of Transformer Engine do.

    Raises:
        KeyError: for a key that no model of this config has.
    """
    for ours, theirs in _PREFIXES:
        if (renamed := _swap(hf_key, theirs, ours)) is not None:
            return renamed
    for ours, theirs in _LAYERS:
        if (match := re.match(_pattern(theirs), hf_key)) is not None:
            inside, prefix = hf_key[match.end() :], _numbered(ours, match.groups())
            for name in _candidates(inside, _symbol(prefix, config), config, transformer_engine):
                if hf_key in hf_keys(prefix + name, config):
                    return prefix + name
    raise KeyError(f"{hf_key} is no tensor of a VWN model.")


# ---------------------------------------------------------------------------------------------- names


def _inside_layer(inside: str, key: str, config: Any) -> tuple[str, ...]:
    """Hugging Face names, within its layer, of a tensor named within its Megatron layer."""
    for norm in _NORMS[_symbol(key, config)]:
        if inside.startswith(norm):
            return ("input_layernorm." + inside.removeprefix(norm),)
    if inside.startswith(_QKV[0]):
        return tuple(name + inside.removeprefix(_QKV[0]) for name in _QKV[1])
    for fc1, names in _FC1:
        if inside.startswith(fc1):
            return tuple(name + inside.removeprefix(fc1) for name in (names if config.gated_mlp else names[1:]))
    if inside == "mlp.experts.experts.linear_fc1.weight":
        return ("mlp.experts.gate_up_proj" if config.gated_mlp else "mlp.experts.up_proj",)
    for ours, theirs in _RENAMED:
        if inside.startswith(ours):
            return (theirs + inside.removeprefix(ours),)
    raise KeyError(f"{key} is no tensor of a VWN model.")


def _candidates(inside: str, symbol: str, config: Any, transformer_engine: bool) -> Iterator[str]:
    """Megatron names, within a layer, that might hold a tensor named within its Hugging Face layer."""
    end = inside.rsplit(".", 1)[-1]
    yield _NORMS[symbol][transformer_engine] + end
    yield _QKV[0] + end
    yield from (fc1 + end for fc1, _ in _FC1)
    yield "mlp.experts.experts.linear_fc1.weight"
    yield from (ours + inside.removeprefix(theirs) for ours, theirs in _RENAMED if inside.startswith(theirs))


def _symbol(key: str, config: Any) -> str:
    """The pattern's symbol of the layer that a Megatron key lies in."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", key)]
    pattern = config.mtp_hybrid_pattern if key.startswith("mtp.") else config.hybrid_pattern
    if numbers[-1] >= len(pattern):
        raise KeyError(f"{key} is beyond the last layer of {pattern!r}.")
    return pattern[numbers[-1]]


def _pattern(prefix: str) -> str:
    return re.escape(prefix).replace(r"\#", r"(\d+)")


def _numbered(prefix: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        prefix = prefix.replace("#", number, 1)
    return prefix


def _swap(key: str, old: str, new: str) -> str | None:
    match = re.match(_pattern(old), key)
    return None if match is None else _numbered(new, match.groups()) + key[match.end() :]


# ---------------------------------------------------------------------------------------------- tensors


def _groups(config: Any) -> tuple[int, int, int]:
    """Key-value heads, query heads of each, and channels of a head."""
    return (
        config.num_key_value_heads,
        config.num_attention_heads // config.num_key_value_heads,
        config.head_dim,
    )


def _split(key: str, tensor: Tensor, config: Any) -> tuple[Tensor, ...]:
    if ".linear_qkv." not in key:
        return tensor.chunk(2, dim=0)
    groups, queries, channels = _groups(config)
    parts = tensor.unflatten(0, (groups, queries + 2, channels)).split((queries, 1, 1), dim=1)
    return tuple(part.flatten(0, 2) for part in parts)


def _merge(key: str, parts: list[Tensor], config: Any) -> Tensor:
    if ".linear_qkv." not in key:
        return torch.cat(parts, dim=0)
    groups, queries, channels = _groups(config)
    heads = zip(parts, (queries, 1, 1), strict=True)
    return torch.cat([part.unflatten(0, (groups, count, channels)) for part, count in heads], dim=1).flatten(0, 2)
