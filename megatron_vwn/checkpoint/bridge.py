"""Our architecture for NVIDIA's Megatron-Bridge; import this module where that package is installed.

    import megatron_vwn.checkpoint.bridge    # Bridge finds no plug-ins by itself
    bridge = AutoBridge.from_hf_pretrained(folder)
    models = bridge.to_megatron_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(models, other_folder)

Names come from ``mapping`` and settings from ``arguments``, as in vwn-convert, so the two ways of converting cannot
disagree. What Bridge would only warn of (a tensor without a mapping, a folder that lacks some) is refused here.
``bash tests/bridge.sh`` tries it with the real package.
"""

from collections.abc import Iterable, Iterator

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from torch import Tensor, nn

from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.bridge_provider import VirtualWidthProvider
from megatron_vwn.checkpoint.bridge_settings import (
    config_of,
    known_config,
    megatron_bridge_needed,
    provider_settings,
    refuse_what_is_lost,
)
from megatron_vwn.checkpoint.convert import expected_hf_tensors, listed
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig
from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.training.flags.machine import needed_flags

with megatron_bridge_needed():
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, WeightConversionTask
    from megatron.bridge.models.conversion.param_mapping import (
        AutoMapping,
        ColumnParallelMapping,
        FusedExpertMapping,
        FusedGatedExpertMapping,
        GatedMLPMapping,
        MegatronParamMapping,
        QKVMapping,
    )
    from megatron.bridge.models.conversion.utils import get_module_and_param_from_name

# What flags for a machine without a GPU or Transformer Engine set in a configuration.
_OF_THE_MACHINE = {
    "--transformer-impl": {"transformer_impl": "local"},
    "--use-cpu-initialization": {"use_cpu_initialization": True},
    "--no-persist-layer-norm": {"persist_layer_norm": False},
    "--no-rope-fusion": {"apply_rope_fusion": False},
    "--no-masked-softmax-fusion": {"masked_softmax_fusion": False},
    "--no-gradient-accumulation-fusion": {"gradient_accumulation_fusion": False},
}
_LINEAR = ("word_embeddings.", "output_layer.", "linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.")


class StreamMapping(MegatronParamMapping[Tensor]):
    """A tensor that every tensor-parallel rank has whole or, under the width partition, its channels of."""

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: nn.Module) -> Tensor:
        """This rank's part; every rank reads the whole tensor."""
        _, own = get_module_and_param_from_name(megatron_module, self.megatron_param)
        if self._is_shard(own):
            return hf_weights.chunk(self.tp_size, dim=own.partition_dim)[self.tp_rank].to(own.device)
        return hf_weights.to(own.device)

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """The whole tensor."""
        whole = self.maybe_dequantize(megatron_weights)
        if self._is_shard(megatron_weights):
            whole = torch.cat(self.gather_from_tp_ranks(whole.contiguous()), dim=megatron_weights.partition_dim)
        return {self.hf_param: whole}

    def _is_shard(self, own: Tensor) -> bool:
        return self.tp_size > 1 and getattr(own, "tensor_model_parallel", False)


def _mappings(config: VWNConfig) -> Iterator[MegatronParamMapping]:
    """One per tensor of a Megatron model, of either backend."""
    keys = (
        mapping.megatron_key(hf_key, config, transformer_engine=engine)
        for engine in (False, True)
        for hf_key in expected_hf_tensors(config)
    )
    for key in dict.fromkeys(keys):
        for name in _parameters(key):
            yield _mapping(name, mapping.hf_keys(key, config), gated=config.gated_mlp)


def _hf_names(task_mapping: MegatronParamMapping) -> Iterable[str]:
    names = task_mapping.hf_param
    return [names] if isinstance(names, str) else names.values()


def _parameters(key: str) -> tuple[str, ...]:
    """Parameters that a checkpoint's key stands for; "*" is the number of an expert."""
    start, experts, end = key.partition("experts.experts.")
    if not experts:
        return (key,)
    return f"{start}experts.local_experts.*.{end}", f"{start}experts.{end}*"


