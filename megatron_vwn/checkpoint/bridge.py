"""Our architecture for NVIDIA's Megatron-Bridge; import this module where that package is installed.

    import megatron_vwn.checkpoint.bridge    # Bridge then knows how VWNForCausalLM's tensors are called in Megatron

Names come from ``mapping``, so the two ways of converting cannot disagree. Bridge finds no plug-ins by itself, hence
the import. Tried with a stand-in that records what is registered, never with the real package: use vwn-convert where
both would do.
"""

import re
from collections.abc import Iterator

from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.arguments import VIRTUAL_WIDTH
from megatron_vwn.checkpoint.convert import expected_hf_tensors
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig
from megatron_vwn.modules.model import VirtualWidthModel

try:
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.conversion.param_mapping import (
        AutoMapping,
        GatedMLPMapping,
        QKVMapping,
        ReplicatedMapping,
    )
except ImportError as error:
    raise VirtualWidthError(
        f"Megatron-Bridge cannot be imported ({error}): install megatron-bridge and what it needs, or use vwn-convert."
    ) from error

_SIZES = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vwn_m": 1, "vwn_n": 4}
# Between them they have every tensor that a gated model can have.
_EXAMPLES = (
    {"qk_layernorm": True, "hybrid_pattern": "*-", "num_mtp_layers": 1, "mtp_hybrid_pattern": "*-"},
    {
        **{"hybrid_pattern": "*E", "num_mtp_layers": 1, "mtp_hybrid_pattern": "*E", "num_experts": 2},
        **{"shared_expert_intermediate_size": 8, "shared_expert_gate": True},
        **{"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    },
)
# Whole on every tensor-parallel rank under the sequence and replicated partitions, which a conversion uses.
_OF_THE_STREAM = ("connection.", "expansion.", "reduction.", "fusion.", "norm", "router.", "gate_weight")


def names() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of each tensor in Megatron, of either backend, and of its parts in Hugging Face; "*" for layers."""
    seen = set()
    for settings in _EXAMPLES:
        config = VWNConfig(**_SIZES, **settings)
        for hf_key in expected_hf_tensors(config):
            for engine in (False, True):
                key = mapping.megatron_key(hf_key, config, transformer_engine=engine)
                if _any_layer(key) not in seen:
                    seen.add(_any_layer(key))
                    yield _any_layer(key), tuple(map(_any_layer, mapping.hf_keys(key, config)))


def _any_layer(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def _mapping_of(ours: str, theirs: tuple[str, ...]):
    match theirs:
        case (q, k, v):
            return QKVMapping(megatron_param=ours, q=q, k=k, v=v)
        case (gate, up):
            return GatedMLPMapping(megatron_param=ours, gate=gate, up=up)
        case (name,):
            replicated = any(part in ours for part in _OF_THE_STREAM)
            return (ReplicatedMapping if replicated else AutoMapping)(ours, name)


@MegatronModelBridge.register_bridge(source="VWNForCausalLM", target=VirtualWidthModel, model_type="vwn")
class VirtualWidthBridge(MegatronModelBridge):
    """Gated models; the virtual width's settings go by the same names on both sides."""

    CONFIG_MAPPING = (
        *MegatronModelBridge.CONFIG_MAPPING,
        *((name, name) for name in VIRTUAL_WIDTH),
    )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """What Bridge asks for: one mapping per tensor."""
        return MegatronMappingRegistry(*(_mapping_of(*each) for each in names()))
