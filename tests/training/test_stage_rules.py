"""What is no pattern, pipeline ranks without experts, and which routers have losses that Megatron logs. Sublayers, and
how stages are cut, are compared with Megatron itself in test_refusals.py."""

import launch
import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.refusals.stages import (
    check_pattern,
    logs_router_losses,
    rank_without_experts,
    stages_of_ranks,
)


@pytest.mark.parametrize(
    ("pattern", "experts", "said"),
    [
        ("*-/", None, "'*-/' has a part without sublayers beside | or /"),
        ("/*-", None, "'/*-' has a part without"),
        ("*-/*-//*-", None, "has a part without"),
        ("*-||*-", None, "has a part without"),
        ("|*-", None, "has a part without"),
        ("*-|", None, "has a part without"),
        ("*-|/*-", None, "has a part without"),
        ("*-/*|-", None, "has | behind /"),
        ("*-/*-/-*", None, "further predictions of unlike sublayers"),
        ("*-Q", None, "has 'Q', which is no sublayer: write * (attention)"),
        ("* -", None, "has ' ', which"),
        ("*-+-", None, "mixes * (attention) with +"),
        ("*E", None, "the sublayer E (experts) needs --num-experts"),
        ("*-/*E", 0, "the sublayer E (experts) needs --num-experts"),
        ("*-", 8, "--num-experts finds no sublayer E"),
        (300 * "*" + "X", None, "*...' has 'X'"),
    ],
)
def test_what_is_no_pattern(pattern, experts, said):
    with pytest.raises(VirtualWidthError) as refusal:
        check_pattern(pattern, experts)
    assert said in str(refusal.value) and str(refusal.value).endswith(".") and len(str(refusal.value)) < 400


@pytest.mark.parametrize(("pattern", "experts"), [("*-", None), ("*-|*E/*E/*E", 4), ("+-D-", None), ("*-GM", 0)])
def test_what_is_a_pattern(pattern, experts):
    check_pattern(pattern, experts)


@pytest.mark.parametrize(
    ("pattern", "ranks", "cut", "said"),
    [
        ("*-|*E", 2, {}, "pipeline rank 0 of 2 has no experts (*-),"),
        ("*E|*-|*E|*-", 2, {}, "pipeline rank 1 of 2 has no experts (*-|*-),"),
        ("*E|*-|*-|*E", 2, {}, None),
        ("*E|*-/*E", 2, {}, None),
        ("*E|*-/*-", 2, {}, "pipeline rank 1 of 2 has no experts (*-/*-),"),
        ("*-*-*-*E", 2, {}, "pipeline rank 0 of 2"),
        ("*E*-*E", 2, {"first": 2}, None),
        ("*-*-*E", 2, {"last": 3}, "pipeline rank 0 of 2"),
        ("*-*-*E", 2, {"last": 1}, "pipeline rank 0 of 2"),
        ("*-|*-", 2, {}, None),
        ("*-*E", 1, {}, None),
        ("*-*E*", 2, {}, None),  # does not divide
    ],
)
def test_ranks_without_experts(pattern, ranks, cut, said):
    sentence = rank_without_experts(stages_of_ranks(pattern, ranks, **cut))
    assert (sentence is None) == (said is None)
    if said is not None:
        assert sentence.startswith(said) and sentence.endswith(".")


@pytest.mark.parametrize(
    ("balancing", "coefficients", "z_loss", "logged"),
    [
        ("aux_loss", 0.0, None, False),
        ("aux_loss", "0.0", None, False),
        ("aux_loss", "1e-3", None, True),
        (["none"], 0.1, None, False),
        (["seq_aux_loss", "aux_loss"], [0.0, 0.1], None, True),
        (["sinkhorn"], 0.0, 0.001, True),
        ("aux_loss", "much", None, False),
    ],
)
def test_which_routers_have_losses_that_are_logged(balancing, coefficients, z_loss, logged):
    assert logs_router_losses(balancing, coefficients, z_loss) == logged


def test_it_needs_neither_torch_nor_megatron():
    code = "import sys, megatron_vwn.training.refusals.stages; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    done = launch.real(0, "-c", code)
    assert done.stdout == "[]\n", done.stderr
