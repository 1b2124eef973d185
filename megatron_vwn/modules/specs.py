"""Layer specs: the ordinary hybrid stack for the local and the Transformer Engine backend, and its widening.

``widen`` takes any stack spec apart into its layers and gives each one a connection, so VWN follows whatever layers the
backend offers.
"""

from dataclasses import fields, replace

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_stack_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.modules.layers import CONNECTED, branch_only
from megatron_vwn.modules.local_specs import local_submodules, mtp_block_spec
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
        submodules, final_norm = local_submodules(config), TorchNorm
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
    mtp = mtp_block_spec(
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
