"""What ``--vwn-kernels`` means, for what a machine has and a stream is."""

import json
from argparse import Namespace

import pytest

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.flags.machine import local_layers_cost
from megatron_vwn.training.refusals.kernels import describe_kernels, kernel_fallbacks, refuse_kernels


def arguments(**changes):
    plain = {
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "layernorm_epsilon": 1e-5,
        "hidden_size": 64,
        "normalization": "RMSNorm",
        "hybrid_layer_pattern": "*-*-",
    }
    return Namespace(**(plain | changes))


ONE_RANK = arguments()
WIDTH = arguments(tensor_model_parallel_size=2)


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
        ({}, arguments(layernorm_epsilon=0.0), True, "torch operations instead of Triton kernels (they need an eps"),
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


@pytest.mark.parametrize(
    ("settings", "changes", "gpu", "said"),
    [
        ({}, {}, True, []),
        ({}, {}, False, []),  # torch is what a CPU has
        ({"kernels": "torch"}, {"normalization": "LayerNorm"}, True, []),
        ({"n": 128}, {}, True, ["more than ten times their memory traffic (they hold"]),
        # One reason for both is said once.
        ({}, {"tensor_model_parallel_size": 2}, True, ["the width partition sums over ranks between"]),
        ({"kernels": "triton"}, {"normalization": "LayerNorm"}, True, ["of RMS norm, not of layer norm"]),
        ({"kernels": "triton"}, {"hidden_size": 32768}, True, ["32,768 channels are too many"]),
        ({"kernels": "triton", "reduce_norm": False}, {"normalization": "LayerNorm"}, True, []),
        (
            {"kernels": "triton", "reduce_norm": False},
            {"normalization": "LayerNorm", "hybrid_layer_pattern": "*-/*-"},
            True,
            ["of RMS norm, not of layer norm"],
        ),
    ],
)
def test_fallbacks_are_said_with_their_cost(settings, changes, gpu, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    virtual_width = VirtualWidthConfig(**{"m": 2, "n": 6, **settings})
    warnings = kernel_fallbacks(arguments(**changes), virtual_width, gpu=gpu)
    assert len(warnings) == len(said)
    assert all(words in warning and "traffic" in warning for words, warning in zip(said, warnings, strict=True))


@pytest.mark.parametrize(("implementation", "gpu", "said"), [("local", True, True), ("local", False, False)])
def test_local_layers_on_a_gpu_are_said_with_their_cost(implementation, gpu, said):
    sizes = {"num_attention_heads": 16, "micro_batch_size": 1, "seq_length": 4096, "bf16": True, "fp16": False}
    cost = local_layers_cost(arguments(transformer_impl=implementation, **sizes), gpu=gpu)
    assert (cost is not None and "0.54 GB" in cost) == said
    assert local_layers_cost(arguments(transformer_impl="transformer_engine"), gpu=gpu) is None


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
