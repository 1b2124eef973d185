"""The cost formulas against the numbers that the paper prints, and against counts of tensors and products."""

import math
import subprocess
import sys

import pytest

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import Width

D = 2048
PAIRS = [(1, 1), (1, 4), (1, 8), (2, 3), (2, 4), (4, 16), (4, 32), (8, 64)]


@pytest.mark.parametrize("m,n,norm_dynamic_width,depth", [(2, 3, 42, 6), (8, 64, 2464, 128), (1, 8, 336, 16)])
def test_flops_as_the_paper_prints_them(m, n, norm_dynamic_width, depth):
    flops = costs.paper_flops(Width(m, n, D))
    assert flops["norm"] + flops["dynamic"] + flops["width"] == norm_dynamic_width * D
    assert flops["depth"] == depth * D


def test_shares_as_the_paper_prints_them():
    assert sum(costs.paper_flops(Width(8, 64, D)).values()) * 2 == 5184 * D
    shares = {d: round(100 * costs.paper_share_of_dense_layer(Width(8, 64, d)), 1) for d in (1024, 2048, 4096)}
    assert shares == {1024: 21.1, 2048: 10.5, 4096: 5.3}
    half = costs.paper_share_of_dense_layer(Width(4, 32, D)) / costs.paper_share_of_dense_layer(Width(8, 64, D))
    assert half == pytest.approx(0.5, abs=0.01)
    assert costs.paper_kept_bytes(Width(2, 3, D)) == 10 * D
    kept = costs.paper_kept_bytes_with_recompute(Width(2, 3, D), 0.5)
    assert kept == 3 * D and round(100 * kept / (34 * D), 1) == 8.8
    assert round(100 * costs.paper_kept_bytes_with_recompute(Width(8, 64, D), 0.5) / (34 * D)) == 47


@pytest.mark.parametrize("m,n", PAIRS)
def test_traffic_is_the_sum_of_the_tensors(m, n):
    """Sizes of the tensors that an op touches, written down one by one."""
    width = Width(m, n, D)
    h = dh = n * D // m
    x = y = dx = dy = D
    touched = {
        ("read", "forward"): [h, x],
        ("read", "backward"): [h, dx, dh, dh],
        ("write", "forward"): [h, y, h],
        ("write", "backward"): [h, y, dh, dh, dy],
        ("connection", "forward"): [h, x, h, y, h],
        ("connection", "backward"): [h, dx, dh, dh, h, y, dh, dh, dy],
        ("write_read", "forward"): [h, y, h, x],
        ("write_read", "backward"): [h, y, dx, dh, dh, dy],
        ("reduce_norm", "forward"): [h, h],
        ("reduce_norm", "backward"): [h, dh, dh],
    }
    assert {key: costs.elements(*key, width) for key in touched} == {key: sum(sizes) for key, sizes in touched.items()}


@pytest.mark.parametrize("m,n", PAIRS)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("mixes", [True, False])
def test_matrix_flops_are_the_sum_of_the_products(m, n, dynamic, mixes):
    """2abc for each product of an [a, b] with a [b, c] matrix that a connection is made of."""
    width = Width(m, n, D, dynamic=dynamic, mixes=mixes)
    e, carry = D // m, n if mixes else 0
    forward = {
        "read": 2 * n * e * (2 * m + carry) * dynamic + 2 * m * n * e,
        "write": 2 * carry * n * e + 2 * n * m * e,
        "reduce_norm": 0,
    }
    forward |= dict.fromkeys(("connection", "write_read"), forward["read"] + forward["write"])
    for op, products in forward.items():
        assert costs.matrix_flops(op, "forward", width) == products
        assert costs.matrix_flops(op, "backward", width) == 2 * products


def test_matrix_flops_of_the_largest_pair():
    width = Width(8, 64, D)
    assert costs.matrix_flops("write_read", "forward", width) == 2560 * D
    assert costs.matrix_flops("write_read", "backward", width) == 2 * 2560 * D
    # The same products that the paper counts, less the norm.
    assert sum(costs.paper_flops(width).values()) - costs.paper_flops(width)["norm"] == 2560 * D


def test_floor_is_the_larger_of_traffic_and_products():
    width = Width(8, 64, D)
    arguments = ("write_read", "forward", width, 8192)
    assert costs.floor_seconds(*arguments, bandwidth=4e12, flop_rate=math.inf) == pytest.approx(
        18 * D * 2 * 8192 / 4e12
    )
    assert costs.floor_seconds(*arguments, bandwidth=math.inf, flop_rate=1e14) == pytest.approx(2560 * D * 8192 / 1e14)
    slow, fast = (costs.floor_seconds(*arguments, bandwidth=4e12, flop_rate=rate) for rate in (1e14, 1e16))
    assert slow > fast == costs.floor_seconds(*arguments, bandwidth=4e12, flop_rate=math.inf)
    fp32 = costs.floor_seconds(*arguments, bandwidth=4e12, flop_rate=math.inf, element_bytes=4)
    assert fp32 == pytest.approx(2 * fast)