def _mapping(ours: str, theirs: tuple[str, ...], *, gated: bool) -> MegatronParamMapping:
    match theirs:
        case (q, k, v):
            return QKVMapping(ours, q=q, k=k, v=v)
        case (gate, up):
            return GatedMLPMapping(ours, gate=gate, up=up)
    (theirs,) = theirs
    if "*" in ours:
        return (FusedGatedExpertMapping if gated and "linear_fc1" in ours else FusedExpertMapping)(ours, theirs)
    if "ngram_embeddings." in ours:
        return ColumnParallelMapping(ours, theirs)
    if any(name in ours for name in _LINEAR) and "layer_norm" not in ours:
        return AutoMapping(ours, theirs)
    return StreamMapping(ours, theirs)


@MegatronModelBridge.register_bridge(
    source="VWNForCausalLM", target=VirtualWidthModel, provider=VirtualWidthProvider, model_type=VWNConfig.model_type
)
class VirtualWidthBridge(MegatronModelBridge):
    """VWNForCausalLM and VirtualWidthModel."""

    def provider_bridge(self, hf_pretrained) -> VirtualWidthProvider:
        """The provider of a folder's model.

        Raises:
            VirtualWidthError: for a configuration that cannot be carried whole.
        """
        where = getattr(hf_pretrained, "model_name_or_path", None) or "the configuration"
        config = known_config(hf_pretrained.config, where)
        provider = VirtualWidthProvider(**provider_settings(config))
        for need in needed_flags(gpu=torch.cuda.is_available(), transformer_engine=HAVE_TE):
            for name, value in _OF_THE_MACHINE.get(need.flag, {}).items():
                setattr(provider, name, value)
        refuse_what_is_lost(config, provider, where)
        return provider

    @classmethod
    def megatron_to_hf_config(cls, provider: VirtualWidthProvider) -> dict[str, object]:
        """The configuration of a provider's model."""
        return config_of(provider).to_dict() | {"architectures": [cls.SOURCE_NAME], "model_type": cls.MODEL_TYPE}

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The mappings of the model of ``hf_config``."""
        return MegatronMappingRegistry(*_mappings(known_config(self.hf_config, "the configuration")))

    def build_conversion_tasks(self, hf_pretrained, megatron_model, weight_dtype=None) -> list[WeightConversionTask]:
        """As every bridge's, or not at all: each parameter of the model and each tensor of the folder has one.

        Raises:
            VirtualWidthError: names those that have none.
        """
        tasks = super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype=weight_dtype)
        names = self._megatron_global_param_names_all_pp_ranks(megatron_model)
        mapped = {task.global_param_name for task in tasks if task is not None}
        unknown = {name for name in names if name not in mapped or ".to_wrap." in name}
        expected = set(expected_hf_tensors(known_config(self.hf_config, "the configuration")))
        source = getattr(getattr(hf_pretrained, "state", None), "source", None)
        in_the_folder = expected if source is None else set(source.get_all_keys())
        carried = {name for task in tasks if task is not None for name in _hf_names(task.mapping)}
        for what, left in (
            ("parameters of the model that a VWN model does not have, such as an adapter's", unknown),
            ("tensors of the folder that its model does not have", in_the_folder - expected),
            ("tensors of the model that the folder lacks", expected - in_the_folder),
            ("tensors of the folder that the model in Megatron does not have", expected - carried),
        ):
            if left:
                raise VirtualWidthError(f"Megatron-Bridge would drop {what} ({listed(left)}): use vwn-convert.")
        return tasks

    def build_export_fp8_tasks(self, *args, **kwargs):
        """Refused.

        Raises:
            VirtualWidthError: always.
        """
        raise VirtualWidthError(
            "export_weight_dtype fp8 has not been tried with a virtual width: leave it at bf16, which exports every "
            "tensor as it is."
        )
