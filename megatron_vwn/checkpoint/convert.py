"""Between Megatron's torch_dist checkpoints and Hugging Face folders, tensor by tensor.

Everything that can be wrong with names and shapes is found from metadata, before the first tensor is read and before
anything is written.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.arguments import backend_here, hf_config, megatron_arguments, valid_config
from megatron_vwn.checkpoint.folders import SafetensorsReader, SafetensorsWriter, copy_tokenizer
from megatron_vwn.checkpoint.model_card import ARGUMENTS, write_model_card
from megatron_vwn.checkpoint.settings import check_arguments, read_object
from megatron_vwn.checkpoint.torch_dist import TensorInfo, TorchDistReader, write_torch_dist
from megatron_vwn.checkpoint.vocabulary import TOKENS, padded_size
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig, VWNForCausalLM, add_code
from megatron_vwn.training.flags.defaults import megatron_defaults, megatron_parser

SPECIAL_TOKENS = "hugging_face_special_tokens"
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

Progress = Callable[[Iterable[str], str], Iterable[str]]
"""Wraps the keys that are worked through; given what is being done."""


def silent(keys: Iterable[str], description: str) -> Iterable[str]:
    """No progress."""
    return keys


def to_hf(
    source: TorchDistReader,
    folder: Path,
    *,
    tokenizer: Path | None,
    name: str = "",
    shard_bytes: int = 2**29,
    progress: Progress = silent,
) -> VWNConfig:
    """Write the model of a Megatron checkpoint as a Hugging Face folder that runs with and without this package.

    Args:
        source: the checkpoint.
        folder: an existing, empty folder.
        tokenizer: a Hugging Face tokenizer's folder to copy.
        name: what the model card calls the model; the folder's if empty.
        shard_bytes: size of the safetensors files.
        progress: see Progress.

    Returns:
        The configuration that was written.

    Raises:
        VirtualWidthError: tensors are missing, left over or of another shape; the model cannot be expressed.
    """
    config = hf_config(source.arguments)
    check_tensors(_hf_tensors(source.tensors, config), expected_hf_tensors(config), source.folder)
    config.dtype = source.tensors["embedding.word_embeddings.weight"].dtype
    config.architectures = ["VWNForCausalLM"]
    for special, value in getattr(source.arguments, SPECIAL_TOKENS, {}).items():
        setattr(config, special, value)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
        _take_special_tokens(config, folder, tokenizer)
    config.save_pretrained(folder)
    add_code(folder)
    writer = SafetensorsWriter(folder, shard_bytes)
    for key in progress(list(source.tensors), "to Hugging Face"):
        for part, tensor in mapping.to_hf(key, source.read(key), config):
            writer.write(part, tensor)
    writer.close()
    write_model_card(folder, name or folder.name, source.arguments, config)
    return config


def from_hf(
    source: SafetensorsReader, folder: Path, *, transformer_engine: bool | None = None, progress: Progress = silent
) -> dict[str, object]:
    """Write a Hugging Face VWN folder as a checkpoint that Megatron's ``--load`` takes.

    Args:
        source: the Hugging Face folder.
        folder: an existing, empty folder.
        transformer_engine: name tensors as its layers do; None as in the run that the folder was converted from, or as
            a training here would choose if it was not.
        progress: see Progress.

    Returns:
        Megatron's arguments of the model; ``flags.command_line`` types them.

    Raises:
        VirtualWidthError: tensors are missing, left over or of another shape; Megatron cannot express the model.
    """
    config = read_config(source)
    of_the_model = megatron_arguments(config)
    check_tensors(source.tensors, expected_hf_tensors(config), source.folder)
    saved = _arguments_of_the_run(source.folder)
    if transformer_engine is None:
        transformer_engine = (saved.get("transformer_impl") or backend_here()) == "transformer_engine"
    dtype = source.tensors["model.embed_tokens.weight"].dtype
    arguments = of_the_model | {
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "seq_length": saved.get("seq_length") or config.max_position_embeddings,
        "padded_vocab_size": padded_size(config.vocab_size, saved.get("padded_vocab_size")),
    }
    if (source.folder / "tokenizer_config.json").exists():
        tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(source.folder.resolve())}
        arguments |= tokenizer
    write_megatron(
        folder,
        config,
        source.tensors,
        source.read,
        arguments=argparse.Namespace(**(saved | arguments | {TOKENS: config.vocab_size}), params_dtype=dtype),
        progress=progress,
    )
    return arguments


def write_megatron(
    folder: Path,
    config: VWNConfig,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    arguments: argparse.Namespace,
    progress: Progress,
) -> None:
    """Write tensors that carry the names of the Hugging Face model as a Megatron checkpoint.

    Args:
        folder: an existing, empty folder.
        config: the model.
        tensors: every tensor of the Hugging Face model, without the head of a tied one.
        read: gives one of them.
        arguments: what Megatron is to find as the arguments of the run, beside its defaults; ``transformer_impl``
            decides some names.
        progress: see Progress.
    """
    engine = arguments.transformer_impl == "transformer_engine"
    keys = list(dict.fromkeys(mapping.megatron_key(name, config, transformer_engine=engine) for name in tensors))
    empty = {name: info.empty("meta") for name, info in tensors.items()}
    wanted = {}
    for key in keys:
        whole = mapping.from_hf(key, empty.__getitem__, config)
        wanted[key] = TensorInfo(tuple(whole.shape), whole.dtype)
    arguments = argparse.Namespace(**(megatron_defaults() | vars(arguments)))
    setattr(arguments, SPECIAL_TOKENS, {name: getattr(config, name) for name in _SPECIAL_TOKENS})
    arguments.consumed_train_samples = arguments.consumed_valid_samples = arguments.skipped_train_samples = 0
    bar = iter(progress(keys, "to Megatron"))

    def read_next(key: str) -> Tensor:
        next(bar, None)
        return mapping.from_hf(key, read, config).contiguous()

    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
    write_torch_dist(folder, wanted, read_next, objects=_extra_states(wanted, engine), common=common)
    next(bar, None)


def read_config(source: SafetensorsReader) -> VWNConfig:
    """The configuration of a VWN folder.

    Raises:
        VirtualWidthError: for another model, or settings that no model can have.
    """
    path, settings = source.folder / "config.json", source.config
    if settings.get("model_type") != VWNConfig.model_type:
        raise VirtualWidthError(
            f"{source.folder} is a {settings.get('model_type')} model, not vwn: give it a virtual width with vwn-widen."
        )
    # Fields of a newer transformers are its own affair; one of ours that is not known would change the function.
    names = {field.name for field in fields(VWNConfig)}
    if unknown := [key for key in settings if key.startswith("vwn_") and key not in names]:
        raise VirtualWidthError(
            f"{path} has {listed(unknown)}, which this version does not know: install a newer megatron_vwn."
        )
    return valid_config(path, **{key: value for key, value in settings.items() if key != "model_type"})


def expected_hf_tensors(config: VWNConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a Hugging Face model of this configuration stores.

    Raises:
        VirtualWidthError: no such model can be built.
    """
    try:
        with torch.device("meta"):
            model = VWNForCausalLM(config)
    except Exception as error:  # whatever sizes and names provoke that fit one by one
        raise VirtualWidthError(
            "the settings of the model describe none that can be built: correct its sizes."
        ) from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}


