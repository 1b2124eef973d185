"""The hybrid stack of Megatron's own parallel linears and torch norms: no Transformer Engine, no apex."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_vwn.modules.latent_attention import LatentAttention, LatentDotProductAttention
from megatron_vwn.modules.norm import TorchNorm


def local_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    """Attention, latent attention, gated delta net, MLP and experts; Mamba and sparse attention have no torch form.

    Megatron computes a gated delta net in torch operations in its deterministic mode, but even then only where the
    package flash-linear-attention is.

    Args:
        config: the backbone's config; it says whether there are experts and norms of queries and keys.
    """
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    moe = (
        get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts) if config.num_moe_experts else IdentityOp
    )
    return HybridStackSubmodules(
        attention_layer=_attention_layer(_attention(config)),
        mla_layer=_attention_layer(_latent_attention(config)),
        gdn_layer=_attention_layer(_gated_delta_net()),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=TorchNorm, mlp=mlp, mlp_bda=get_bias_dropout_add),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=TorchNorm, mlp=moe, mlp_bda=get_bias_dropout_add),
        ),
        mtp_block_spec=mtp_block_spec(
            ModuleSpec(
                module=MultiTokenPredictionLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=TorchNorm, hnorm=TorchNorm, eh_proj=ColumnParallelLinear, layer_norm=TorchNorm
                ),
            )
        ),
    )


def mtp_block_spec(layer: ModuleSpec) -> ModuleSpec:
    """The block around one prediction depth; its inner layers come from the pattern and the stack's submodules."""
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )


def _attention_layer(attention: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
        ),
    )


def _attention(config: TransformerConfig) -> ModuleSpec:
    qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_attention(config: TransformerConfig) -> ModuleSpec:
    latent_norm = TorchNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=LatentDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=latent_norm,
            kv_layernorm=latent_norm,
        ),
    )


def _gated_delta_net() -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=TorchNorm, out_proj=RowParallelLinear
        ),
    )
