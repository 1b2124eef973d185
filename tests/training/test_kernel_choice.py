"""What ``--vwn-kernels`` means, for what a machine has and a stream is."""

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