def _take_special_tokens(config: VWNConfig, folder: Path, tokenizer: Path) -> None:
    """generate() stops by the configuration's tokens, not by the tokenizer's."""
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever its files provoke
        raise VirtualWidthError(
            f"the tokenizer of {tokenizer} cannot be read: give another with --tokenizer."
        ) from error
    if len(loaded) > config.vocab_size:
        raise VirtualWidthError(
            f"the tokenizer of {tokenizer} has {len(loaded)} tokens and the model {config.vocab_size}: give the "
            "model's with --tokenizer."
        )
    config.bos_token_id, config.pad_token_id = loaded.bos_token_id, loaded.pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    if loaded.eos_token_id not in ends:  # a model may stop at more tokens than its tokenizer calls the end
        config.eos_token_id = loaded.eos_token_id


def _arguments_of_the_run(folder: Path) -> dict[str, object]:
    """What the folder remembers of the run it was converted from; nothing if it was not."""
    path = folder / ARGUMENTS
    if not path.exists():
        return {}
    saved = read_object(path)
    check_arguments(saved, megatron_parser(), path)
    return {name: value for name, value in saved.items() if name in megatron_defaults()}


def _hf_tensors(tensors: Mapping[str, TensorInfo], config: VWNConfig) -> dict[str, TensorInfo]:
    """What Megatron's tensors would become; one that the model does not have keeps its name."""
    found = {}
    for key, info in tensors.items():
        try:
            parts = list(mapping.to_hf(key, info.empty("meta"), config))
        except (KeyError, RuntimeError):
            parts = [(key, info.empty("meta"))]
        found |= {name: TensorInfo(tuple(part.shape), part.dtype) for name, part in parts}
    return found


def check_tensors(found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Every tensor of the model is there, no other is, shapes agree, and all are of floating point."""
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has, beside those of its model,", found.keys() - expected.keys()),
    ):
        if names:
            raise VirtualWidthError(f"{folder} {what} {listed(names)}: it is not the model that its settings describe.")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise VirtualWidthError(
                f"{name} in {folder} has shape {list(found[name].shape)} instead of {list(shape)}: it is not the model "
                "that its settings describe."
            )
        if not found[name].dtype.is_floating_point:
            raise VirtualWidthError(
                f"{name} in {folder} has the dtype {str(found[name].dtype).removeprefix('torch.')}, which no weight "
                "has: give the model before it was quantized."
            )


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", "output_layer.weight")


def _extra_states(tensors: Mapping[str, TensorInfo], transformer_engine: bool) -> Iterator[str]:
    """Keys of the empty entries that Megatron's linear layers, and all layers of Transformer Engine, ask for."""
    for key, info in tensors.items():
        if ".experts.experts." in key:
            experts, name = info.shape[0], key.removesuffix(".weight")
            yield from (f"{name}._extra_state/shard_{i}_{experts}" for i in range(experts))
        elif key.endswith(_LINEAR) or (transformer_engine and key.endswith("norm.weight")):
            yield f"{key.removesuffix('.weight')}._extra_state/shard_0_1"
        if transformer_engine and key.endswith("linear_qkv.weight"):
            yield f"{key.replace('linear_qkv.weight', 'core_attention')}._extra_state/shard_0_1"
