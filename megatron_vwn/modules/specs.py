"""Layer specs: the ordinary hybrid stack for the local and the Transformer Engine backend, and its widening.

``widen`` takes any stack spec apart into its layers and gives each one a connection, so VWN follows whatever layers the
backend offers.
"""

from dataclasses import fields, replace
from functools import partial

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
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

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.modules.layers import CONNECTED, branch_only
from megatron_vwn.modules.multi_token_prediction import VirtualWidthMTPLayer
from megatron_vwn.modules.norm import TorchNorm
from megatron_vwn.modules.stack import Stack, VirtualWidthStack


def stack_spec(virtual_width: VirtualWidthConfig | None, config: TransformerConfig) -> ModuleSpec:
    """The stack of one model.

    Args:
        virtual_width: the stream; None gives the ordinary HybridModel stack, the baseline of every comparison.
        config: the backbone's config; transformer_impl picks the backend.

    Returns:
        A spec for HybridModel (baseline) or VirtualWidthModel.

    Raises:
        VirtualWidthError: for a backend without specs.
    """
    if config.transformer_impl == "local":
        submodules, final_norm = _local_submodules(config), TorchNorm
    elif config.transformer_impl == "transformer_engine":
        submodules, final_norm = transformer_engine_stack_spec.submodules, TENorm
    else:
        raise VirtualWidthError(
            f"--transformer-impl {config.transformer_impl} has no layer specs here: choose local or transformer_engine."
        )
    baseline = ModuleSpec(module=Stack, params={"final_norm": final_norm}, submodules=submodules)
    return baseline if virtual_width is None else widen(baseline, virtual_width)


def widen(spec: ModuleSpec, virtual_width: VirtualWidthConfig) -> ModuleSpec:
    """A stack spec whose layers, all of them, have a connection instead of a residual."""
    layers = {
        field.name: _widen_layer(layer, virtual_width)
        for field in fields(spec.submodules)
        if isinstance(layer := getattr(spec.submodules, field.name), ModuleSpec) and field.name != "mtp_block_spec"
    }
    mtp = _mtp_block_spec(
        ModuleSpec(
            module=VirtualWidthMTPLayer,
            params={"virtual_width": virtual_width},
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=IdentityOp, hnorm=IdentityOp, eh_proj=IdentityOp, layer_norm=spec.params["final_norm"]
            ),
        )
    )
    return ModuleSpec(
        module=VirtualWidthStack,
        params={**spec.params, "virtual_width": virtual_width},
        submodules=replace(spec.submodules, **layers, mtp_block_spec=mtp),
    )


def _mtp_block_spec(layer: ModuleSpec) -> ModuleSpec:
    """The block around one prediction depth; its inner layers come from the pattern and the stack's submodules."""
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )


def _widen_layer(spec: ModuleSpec, virtual_width: VirtualWidthConfig) -> ModuleSpec:
    if spec.module not in CONNECTED:
        raise VirtualWidthError(
            f"{spec.module.__name__} has no twin with a connection: use the layers of Megatron's hybrid stack."
        )
    branches = {
        field.name: branch_only
        for field in fields(spec.submodules)
        if getattr(spec.submodules, field.name) is get_bias_dropout_add
    }
    return ModuleSpec(
        module=CONNECTED[spec.module],
        params={**spec.params, "virtual_width": virtual_width},
        submodules=replace(spec.submodules, **branches),
    )


def _local_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    """Attention, MLP and MoE of Megatron's own parallel linears and torch norms: no Transformer Engine, no apex."""
    qk_norm = TorchNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
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
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    moe = (
        get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts) if config.num_moe_experts else IdentityOp
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=TorchNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=TorchNorm, mlp=mlp, mlp_bda=get_bias_dropout_add),
        ),
        moe_layer=ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=TorchNorm, mlp=moe, mlp_bda=get_bias_dropout_add),
        ),
        mtp_block_spec=_mtp_block_spec(
            ModuleSpec(
                module=MultiTokenPredictionLayer,
                submodules=MultiTokenPredictionLayerSubmodules(
                    enorm=TorchNorm, hnorm=TorchNorm, eh_proj=ColumnParallelLinear, layer_norm=TorchNorm
                ),
            )
        ),
    )
