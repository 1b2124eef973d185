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
from dataclasses import dataclass, fields, make_dataclass

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.enums import AttnBackend
from megatron.training.config.instantiate_utils import target_allowlist
from torch import Tensor, nn

from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.bridge_settings import config_of, known_config, provider_settings, refuse_what_is_lost
from megatron_vwn.checkpoint.convert import expected_hf_tensors, listed
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.hf import VWNConfig
from megatron_vwn.megatron_fixes.contract import check_contract
from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.modules.specs import stack_spec
from megatron_vwn.training.flags.machine import needed_flags
from megatron_vwn.training.flags.vwn import virtual_width_from_args

try:
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
    from megatron.bridge.models.hybrid import HybridModelProvider
except ImportError as error:
    raise VirtualWidthError(
        f"Megatron-Bridge cannot be imported ({error}): install megatron-bridge and what it needs, or use vwn-convert."
    ) from error

# ---------------------------------------------------------------------------------------------- the model

# Fields as flags call them. No monitoring is written by Bridge's training.
_Width = make_dataclass(
    "_Width",
    [(f"vwn_{field.name}", object, None) for field in fields(VirtualWidthConfig) if field.name != "log_interval"],
)
# What HybridModel takes as this provider calls it.
_OF_THE_MODEL = (
    *("vocab_size", "hybrid_layer_pattern", "fp16_lm_cross_entropy", "parallel_output"),
    *("share_embeddings_and_output_weights", "position_embedding_type", "rotary_percent", "rotary_base"),
    "seq_len_interpolation_factor",
)
# Settings of a provider that this model cannot have.
_REFUSED = {
    "hybrid_stack_spec": (None, "layers need connections"),
    "restore_modelopt_state": (False, "quantized layers have no connections"),
    "should_pad_vocab": (False, "rows that pad would come back as tokens"),
    "pipeline_model_parallel_size": (
        1,
        "Megatron-Bridge sends hidden_size channels from stage to stage, and the stream has more",
    ),
}
# What flags for a machine without a GPU or Transformer Engine set in a configuration.
_OF_THE_MACHINE = {
    "--transformer-impl": {"transformer_impl": "local"},
    "--use-cpu-initialization": {"use_cpu_initialization": True},
    "--no-persist-layer-norm": {"persist_layer_norm": False},
    "--no-rope-fusion": {"apply_rope_fusion": False},
    "--no-masked-softmax-fusion": {"masked_softmax_fusion": False},
    "--no-gradient-accumulation-fusion": {"gradient_accumulation_fusion": False},
}


@dataclass
class VirtualWidthProvider(_Width, HybridModelProvider):
    """Builds VirtualWidthModels. Beside a HybridModelProvider's fields it has those of VirtualWidthConfig, as flags
    call them (vwn_m, vwn_n, ...)."""

    mtp_num_layers: int | None = None
    # Megatron's default; a HybridModelProvider's has no attention in fp32.
    attention_backend: AttnBackend = AttnBackend.auto

    @property
    def virtual_width(self) -> VirtualWidthConfig:
        """The stream.

        Raises:
            VirtualWidthError: for values that no model can have.
        """
        self.vwn_ngrams = tuple(self.vwn_ngrams or ())  # a list, where it was read from a file
        return virtual_width_from_args(self)

    def finalize(self) -> None:
        """As every provider's.

        Raises:
            VirtualWidthError: for settings that this model cannot have.
        """
        for name, (harmless, reason) in _REFUSED.items():
            if getattr(self, name) != harmless:
                raise VirtualWidthError(
                    f"{name} = {getattr(self, name)!r} does not go with a virtual width in Megatron-Bridge ({reason}): "
                    f"set it to {harmless}, or train with megatron_vwn.training.pretrain."
                )
        if self.vocab_size % self.tensor_model_parallel_size:
            raise VirtualWidthError(
                f"{self.tensor_model_parallel_size} tensor-parallel ranks do not divide the {self.vocab_size} rows of "
                "the vocabulary: set tensor_model_parallel_size to a number that does, or use vwn-convert."
            )
        self.virtual_width.check_parallel(
            hidden_size=self.hidden_size,
            tensor_parallel_size=self.tensor_model_parallel_size,
            sequence_parallel=self.sequence_parallel,
        )
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> VirtualWidthModel:
        """Build the model.

        Args:
            pre_process: whether it has the embedding; there is one stage, so it has.
            post_process: whether it has the head.
            vp_stage: virtual pipeline stage.
        """
        check_contract()
        if not self.mtp_num_layers:
            # Bridge's AutoBridge.save_hf_weights takes a 0 or None that stands here for further predictions that were
            # left out, and with them leaves out model.layers.<num_hidden_layers>, which is a layer of the trunk.
            vars(self).pop("mtp_num_layers", None)
        virtual_width = self.virtual_width
        # Megatron copies configurations, and process groups cannot be copied.
        groups, self._pg_collection = self._pg_collection, None
        try:
            return VirtualWidthModel(
                config=self,
                hybrid_stack_spec=stack_spec(virtual_width, self),
                virtual_width=virtual_width,
                max_sequence_length=self.seq_length,
                pre_process=pre_process is not False,
                post_process=post_process is not False,
                pg_collection=groups,
                vp_stage=vp_stage,
                **{name: getattr(self, name) for name in _OF_THE_MODEL},
            )
        finally:
            self._pg_collection = groups


# A checkpoint's run_config.yaml names the provider.
target_allowlist.add_exact(f"{VirtualWidthProvider.__module__}.{VirtualWidthProvider.__qualname__}")


# ---------------------------------------------------------------------------------------------- tensors

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
