"""Every field of a configuration reaches a Megatron-Bridge provider, or is refused; without that package."""

import importlib
import inspect
from importlib.util import find_spec

import pytest
from checkpoint.bridge_cases import BASE, CHANGED, INEXPRESSIBLE, SAID_BY_THE_PATTERN

from megatron_vwn.checkpoint.bridge_settings import OF_HUGGING_FACE, known_config, provider_settings
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.hf import VWNConfig

FIELDS = {name for name in inspect.get_annotations(VWNConfig) if name not in ("model_type", "default_theta")}


def test_the_fields_are_all_known():
    assert CHANGED.keys() | set(OF_HUGGING_FACE) | set(SAID_BY_THE_PATTERN) >= FIELDS
    assert not CHANGED.keys() & set(OF_HUGGING_FACE)


@pytest.mark.parametrize("name", CHANGED)
def test_a_field_changes_the_provider(name):
    value, further = CHANGED[name]
    before = known_config(VWNConfig(**BASE | further), "here")
    after = known_config(VWNConfig(**BASE | further | {name: value}), "here")
    assert getattr(before, name) != getattr(after, name)
    if name in INEXPRESSIBLE:
        with pytest.raises(VirtualWidthError, match="Megatron has no"):
            provider_settings(after)
        return
    assert provider_settings(before) != provider_settings(after)


@pytest.mark.skipif(find_spec("megatron.bridge") is not None, reason="needs an environment without Megatron-Bridge")
def test_without_the_package_one_sentence_says_so():
    with pytest.raises(VirtualWidthError, match=r"install megatron-bridge .* or use vwn-convert\.$"):
        importlib.import_module("megatron_vwn.checkpoint.bridge")