def test_layer_overhead_is_two_connections_both_ways():
    width, parameters = Width(8, 64, D), 56.6e6
    overhead = costs.layer_overhead_floor(width, parameters, bandwidth=4.8e12, baseline_flop_rate=280e12)
    assert overhead == pytest.approx(4 * (5 * 8 + 5) * D / 4.8e12 / (6 * parameters / 280e12))
    assert round(100 * overhead, 1) == 6.3
    assert costs.layer_overhead_floor(Width(2, 3, D), parameters, bandwidth=4.8e12, baseline_flop_rate=280e12) == (
        pytest.approx(overhead * 12.5 / 45)
    )


def test_stream_memory_with_recompute():
    """r = 8, 48 layers: the states of the paper's largest model, in units of D bytes per layer."""
    width, connections = Width(8, 64, D), 96
    block = costs.best_block(connections)
    per_layer = {
        "everything": costs.kept_stream_bytes(width, connections),
        "rebuilt": costs.kept_stream_bytes(width, connections, block=block),
        "inputs kept": costs.kept_stream_bytes(width, connections, block=block, rebuild_input=False),
        "two levels": costs.kept_stream_bytes_of_two_levels(width, connections, outer=4, inner=5),
    }
    per_layer = {name: total / 48 / D for name, total in per_layer.items()}
    # Of 64 x 80 logits and 64 fp32 numbers, 5.1 D bytes, beside a state of 16 D.
    gates = costs.gate_bytes(width) / D
    assert gates == (64 * 80 * 2 + 64 * 4) / D == 5.125
    assert per_layer["everything"] == 36 + 2 * gates
    states = math.ceil(connections / block) + block
    assert 6.5 <= per_layer["rebuilt"] - states * gates / 48 <= 7
    assert per_layer["inputs kept"] == pytest.approx(per_layer["rebuilt"] + 4)
    assert per_layer["two levels"] == pytest.approx(4.6 * (16 + gates) / 16, abs=0.15)


@pytest.mark.parametrize("connections", [1, 2, 7, 96, 100, 241])
def test_best_block_is_the_best(connections):
    width = Width(4, 32, D)
    every = [costs.kept_stream_bytes(width, connections, block=k) for k in range(1, connections + 1)]
    assert costs.kept_stream_bytes(width, connections, block=costs.best_block(connections)) == min(every)
    assert abs(costs.best_block(connections) - math.sqrt(connections)) <= 3


def test_what_lives_while_a_block_runs_is_once_in_what_is_kept():
    width, connections, block = Width(4, 16, D), 12, 4
    once, gates = costs.once_stream_bytes(width, block), 16 * (24 * 2 + 4)
    assert costs.gate_bytes(width) == gates
    assert once == 2 * (4 + 1) * 4 * D + 4 * gates
    assert costs.kept_stream_bytes(width, connections, block=block) == once + 3 * (2 * 4 * D + gates)
    assert costs.gate_bytes(Width(4, 16, D, mixes=False), element_bytes=4) == 16 * (8 * 4 + 4)
    assert costs.gate_bytes(Width(4, 16, D, dynamic=False)) == 0


def test_flops_of_the_ends_and_of_a_fusion():
    width = Width(4, 16, 32)
    assert costs.end_flops(width) == 2 * 32 * 128
    # Each of the 16 segments is made from two of E = 8.
    assert costs.fusion_flops(width) == 16 * 2 * (2 * 8) * 8


def test_the_stream_of_a_configuration():
    assert Width.of(VirtualWidthConfig(m=2, n=4), 8) == Width(2, 4, 8)
    static = VirtualWidthConfig(m=2, n=4, connection="static", carry="identity")
    assert Width.of(static, 8) == Width(2, 4, 8, dynamic=False, mixes=False)


@pytest.mark.parametrize("m,n,hidden", [(0, 1, 8), (4, 3, 8), (3, 4, 8), (2, 4, 0)])
def test_impossible_widths_are_refused(m, n, hidden):
    with pytest.raises(ValueError, match="m must divide the hidden size"):
        Width(m, n, hidden)


def test_impossible_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        costs.kept_stream_bytes(Width(1, 4, D), 8, block=0)


def test_needs_no_torch():
    """Read as a file, as the package's own __init__ imports torch: a planner must not wait for it."""
    program = (
        "import runpy, sys; ns = runpy.run_path(sys.argv[1]);"
        "assert 'torch' not in sys.modules; print(ns['elements']('read', 'forward', ns['Width'](2, 3, 8)))"
    )
    run = subprocess.run([sys.executable, "-c", program, costs.__file__], capture_output=True, text=True)
    assert run.stdout.strip() == "20", run.stderr
