"""Every impossible virtual width is refused in one sentence that says what to change."""

from fractions import Fraction

import pytest

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError


@pytest.mark.parametrize(
    "settings,says",
    [
        ({"m": 0, "n": 2}, "at least 1"),
        ({"m": 2, "n": 2.5}, "whole number"),
        ({"m": True, "n": 2}, "whole number"),
        ({"m": 4, "n": 3}, "raise n to 4"),
        ({"m": 2, "n": 4, "gate": "relu"}, "tanh, sigmoid"),
        ({"m": 2, "n": 4, "connection": "both"}, "dynamic, static"),
        ({"m": 2, "n": 4, "carry": "half"}, "full, identity"),
        ({"m": 2, "n": 4, "embedding": "narrow"}, "wide, projected, tiled"),
        ({"m": 2, "n": 4, "partition": "token"}, "sequence, width, replicated"),
        ({"m": 2, "n": 3, "reduce_norm": True}, "--no-vwn-reduce-norm"),
        ({"m": 2, "n": 4, "recompute_block": 0}, "--vwn-recompute-block is 0: give a whole number of at least 1"),
        ({"m": 2, "n": 4, "recompute_block": 1.5}, "--vwn-recompute-block is 1.5"),
    ],
)
def test_values_no_model_can_have(settings, says):
    with pytest.raises(VirtualWidthError, match=says) as refusal:
        VirtualWidthConfig(**settings)
    assert "\n" not in str(refusal.value)


def test_defaults_follow_the_paper():
    wide, projected = VirtualWidthConfig(m=2, n=3), VirtualWidthConfig(m=8, n=64)
    assert (wide.embedding, wide.reduce_norm, wide.expansion) == ("wide", False, Fraction(3, 2))
    assert (projected.embedding, projected.reduce_norm, projected.expansion) == ("projected", True, 8)
    assert VirtualWidthConfig(m=2, n=7).reduce_norm is False
    assert VirtualWidthConfig(m=8, n=64).over_width(2048) == 16384


def test_the_backbone_must_be_divisible_and_its_head_untied():
    VirtualWidthConfig(m=4, n=8).check_model(hidden_size=32, tied_embeddings=False)
    with pytest.raises(VirtualWidthError, match="--vwn-m 5"):
        VirtualWidthConfig(m=5, n=8).check_model(hidden_size=32, tied_embeddings=False)
    with pytest.raises(VirtualWidthError, match="--untie-embeddings-and-output-weights"):
        VirtualWidthConfig(m=4, n=8).check_model(hidden_size=32, tied_embeddings=True)
    VirtualWidthConfig(m=4, n=16).check_model(hidden_size=32, tied_embeddings=True)


@pytest.mark.parametrize(
    "partition,sequence_parallel,tensor_parallel_size,outcome",
    [
        (None, True, 2, "sequence"),
        (None, False, 2, "width"),
        ("width", False, 1, "replicated"),
        ("replicated", False, 2, "replicated"),
        ("sequence", False, 2, "--sequence-parallel"),
        ("width", True, 2, "drop --sequence-parallel"),
        ("replicated", True, 2, "drop --sequence-parallel"),
        ("width", False, 16, "16 tensor-parallel ranks"),
        ("replicated", False, 3, "multiple of them"),
    ],
)
def test_partition_of_a_layout(partition, sequence_parallel, tensor_parallel_size, outcome):
    width = VirtualWidthConfig(m=4, n=8, partition=partition, ngrams=(2, 3), ngram_vocab=32)
    layout = {"tensor_parallel_size": tensor_parallel_size, "sequence_parallel": sequence_parallel}
    if outcome in ("sequence", "width", "replicated"):
        width.check_parallel(hidden_size=32, **layout)
        assert width.resolve_partition(**layout) == outcome
    else:
        with pytest.raises(VirtualWidthError, match=outcome):
            width.check_parallel(hidden_size=32, **layout)
