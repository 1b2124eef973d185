"""The provider of Megatron-Bridge for our models: every setting of the stream, and what such a model cannot have."""

from dataclasses import dataclass, fields, make_dataclass

from megatron.core.transformer.enums import AttnBackend
from megatron.training.config.instantiate_utils import target_allowlist

from megatron_vwn.checkpoint.bridge_settings import megatron_bridge_needed
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes.contract import check_contract
from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.modules.specs import stack_spec
from megatron_vwn.training.flags.vwn import virtual_width_from_args

with megatron_bridge_needed():
    from megatron.bridge.models.hybrid import HybridModelProvider

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
