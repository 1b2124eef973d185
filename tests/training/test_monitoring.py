"""What monitoring finds in parallel layouts, and for routing whose answer is known."""

import json
from pathlib import Path

import launch
import pytest
import torch
from parallel.cases import FULL_RECOMPUTE, NGRAMS, PP2, PP2_VPP2, RANKS, SELECTIVE, TP2, TP2_SP, Case, Layout, stream

from megatron_vwn.training.monitoring.depth import (
    carry_gains,
    depth_windows,
    independent_directions,
    participation_ratio,
    receptive_field,
)

TESTS = Path(__file__).parents[1]
TP2_SP_PP2 = Layout(tp=2, pp=2, sequence_parallel=True)
SHARDED = {"distributed_optimizer": True}
# name -> layout, case in it.
LAYOUTS: dict[str, tuple[Layout, Case]] = {
    "TP2+SP, distributed optimizer": (Layout(tp=2, sequence_parallel=True, **SHARDED), Case("*-*-")),
    "TP2 width, n-grams": (Layout(tp=2, **SHARDED), Case("*-*-", stream(**NGRAMS))),
    "TP2 width, sigmoid, r = 3/2": (TP2, Case("*-*", stream(2, 3, gate="sigmoid"))),
    "TP2 replicated, static": (TP2, Case("*-", stream(connection="static", partition="replicated"))),
    "PP2, distributed optimizer": (Layout(pp=2, **SHARDED), Case("*-*-")),
    "PP2 x VPP2, identity carry, stream recompute": (
        PP2_VPP2,
        Case("*-*-*-*-", stream(carry="identity", recompute_block=2)),
    ),
    "TP2+SP x PP2, two further predictions, full recompute": (
        TP2_SP_PP2,
        Case("*-*-/*-/*-").but(**FULL_RECOMPUTE),
    ),
    "PP2, one layer for two further predictions": (PP2, Case("*-/*-/*-").but(mtp_use_repeated_layer=True)),
    "EP2, a further prediction, selective recompute": (
        Layout(ep=2, **SHARDED),
        Case("*E/*E", stream(embedding="tiled")).but(**SELECTIVE),
    ),
    "CP2 x TP2+SP, doubly stochastic carry": (
        Layout(cp=2, tp=2, sequence_parallel=True),
        Case("--", stream(carry="doubly-stochastic")),
    ),
    "full recompute, (1,4)": (Layout(), Case("*-*-", stream(1, 4)).but(**FULL_RECOMPUTE)),
    "DP4 in bf16": (Layout(), Case("*-").but(bf16=True)),
    "TP2+SP, sigmoid with an identity carry": (TP2_SP, Case("*-", stream(gate="sigmoid", carry="identity"))),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    report = tmp_path_factory.mktemp("monitoring") / "report.jsonl"
    run = launch.session(RANKS, TESTS / "training" / "session_monitoring.py", report, env=launch.WITHOUT_GPU)
    lines = report.read_text().splitlines() if report.exists() else []
    return {e["check"]: e for e in map(json.loads, lines)}, f"ended with {run.returncode}\n{run.stderr[-6000:]}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_snapshot_of_a_layout(name, outcomes):
    done, log = outcomes
    assert name in done, f"the session ended before this check; {log}"
    assert done[name]["passed"], done[name]["detail"]


N, M, LENGTH = 6, 2, 5
FIRST = torch.eye(N, M, dtype=torch.float64)  # the first m segments
ALL, NONE = torch.eye(N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
TO_ALL = FIRST[:M].repeat(1, N // M)  # segment i of an output to every segment j with i = j mod m


def chain(read, carry, write):
    return [read] * LENGTH, [carry] * LENGTH, [write] * LENGTH


def test_depth_window_of_an_ordinary_residual_stream():
    # Everything is kept: every sublayer reads all outputs before it, and the first state, alike.
    field = receptive_field(*chain(FIRST, ALL, TO_ALL))
    assert torch.allclose(field, torch.ones_like(field).tril())
    assert depth_windows(field).tolist() == [0, 1, 1.5, 2, 2.5]


def test_depth_window_of_a_copy_of_the_previous_sublayer():
    field = receptive_field(*chain(FIRST, NONE, TO_ALL))
    expected = torch.zeros(LENGTH, LENGTH + 1, dtype=torch.float64)
    expected[0, 0] = 1
    for row in range(1, LENGTH):
        expected[row, row] = 1
    assert torch.allclose(field, expected)
    assert depth_windows(field).tolist() == [0, 1, 1, 1, 1]


def test_depth_window_where_everything_is_forgotten():
    # What sublayers write lands in segments that nobody reads, and is carried nowhere else.
    write = torch.zeros(M, N, dtype=torch.float64)
    write[:, M : 2 * M] = torch.eye(M)
    field = receptive_field(*chain(FIRST, ALL, write))
    assert not field[:, 1:].any() and field[:, 0].tolist() == [1.0] * LENGTH
    assert depth_windows(field).tolist() == [0] * LENGTH


def test_depth_window_of_a_delay_line():
    # Each carry moves the segments on by m: with n = 3 m a sublayer reads what was written three sublayers ago.
    carry = torch.zeros(N, N, dtype=torch.float64)
    for j in range(N - M):
        carry[j, j + M] = 1
    read = torch.zeros(N, M, dtype=torch.float64)
    read[N - M :] = torch.eye(M)
    windows = depth_windows(receptive_field(*chain(read, carry, FIRST.T.contiguous())))
    assert windows.tolist() == [0, 0, 0, 3, 3]


def test_gains_of_carries():
    generator = torch.Generator().manual_seed(0)
    carries = [torch.randn(N, N, generator=generator, dtype=torch.float64) for _ in range(3)]
    gains = carry_gains(carries)
    product = carries[1] @ carries[2]
    # What A_carry^T does to a state: rows of the transpose are sums over sources.
    assert torch.isclose(gains[1, 0], product.T.abs().sum(1).max()) and gains[1, 0] != gains[1, 1]
    assert torch.isclose(gains[1, 1], product.T.abs().sum(0).max())
    assert torch.isclose(gains[1, 2], product.abs().sum() / N)
    assert torch.equal(carry_gains([ALL] * 3), torch.ones(3, 3, dtype=torch.float64))
    assert carry_gains([2 * ALL] * 3)[:, 2].tolist() == [8, 4, 2]


def test_participation_ratio():
    assert participation_ratio(torch.ones(N)) == N
    assert participation_ratio(torch.tensor([5.0, 0, 0])) == 1
    h = torch.randn(N, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert independent_directions(h @ h.T) > 0.98 * N
    h[M:] = h[:M].repeat(N // M - 1, 1)  # copies
    assert abs(independent_directions(h @ h.T) - M) < 0.02
