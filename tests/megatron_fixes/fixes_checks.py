"""Tests of megatron_vwn.megatron_fixes; test_wheel_fixes.py runs them in a pytest of their own.

They import Megatron without the CPU emulation, which is no matter for the process of other tests; so the file is named
such that pytest does not collect it.
"""

import sys
from pathlib import Path

import megatron.core.datasets
import pytest
from megatron.core.datasets import utils
from megatron.core.optimizer import distrib_optimizer

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes

OPTIMIZER = distrib_optimizer.DistributedOptimizer
PATCHED = [
    (utils, "compile_helpers"),
    (OPTIMIZER, "state_dict"),
    (OPTIMIZER, "load_state_dict"),
    (OPTIMIZER, "_set_main_param_and_optimizer_states"),
]


@pytest.fixture(autouse=True)
def megatron_as_imported(monkeypatch):
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    apply_fixes.cache_clear()


def state():
    return [getattr(owner, name) for owner, name in PATCHED]


def test_applies_once():
    before = state()
    apply_fixes()
    after = state()
    assert all(old is not new for old, new in zip(before, after, strict=True))
    apply_fixes()
    assert state() == after


def test_does_not_compile_what_is_compiled():
    apply_fixes()
    utils.compile_helpers()  # the original would run make and exit


def test_leaves_fused_adam_alone(monkeypatch):
    before = state()
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    apply_fixes()
    assert state()[1:] == before[1:]


def test_leaves_the_makefile_of_a_source_checkout_alone(monkeypatch, tmp_path):
    before = state()
    Path(tmp_path, "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    apply_fixes()
    assert state()[0] is before[0]


def test_leaves_helpers_that_are_not_compiled_to_the_compiler(monkeypatch):
    before = state()
    monkeypatch.delattr(megatron.core.datasets, "helpers_cpp", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)  # None: the import fails
    apply_fixes()
    assert state()[0] is before[0]


@pytest.mark.parametrize("owner, name", PATCHED)
@pytest.mark.parametrize("found", [None, lambda other: None])
def test_refuses_a_megatron_without_what_it_repairs(monkeypatch, owner, name, found):
    monkeypatch.setattr(owner, name, found)
    with pytest.raises(VirtualWidthError, match=rf"^megatron-core 0\.19.* has no .*\.{name}\(.*\.$"):
        apply_fixes()


def test_refuses_a_megatron_that_does_not_name_its_adam(monkeypatch):
    monkeypatch.delattr(distrib_optimizer, "HAVE_APEX_OR_TE")
    with pytest.raises(VirtualWidthError, match=r"^megatron-core 0\.19.*HAVE_APEX_OR_TE.*\.$"):
        apply_fixes()
