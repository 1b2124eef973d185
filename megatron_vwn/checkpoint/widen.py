"""A trained ordinary model as a virtual width network that computes the same function.

Every parameter of a virtual width is a deviation from the paper's initial pattern, with which the stream holds copies
of the ordinary residual and the reduction averages them. So widening writes the backbone as it is, zeros for what is
new and ones for its norms, and leaves out the norm before the reduction, which would change the function. Exact for
every n >= m.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from megatron_vwn import ops
from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.arguments import VIRTUAL_WIDTH, backbone, valid_config
from megatron_vwn.checkpoint.convert import check_tensors, expected_hf_tensors
from megatron_vwn.checkpoint.folders import SafetensorsReader
from megatron_vwn.checkpoint.torch_dist import TensorInfo, TorchDistReader
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.hf import VWNConfig

MODELS = ("llama", "qwen3", "qwen3_moe")
# Megatron's dense fusion of further predictions, and the norms before it, which the shared map cannot represent.
_DENSE_FUSION = ("eh_proj.", "enorm.", "hnorm.")


@dataclass(frozen=True)
class OrdinaryModel:
    """A model without a virtual width, its tensors under the names of the Hugging Face VWN model.

    Attributes:
        settings: fields of a VWNConfig that describe the backbone.
        tensors: its tensors; a tied head is not among them.
        read: gives one of them.
        further: predictions of further tokens that the source has.
    """

    settings: dict[str, object]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    further: int = 0


def from_megatron(source: TorchDistReader) -> OrdinaryModel:
    """The model of a HybridModel checkpoint.

    Raises:
        VirtualWidthError: if it has a virtual width already, or cannot be described.
    """
    if getattr(source.arguments, "vwn_m", None) is not None:
        raise VirtualWidthError(
            f"{source.folder} has a virtual width already: vwn-widen takes ordinary models, vwn-convert takes this one."
        )
    settings = backbone(source.arguments)
    config = valid_config(source.folder, **settings, **_NARROW)  # names do not depend on the width
    whole = lru_cache(maxsize=1)(source.read)  # Q, K and V are parts of one tensor
    tensors, key_of = {}, {}
    for key, info in source.tensors.items():
        if any(part in key for part in _DENSE_FUSION):
            continue
        try:
            parts = list(mapping.to_hf(key, info.empty("meta"), config))
        except (KeyError, RuntimeError):
            parts = [(key, info)]
        for name, part in parts:
            tensors[name], key_of[name] = TensorInfo(tuple(part.shape), part.dtype), key
    check_tensors(tensors, _ordinary(config), source.folder)

    def read(name: str) -> Tensor:
        return dict(mapping.to_hf(key_of[name], whole(key_of[name]), config))[name]

    return OrdinaryModel(settings, tensors, read, settings["num_mtp_layers"])


def from_hugging_face(source: SafetensorsReader) -> OrdinaryModel:
    """The model of a Llama, Qwen3 or Qwen3-MoE folder.

    Raises:
        VirtualWidthError: for another model, or settings that Megatron's layers do not have.
    """
    kind = source.config.get("model_type")
    if kind not in MODELS:
        raise VirtualWidthError(f"{source.folder} is a {kind} model: vwn-widen takes {', '.join(MODELS)}.")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # whatever its settings provoke
        raise VirtualWidthError(
            f"{source.folder / 'config.json'} describes no {kind} model that transformers knows: correct it."
        ) from error
    for name, harmless in (
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
    ):
        if getattr(config, name, harmless) != harmless:
            raise VirtualWidthError(
                f"{source.folder} has {name} = {getattr(config, name)!r}, which vwn-widen does not take: only "
                f"{harmless!r}."
            )
    if config.tie_word_embeddings and not _head_is_the_table(source):
        config.tie_word_embeddings = False  # transformers, too, then takes the head of the file
    pattern = "".join("*E" if _has_experts(config, i) else "*-" for i in range(config.num_hidden_layers))
    settings = _settings(config, pattern)
    expected = _ordinary(valid_config(source.folder / "config.json", **settings, **_NARROW))
    parts = {name: _parts_of(name, source, config) for name in expected}
    taken = {part for group in parts.values() for part in _flat(group)}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    # Old folders hold the frequencies of rotary embeddings too.
    stored = {name for name in source.tensors if not name.endswith("rotary_emb.inv_freq")} - tied
    check_tensors(
        {name: source.tensors[name] for name in stored},
        {name: source.tensors[name].shape if name in source.tensors else () for name in taken},
        source.folder,
    )

    def read(name: str) -> Tensor:
        return _join(parts[name], source.read)

    def info(name: str) -> TensorInfo:
        whole = _join(parts[name], lambda part: source.tensors[part].empty("meta"))
        return TensorInfo(tuple(whole.shape), whole.dtype)

    return OrdinaryModel(settings, {name: info(name) for name in parts}, read)


def widen(
    model: OrdinaryModel, virtual_width: VirtualWidthConfig, *, fresh_predictions: bool
) -> tuple[VWNConfig, dict[str, TensorInfo], Callable[[str], Tensor]]:
    """The tensors of the widened model, under the names of the Hugging Face VWN model.

    Args:
        model: the ordinary model.
        virtual_width: the stream; its reduction norm must be off.
        fresh_predictions: keep the layers of further predictions and begin their fusion anew; else they are dropped.

    Returns:
        The configuration, every tensor, and what gives one of them.

    Raises:
        VirtualWidthError: if the stream cannot carry the same function.
    """
    vw = virtual_width
    vw.check_model(hidden_size=model.settings["hidden_size"], tied_embeddings=model.settings["tie_word_embeddings"])
    if vw.carry == "doubly-stochastic" and vw.m > 1:
        raise VirtualWidthError(
            "a doubly stochastic carry keeps the function only approximately unless --vwn-m is 1: choose another carry."
        )
    assert not vw.reduce_norm
    settings = dict(model.settings)
    if not fresh_predictions:
        settings |= {"num_mtp_layers": 0, "mtp_hybrid_pattern": ""}
    if vw.ngrams:
        raise VirtualWidthError(
            "--vwn-ngrams is not available here, where no tokenizer says which token ends a document: leave it out."
        )
    config = valid_config(
        "the widened model", **settings, **{name: getattr(vw, name.removeprefix("vwn_")) for name in VIRTUAL_WIDTH}
    )
    expected = expected_hf_tensors(config)
    table = model.tensors["model.embed_tokens.weight"]
    wide = {"model.embed_tokens.weight", "model.embed_positions.weight"} if vw.embedding == "wide" else set()
    dtype_of = {name: model.tensors[name].dtype if name in model.tensors else table.dtype for name in expected}
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> Tensor:
        if name in model.tensors:
            tensor = model.read(name)
            # The rows of a wide table are copies, as those that a tiled embedding makes of a narrow one.
            return ops.tile(tensor.unflatten(-1, (vw.m, -1)), vw.n).flatten(-2) if name in wide else tensor
        tensor = torch.zeros(expected[name], dtype=dtype_of[name])
        if name.endswith("norm") or name.endswith("norm.weight"):
            return tensor.fill_(1)
        if name.endswith("fusion.weight"):
            return tensor.normal_(0, settings["initializer_range"], generator=generator)
        return tensor

    for name, shape in expected.items():
        if name not in model.tensors and not _is_new(name):
            raise VirtualWidthError(f"the model lacks {name}: it is not what its settings describe.")
        if name in model.tensors and name not in wide and model.tensors[name].shape != shape:
            raise VirtualWidthError(
                f"{name} has shape {list(model.tensors[name].shape)} instead of {list(shape)}: the model is not what "
                "its settings describe."
            )
    return config, {name: TensorInfo(shape, dtype_of[name]) for name, shape in expected.items()}, read


def _ordinary(config: VWNConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what an ordinary model has."""
    return {name: shape for name, shape in expected_hf_tensors(config).items() if not _is_new(name)}


