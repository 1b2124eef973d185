"""What ``--vwn-kernels`` means, for what a machine has and a stream is."""

import json
from argparse import Namespace

import pytest

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.refusals.kernels import describe_kernels, refuse_kernels

ONE_RANK = Namespace(tensor_model_parallel_size=1, sequence_parallel=False)
WIDTH = Namespace(tensor_model_parallel_size=2, sequence_parallel=False)


@pytest.mark.parametrize(
    "settings,args,gpu,sentence",
    [
        ({}, ONE_RANK, True, "fused Triton kernels"),
        ({"kernels": "triton"}, ONE_RANK, True, "fused Triton kernels"),
        ({"kernels": "torch"}, ONE_RANK, True, "torch operations"),
        ({}, ONE_RANK, False, "torch operations instead of Triton kernels (there is no GPU)"),
        ({}, WIDTH, True, "torch operations instead of Triton kernels (the width partition"),
        (
            {"carry": "doubly-stochastic"},
            ONE_RANK,
            True,
            "torch operations instead of Triton kernels (they have no doubly",
        ),
        ({"n": 128}, ONE_RANK, True, "torch operations instead of Triton kernels (they hold the carry"),
    ],
)
def test_what_is_said(settings, args, gpu, sentence, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    virtual_width = VirtualWidthConfig(**{"m": 2, "n": 6, **settings})
    said = describe_kernels(args, virtual_width, gpu=gpu)
    assert said.startswith(sentence) and (said == sentence or sentence.endswith(")") or "(" in sentence)


@pytest.mark.parametrize(
    "settings,args,gpu,reason",
    [
        ({}, ONE_RANK, False, "there is no GPU"),
        ({}, WIDTH, True, "width partition"),
        ({"carry": "doubly-stochastic"}, ONE_RANK, True, "doubly stochastic"),
        ({"n": 128}, ONE_RANK, True, "64 at most"),
    ],
)
def test_what_is_refused(settings, args, gpu, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    virtual_width = VirtualWidthConfig(**{"m": 2, "n": 6, "kernels": "triton", **settings})
    with pytest.raises(VirtualWidthError, match=reason):
        refuse_kernels(args, virtual_width, gpu=gpu)


def test_the_interpreter_is_used_when_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    virtual_width = VirtualWidthConfig(m=2, n=6, kernels="triton")
    assert describe_kernels(ONE_RANK, virtual_width, gpu=False) == "fused Triton kernels in Triton's interpreter"
    assert "there is no GPU" in describe_kernels(ONE_RANK, VirtualWidthConfig(m=2, n=6), gpu=False)


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """A file of tiles, to be written."""
    geometry = pytest.importorskip("megatron_vwn.ops.kernels.geometry")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VWN_TILES", str(tmp_path / "tiles.json"))
    geometry.forget_tuned()
    yield tmp_path / "tiles.json"
    geometry.forget_tuned()


def test_measured_tiles_are_used_and_said_and_those_of_another_triton_are_not(tiles, monkeypatch):
    import torch
    import triton

    from megatron_vwn.ops.kernels import geometry

    monkeypatch.setattr(geometry, "_architecture", lambda device: "sm_90")
    row = {"kernel": "wide_forward", "n": 64, "architecture": "interpreter", "triton": triton.__version__}
    mine, other = {**row, "tile": {"channels": 16}}, {**row, "architecture": "sm_90", "triton": "1.0", "tile": {}}
    tiles.write_text(json.dumps([mine, other]))
    virtual_width = VirtualWidthConfig(m=2, n=6)
    said = describe_kernels(ONE_RANK, virtual_width, gpu=True)
    assert said == f"fused Triton kernels with 1 tiles measured on this machine ({tiles})"
    assert geometry.tuned() == {("wide_forward", 64, "interpreter"): geometry.Tile(channels=16)}
    assert geometry.tile("weight", 64, torch.device("cpu")) == geometry.TABLE["weight", 64, "any"]


@pytest.mark.parametrize("content", ["{", "[1]", '[{"kernel": 1}]', '[{"triton": "%s", "tile": {"size": 1}}]'])
def test_a_broken_file_of_tiles_is_refused(tiles, content):
    import triton

    tiles.write_text(content.replace("%s", triton.__version__))
    with pytest.raises(VirtualWidthError, match="remove it, or run vwn-benchmark tune"):
        describe_kernels(ONE_RANK, VirtualWidthConfig(m=2, n=6), gpu=True)
