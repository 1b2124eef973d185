"""The stack specs of both backends, looked at without building a model."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.modules.layers import _Connected, branch_only
from megatron_vwn.modules.norm import TorchNorm
from megatron_vwn.modules.specs import stack_spec, widen
from megatron_vwn.modules.stack import Stack, VirtualWidthStack

WIDTH = VirtualWidthConfig(m=2, n=8)
FINAL_NORM = {"local": TorchNorm, "transformer_engine": TENorm}


def config(backend):
    return TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, transformer_impl=backend)


def layers(spec):
    named = {field.name: getattr(spec.submodules, field.name) for field in fields(spec.submodules)}
    return {name: layer for name, layer in named.items() if isinstance(layer, ModuleSpec) and name != "mtp_block_spec"}


@pytest.mark.parametrize("backend", FINAL_NORM)
def test_every_layer_has_a_connection_and_no_residual(backend):
    spec = stack_spec(WIDTH, config(backend))
    assert spec.module is VirtualWidthStack
    assert spec.params == {"final_norm": FINAL_NORM[backend], "virtual_width": WIDTH}
    for name, layer in layers(spec).items():
        assert issubclass(layer.module, _Connected), name
        assert layer.params["virtual_width"] is WIDTH, name
        values = [getattr(layer.submodules, field.name) for field in fields(layer.submodules)]
        assert branch_only in values and get_bias_dropout_add not in values, name


@pytest.mark.parametrize("backend", FINAL_NORM)
def test_baseline_layers_are_stock(backend):
    spec = stack_spec(None, config(backend))
    assert spec.module is Stack and spec.params == {"final_norm": FINAL_NORM[backend]}
    assert all(not issubclass(layer.module, _Connected) for layer in layers(spec).values())


def test_transformer_engine_offers_every_layer_of_the_stock_stack_and_leaves_it_alone():
    wide, stock = layers(stack_spec(WIDTH, config("transformer_engine"))), layers(hybrid_stack_spec)
    assert wide.keys() == stock.keys()
    assert all(issubclass(wide[name].module, stock[name].module) for name in stock)
    assert all(not issubclass(layer.module, _Connected) for layer in stock.values())


def test_a_layer_without_a_twin_is_refused():
    class OtherLayer:
        pass

    spec = stack_spec(None, config("local"))
    other = replace(spec.submodules, mlp_layer=ModuleSpec(module=OtherLayer))
    with pytest.raises(VirtualWidthError, match="OtherLayer has no twin"):
        widen(ModuleSpec(module=spec.module, params=spec.params, submodules=other), WIDTH)


def test_a_backend_without_specs_is_refused():
    with pytest.raises(VirtualWidthError, match="choose local or transformer_engine"):
        stack_spec(WIDTH, SimpleNamespace(transformer_impl="inference_optimized"))