def _head_is_the_table(source: SafetensorsReader) -> bool:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    return not all(name in source.tensors for name in names) or torch.equal(*(source.read(name) for name in names))


_NARROW = {"vwn_m": 1, "vwn_n": 1, "vwn_embedding": "tiled", "vwn_reduce_norm": False}
_NEW = (".connection.", ".reduction.", "embed_expansion.", ".expansion.", ".fusion.")


def _is_new(name: str) -> bool:
    """Whether only a model with a virtual width has it."""
    return any(part in name for part in _NEW)


def _settings(config: PreTrainedConfig, pattern: str) -> dict[str, object]:
    settings = {
        "hybrid_pattern": pattern,
        "norm_eps": config.rms_norm_eps,
        "qk_layernorm": config.model_type.startswith("qwen3"),
        "initializer_range": config.initializer_range,
        **{
            name: getattr(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
                "rope_parameters",
                "tie_word_embeddings",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            )
        },
        "num_mtp_layers": 0,
        "mtp_hybrid_pattern": "",
    }
    if "E" in pattern:
        settings |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            # The softmax of the chosen logits is the chosen part of the whole softmax, normalised.
            "moe_router_pre_softmax": not config.norm_topk_prob,
            "moe_router_dtype": "fp32",
        }
    return settings


def _has_experts(config: PreTrainedConfig, layer: int) -> bool:
    if config.model_type != "qwen3_moe":
        return False
    return (
        layer not in config.mlp_only_layers and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
    )


# A tensor's name; a list is stacked along a new first dimension, a tuple of stacks joined along the second.
type _Parts = str | list[_Parts] | tuple[_Parts, ...]


def _parts_of(name: str, source: SafetensorsReader, config: PreTrainedConfig) -> _Parts:
    """Which tensors of an ordinary folder make up one of ours; its layers are pairs of our sublayers."""
    if not name.startswith("model.layers."):
        return name
    number, inside = name.removeprefix("model.layers.").split(".", 1)
    prefix = f"model.layers.{int(number) // 2}."
    if int(number) % 2 and inside.startswith("input_layernorm."):
        return prefix + "post_attention_layernorm.weight"
    if not inside.startswith("mlp.experts.") or prefix + inside in source.tensors:
        return prefix + inside
    kinds = ("gate", "up") if inside.endswith("gate_up_proj") else ("down",)
    stacks = tuple(
        [f"{prefix}mlp.experts.{expert}.{kind}_proj.weight" for expert in range(config.num_experts)] for kind in kinds
    )
    return stacks if len(stacks) > 1 else stacks[0]


def _flat(parts: _Parts) -> list[str]:
    return [parts] if isinstance(parts, str) else [name for part in parts for name in _flat(part)]


def _join(parts: _Parts, read: Callable[[str], Tensor]) -> Tensor:
    if isinstance(parts, str):
        return read(parts)
    if isinstance(parts, list):
        return torch.stack([_join(part, read) for part in parts])
    return torch.cat([_join(part, read) for part in parts], dim=1)
