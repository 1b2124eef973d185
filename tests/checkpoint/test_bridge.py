"""The registration with Megatron-Bridge, against a stand-in that records it: the real package needs a GPU machine."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_vwn.config import VirtualWidthError

BRIDGE = "megatron_vwn.checkpoint.bridge"
CONVERSION = "megatron.bridge.models.conversion"


@pytest.fixture
def registered(monkeypatch):
    """What our module registers."""
    record = SimpleNamespace()

    class MegatronModelBridge:
        CONFIG_MAPPING = (("hidden_size", "hidden_size"),)

        @staticmethod
        def register_bridge(**how):
            record.how = how
            return lambda cls: setattr(record, "bridge", cls) or cls

    def kind(name):
        return lambda *args, **kwargs: (name, *args, *kwargs.values())

    kinds = {name: kind(name) for name in ("AutoMapping", "GatedMLPMapping", "QKVMapping", "ReplicatedMapping")}
    modules = {
        "megatron.bridge": {},
        "megatron.bridge.models": {},
        CONVERSION: {},
        f"{CONVERSION}.mapping_registry": {"MegatronMappingRegistry": lambda *mappings: mappings},
        f"{CONVERSION}.model_bridge": {"MegatronModelBridge": MegatronModelBridge},
        f"{CONVERSION}.param_mapping": kinds,
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, BRIDGE, raising=False)
    importlib.import_module(BRIDGE)
    yield record
    sys.modules.pop(BRIDGE, None)


def test_every_tensor_has_one_mapping(registered):
    assert registered.how["source"] == "VWNForCausalLM"
    assert ("vwn_m", "vwn_m") in registered.bridge.CONFIG_MAPPING
    mappings = registered.bridge().mapping_registry()
    by_name = {ours: (kind, theirs) for kind, ours, *theirs in mappings}
    assert len(by_name) == len(mappings)
    layer = "decoder.layers.*."
    assert by_name[layer + "self_attention.linear_qkv.weight"] == (
        "QKVMapping",
        [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"],
    )
    assert by_name[layer + "mlp.linear_fc1.weight"][0] == "GatedMLPMapping"
    assert by_name[layer + "connection.routing"] == ("ReplicatedMapping", ["model.layers.*.connection.routing"])
    assert by_name[layer + "mlp.experts.experts.linear_fc2.weight"] == (
        "AutoMapping",
        ["model.layers.*.mlp.experts.down_proj"],
    )
    # Pre-norms are called otherwise by Transformer Engine.
    for norm in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        assert by_name[layer + norm] == ("ReplicatedMapping", ["model.layers.*.input_layernorm.weight"])
    assert by_name["mtp.layers.*.fusion.weight"] == ("ReplicatedMapping", ["model.mtp.*.fusion.weight"])


def test_without_the_package_one_sentence_says_so():
    sys.modules.pop(BRIDGE, None)
    with pytest.raises(VirtualWidthError, match=r"install megatron-bridge .* or use vwn-convert\.$"):
        importlib.import_module(BRIDGE)
