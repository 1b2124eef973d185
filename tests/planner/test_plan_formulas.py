"""The planner's arithmetic on a model so small that every figure is worked out by hand, on rates of 10^6 per second.

Two stages, "*-" and "*E": D = 8, two heads of 4 channels, one key head, F = 32, four experts of 16 channels, two per
token, 64 rows, one sequence of 16 tokens per micro-batch, PP2, EP2, DP2 on one node.
"""

from dataclasses import asdict, replace
from itertools import product

import pytest

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.ops.costs import PASSES, Width, floor_seconds
from megatron_vwn.planner import kernel_times
from megatron_vwn.planner.activations import connection_bytes, rebuilding_bytes, sublayer_bytes
from megatron_vwn.planner.costs import (
    data_bytes,
    edge_flops,
    micro_batch_bytes,
    micro_batch_seconds,
    pipeline_bytes,
    sent_bytes,
    step_time,
)
from megatron_vwn.planner.hardware import HARDWARE, Rates
from megatron_vwn.planner.memory import in_flight, kept_bytes, once_bytes, rank_memory
from megatron_vwn.planner.recompute import Recompute, kinds
from megatron_vwn.planner.shape import Parameters, Shape, shape_of
from megatron_vwn.recipes.recipe import Recipe, load_recipe
from megatron_vwn.recipes.width import virtual_width_of

# fmt: off
SMALL = Shape(
    hidden=8, ffn=32, heads=2, groups=1, head_channels=4, gated=True, qk_norm=False, tied=False, fused_loss=True,
    experts=4, top_k=2, expert_ffn=16, shared_ffn=0, vocabulary=64, sequence=16, width=None, virtual_width=None,
    stages=("*-", "*E"), predictions=(), tensor=1, pipeline=2, virtual=1, context=1, expert=2, data=2,
    sequence_parallel=False, partition="sequence", gpus=4, gpus_per_node=4, micro_batch=1, batch=8, granularity="",
    method="", recompute_layers=1, modules=("core_attn",), block=None, shards_optimizer=True, overlaps_gradients=False,
    gradient_bytes=4, optimizer_bytes=12,
)
# fmt: on
HELD = [Parameters(dense=1000), Parameters(dense=800, experts=600)]
SLOW = Rates(
    memory_gb=1,
    matrix_tflops=1e-6,
    memory_gbs=1e-3,
    nvlink_gbs=1e-3,
    network_gbs=5e-4,
    **dict.fromkeys(("matrix_share", "expert_share", "attention_share", "memory_share", "link_share"), 1.0),
)
# One pass: two terms read and their sum written, D channels of 16 tokens in bf16.
RESIDUAL = 3 * 2 * 16 * 8
WIDE = replace(
    SMALL,
    width=Width(2, 4, 8),
    virtual_width=VirtualWidthConfig(m=2, n=4, embedding="projected", reduce_norm=False),
)


def micro(seconds: float) -> float:
    return pytest.approx(seconds * 1e6, abs=1e-6)


def test_what_the_passes_of_a_micro_batch_take():
    first, last = (micro_batch_seconds(SMALL, rank, SLOW) for rank in (0, 1))
    # Products 4 D (q + k), scores and values 2 q S, norm twice D in bf16: three passes; two of the residual.
    attention = 3 * (4 * 8 * 12 * 16 + 2 * 8 * 16 * 16 + 2 * 16 * 8 * 2) + RESIDUAL * 2
    assert attention == micro(first["attention"]) == micro(last["attention"])
    assert micro(first["MLP"]) == 3 * (6 * 8 * 32 * 16 + 2 * 16 * 8 * 2) + RESIDUAL * 2
    # The router, two experts per token, and two copies that are gathered and added up.
    assert micro(last["experts"]) == 3 * (2 * 8 * 4 * 16 + 6 * 8 * 16 * 2 * 16 + 2 * 16 * 8 * 10) + RESIDUAL * 2
    assert micro(last["head"]) == 3 * 2 * 8 * 64 * 16
    assert "head" not in {name for name, value in first.items() if value}
    # Half of two copies of D + a weight, there and back, in both passes.
    assert micro(last["EP communication"]) == 2 * 16 * (4 * 8 + 4)


def test_a_step_and_its_parts():
    step = step_time(SMALL, HELD, SLOW)
    one = sum(micro_batch_seconds(SMALL, 1, SLOW).values())
    assert one == pytest.approx(170112e-6)
    assert {name: round(seconds * 1e6) for name, seconds in step.parts.items() if seconds} == {
        "attention": 4 * 33792,
        "experts": 4 * 86016,
        "head": 4 * 49152,
        "EP communication": 4 * 1152,
        "pipeline messages": 4 * 512,
        "bubble": 170112 + 512,
        "gradients and weights": 3000,
        "optimizer": 34 * 1000,
    }
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.tokens_per_second == pytest.approx(8 * 16 / step.seconds)
    assert step.sent == {"EP": 4 * 1152, "PP": 4 * 512, "DP": 2400}


def test_rates_and_their_shares():
    full = sum(micro_batch_seconds(SMALL, 1, SLOW).values())
    for name, part in (("matrix_share", "head"), ("expert_share", "experts"), ("attention_share", "attention")):
        slower = micro_batch_seconds(SMALL, 1, replace(SLOW, **{name: 0.5}))
        assert slower[part] > micro_batch_seconds(SMALL, 1, SLOW)[part]
    assert sum(micro_batch_seconds(SMALL, 1, replace(SLOW, matrix_tflops=5e-7)).values()) > 1.8 * full
    two_nodes = replace(SMALL, gpus_per_node=2)
    assert step_time(two_nodes, HELD, SLOW).parts["pipeline messages"] == pytest.approx(4 * 1024e-6)
    assert step_time(two_nodes, HELD, SLOW).parts["gradients and weights"] == pytest.approx(3000e-6)
    one_each = replace(SMALL, gpus_per_node=1)
    assert step_time(one_each, HELD, SLOW).parts["gradients and weights"] == pytest.approx(6000e-6)
    assert step_time(one_each, HELD, SLOW).parts["EP communication"] == pytest.approx(4 * 2304e-6)
    # Ranks are numbered along TP, then CP; and experts' along EP: two of either are on one node of two.
    tensors = replace(SMALL, tensor=2, data=1, gpus_per_node=2)
    seconds = micro_batch_seconds(tensors, 0, SLOW)["TP communication"]
    assert seconds == pytest.approx(micro_batch_bytes(tensors, 0)["TP"] * 1e-6)
    assert micro_batch_seconds(replace(SMALL, gpus=8, data=4, gpus_per_node=2), 1, SLOW)[
        "EP communication"
    ] == pytest.approx(1152e-6)


def test_the_fullest_rank_of_experts_computes_sends_and_keeps_more():
    even, fuller = (micro_batch_seconds(shape, 1, SLOW) for shape in (SMALL, replace(SMALL, imbalance=2)))
    assert fuller["experts"] - even["experts"] == pytest.approx(3 * 24576e-6)
    assert fuller["EP communication"] == pytest.approx(2 * even["EP communication"])
    more = sublayer_bytes("E", replace(SMALL, imbalance=2), "fused") - sublayer_bytes("E", SMALL, "fused")
    assert more == 16 * 2 * (2 * 8 + 6 * 16 + 4)
    # All ranks of one expert-parallel rank's group have all experts, and each computes its own tokens.
    recipe = load_recipe("moe-0.4b-4b")
    assert shape_of(recipe, 1.1).imbalance == 1.1
    assert shape_of(recipe.with_values({"expert-model-parallel-size": 1}), 1.1).imbalance == 1


def test_messages_of_experts_hide_behind_the_shared_expert():
    shared = replace(SMALL, shared_ffn=4)
    waiting, hidden = (
        micro_batch_seconds(shape, 1, SLOW)["EP communication"]
        for shape in (shared, replace(shared, overlaps_shared=True))
    )
    # 288 bytes there behind 2048 FLOPs, 288 back behind 1024, and behind twice as many in the backward pass.
    assert waiting == pytest.approx(2 * 576e-6) and hidden == pytest.approx(0)
    slow = replace(SLOW, nvlink_gbs=1e-4)
    exposed = micro_batch_seconds(replace(shared, overlaps_shared=True), 1, slow)["EP communication"]
    assert exposed == pytest.approx((2880 - 2048 + 2880 - 1024 + 2880 - 2048) * 1e-6)
    # On several ranks its gathered input is kept and not gathered again.
    tensors = replace(shared, tensor=2, data=1, sequence_parallel=True)
    overlapped = replace(tensors, overlaps_shared=True)
    assert micro_batch_bytes(tensors, 1)["TP"] - micro_batch_bytes(overlapped, 1)["TP"] == 0.5 * 2 * 16 * 8
    assert sublayer_bytes("E", overlapped, "fused") - sublayer_bytes("E", tensors, "fused") == 2 * 16 * 8


def test_the_margin_of_the_memory():
    assert HARDWARE["h100"].usable == pytest.approx(72e9)
    assert replace(SLOW, memory_margin=0.25).usable == pytest.approx(0.75e9)


def test_gradients_hide_behind_a_micro_batch_and_no_more():
    hiding = replace(SMALL, overlaps_gradients=True)
    assert step_time(hiding, HELD, SLOW).parts["gradients and weights"] == 0
    many = [Parameters(dense=100_000), HELD[1]]
    left = 300_000 - 0.8 * 170112
    assert step_time(hiding, many, SLOW).parts["gradients and weights"] == pytest.approx(left * 1e-6)


def test_interleaved_stages_shorten_the_bubble_and_hide_messages():
    virtual = replace(SMALL, stages=("*", "*", "-", "E"), virtual=2)
    step = step_time(virtual, HELD, SLOW)
    one = sum(micro_batch_seconds(virtual, 1, SLOW).values())
    assert pipeline_bytes(virtual) == 2 * 512
    assert step.parts["pipeline messages"] == 0
    assert step.parts["bubble"] == pytest.approx((one + 512e-6) / 2)


def test_data_parallel_bytes():
    # Gradients of four bytes are scattered, weights of two gathered; 3/4 of them on four ranks.
    assert data_bytes(SMALL, 1000, 4) == 0.75 * 1000 * 6
    assert data_bytes(replace(SMALL, gradient_bytes=2), 1000, 4) == 0.75 * 1000 * 4
    assert data_bytes(replace(SMALL, shards_optimizer=False), 1000, 4) == 2 * 0.75 * 1000 * 4
    assert data_bytes(SMALL, 1000, 1) == 0
    # Experts have copies on GPUs / (PP EP) ranks: on eight GPUs two.
    eight = replace(SMALL, gpus=8, data=4, batch=16)
    assert sent_bytes(eight, HELD[1], 1)["DP of experts"] == 0.5 * 600 * 6
    assert sent_bytes(eight, HELD[1], 1)["DP"] == 0.75 * 800 * 6
    two_tensors = replace(SMALL, tensor=2, data=1, sequence_parallel=True)
    summed = Parameters(dense=1000, summed=100)
    more = sent_bytes(two_tensors, summed, 0)["TP"] - sent_bytes(two_tensors, HELD[0], 0)["TP"]
    assert more == 2 * 0.5 * 4 * 100


def test_context_parallel_bytes():
    context = replace(SMALL, context=2, data=1)
    # Keys and values of the rank's own eight tokens, to one other rank: forward, again backward, and their gradients.
    assert micro_batch_bytes(context, 0)["CP"] == 3 * 2 * 2 * 8 * 4
    assert "CP communication" not in micro_batch_seconds(context, 0, SLOW)


def test_messages_are_as_wide_as_the_stream():
    assert pipeline_bytes(WIDE) == 2 * pipeline_bytes(SMALL) == 1024
    by_width = replace(WIDE, tensor=2, data=1, partition="width")
    assert pipeline_bytes(by_width) == 512
    by_sequence = replace(WIDE, tensor=2, data=1, sequence_parallel=True)
    assert pipeline_bytes(by_sequence) == 512
    assert rank_memory(WIDE, HELD[0], 0).buffers == 1024
    virtual = replace(WIDE, stages=("*", "*", "-", "E"), virtual=2)
    assert rank_memory(virtual, HELD[0], 0).buffers == 2048
    assert rank_memory(replace(SMALL, pipeline=1, stages=("*-*E",)), HELD[0], 0).buffers == 0


def test_memory_of_a_rank():
    first, last = (rank_memory(SMALL, held, rank) for rank, held in enumerate(HELD))
    assert (first.weights, first.gradients, first.optimizer, first.buffers) == (2000, 4000, 6000, 512)
    # Dense parameters are divided by two ranks, and experts have one copy each.
    assert (last.weights, last.gradients, last.optimizer) == (2800, 5600, 12 * (400 + 600))
    attention, mlp, experts = (sublayer_bytes(symbol, SMALL, "fused") for symbol in "*-E")
    # Norm 2D + 4 and its output 2D; queries, keys and values, output, and a log per head.
    assert attention == 16 * ((2 * 8 + 4) + 2 * 8 + 2 * (8 + 2 * 4) + 2 * 8 + 4 * 2)
    assert mlp == 16 * ((2 * 8 + 4) + 2 * 8 + 6 * 32)
    assert experts == 16 * ((2 * 8 + 4) + 2 * 8 + (16 * 4 + 4 + 32 * 2) + 2 * (2 * 8 + 6 * 16 + 4))
    # Two micro-batches in flight on the first stage, one on the last; tokens of the embedding, the final norm.
    assert first.activations == 2 * (attention + mlp + 8 * 16)
    assert last.activations == attention + experts + 16 * (2 * 8 + 4)
    # The head's input, logits and target of the loss, and the gradient of the logits.
    assert last.head == 16 * (2 * 8 + (2 * 64 + 9)) + 16 * 2 * 64
    assert (first.head, first.stream) == (0, 0)
    assert first.total == 2000 + 4000 + 6000 + 512 + first.activations
    assert rank_memory(replace(SMALL, shards_optimizer=False), HELD[1], 1).optimizer == 12 * 1400
    assert rank_memory(replace(SMALL, context=2, data=1), HELD[0], 0).optimizer == 6000


def test_the_stream_with_and_without_blocks():
    """In elements of two bytes: H, gates and Y of each connection, or H and gates of each block and Y; X is counted
    with the sublayers' norms."""
    gates = 4 * (8 + 2)  # of four segments: eight logits, and 1/rms in four bytes
    assert connection_bytes(WIDE, "fused", 5) == connection_bytes(WIDE, "local", 5) == 2 * 16 * 5 * (16 + gates + 8)
    blocks = replace(WIDE, block=2)
    # ceil(C/K) (rD + z) + CD + (ceil(C/K) - 1) D, less C D that fused norms counted and that is let go.
    assert connection_bytes(blocks, "local", 5) == 2 * 16 * (3 * (16 + gates) + 5 * 8)
    assert connection_bytes(blocks, "fused", 5) == 2 * 16 * (3 * (16 + gates) + 5 * 8 + 2 * 8 - 5 * 8)
    assert rebuilding_bytes(blocks, 5) == 2 * 16 * (2 - 1) * (16 + gates + 8)
    assert rebuilding_bytes(replace(WIDE, block=8), 5) == 2 * 16 * 4 * (16 + gates + 8)
    assert rebuilding_bytes(WIDE, 5) == connection_bytes(WIDE, "fused", 0) == 0
    # Whose ranks share H and Y, and not X and gates.
    by_width = replace(WIDE, tensor=2, data=1, partition="width")
    assert connection_bytes(by_width, "fused", 5) == 2 * 16 * 5 * (8 + gates + 4)
    assert connection_bytes(replace(by_width, block=2), "fused", 5) == 2 * 16 * (3 * 8 + 5 * (gates + 4))
    assert rebuilding_bytes(replace(by_width, block=2), 5) == 2 * 16 * 8
    without, with_blocks = (rank_memory(shape, HELD[0], 0) for shape in (WIDE, blocks))
    assert without.stream == 2 * connection_bytes(WIDE, "fused", 2)
    assert with_blocks.stream == 2 * connection_bytes(blocks, "fused", 2) + rebuilding_bytes(blocks, 2)
    assert with_blocks.activations == without.activations


def test_full_and_selective_recompute():
    uniform = replace(SMALL, granularity="full", method="uniform", recompute_layers=2)
    assert kept_bytes(uniform, "*-*-*") == (3 * 256, 0)
    assert once_bytes(uniform, "*-*-*")[0] == sum(sublayer_bytes(symbol, SMALL, "fused") for symbol in "*-")
    by_block = replace(uniform, method="block", recompute_layers=3)
    assert kept_bytes(by_block, "*-*-*")[0] == 3 * 256 + sum(sublayer_bytes(symbol, SMALL, "fused") for symbol in "-*")
    first = rank_memory(uniform, HELD[0], 0)
    assert first.activations == 2 * (256 + 8 * 16) + once_bytes(uniform, "*-")[0]
    wide = replace(WIDE, granularity="full", method="uniform", recompute_layers=2)
    assert kept_bytes(wide, "*-*-*") == (0, 3 * 512)
    again = micro_batch_seconds(uniform, 1, SLOW)
    residuals = 2 * RESIDUAL * 1e-6
    assert again["recompute"] == pytest.approx((again["attention"] + again["experts"] + residuals) / 3)
    assert micro_batch_seconds(by_block, 1, SLOW)["recompute"] == pytest.approx(again["recompute"])
    # What experts send goes again, too.
    assert again["EP communication"] == pytest.approx(1.5 * 1152e-6)
    chosen = replace(SMALL, granularity="selective", modules=("moe",))
    assert micro_batch_seconds(chosen, 1, SLOW)["recompute"] == pytest.approx((again["experts"] + residuals / 2) / 3)
    assert sublayer_bytes("E", chosen, "fused") == 16 * (20 + 16)
    # The experts' tokens travel again, too; what has no experts in it is not repeated.
    assert micro_batch_seconds(chosen, 1, SLOW)["EP communication"] == pytest.approx(1.5 * 1152e-6)
    assert micro_batch_seconds(chosen, 0, SLOW)["recompute"] == 0
    # Parts of experts: the norm reads and writes D, two copies' activations 2 * 2F and F; nothing is sent.
    parts = micro_batch_seconds(replace(chosen, modules=("layernorm", "moe_act")), 1, SLOW)
    assert parts["recompute"] == pytest.approx(16 * (4 * 8 + 2 * 6 * 16) * 1e-6)
    assert parts["EP communication"] == pytest.approx(1152e-6)
    # Scores and their product with values of each attention.
    core = replace(chosen, modules=("core_attn", "moe"))
    assert micro_batch_seconds(core, 0, SLOW)["recompute"] == pytest.approx(2 * 8 * 16 * 16 * 1e-6)
    assert micro_batch_seconds(core, 1, SLOW)["recompute"] == pytest.approx(
        2 * 8 * 16 * 16 * 1e-6 + micro_batch_seconds(chosen, 1, SLOW)["recompute"]
    )


def test_recompute_by_blocks_repeats_its_first_sublayers_only():
    shape = replace(SMALL, granularity="full", method="block", recompute_layers=1, predictions=("*E",))
    attention = (micro_batch_seconds(SMALL, 1, SLOW)["attention"] + RESIDUAL * 1e-6) / 3
    again = micro_batch_seconds(shape, 1, SLOW)
    assert again["recompute"] == pytest.approx(attention)
    assert again["EP communication"] == pytest.approx(2 * 1152e-6)
    uniform = micro_batch_seconds(replace(shape, method="uniform"), 1, SLOW)
    sublayers = uniform["attention"] + uniform["experts"] + 4 * RESIDUAL * 1e-6
    assert uniform["recompute"] == pytest.approx(sublayers / 3)


@pytest.mark.parametrize("name", ["moe-a3.3b", "moe-0.4b-4b", "dense-1b"])
def test_kinds_of_recompute_are_what_the_loader_takes(name):
    """As flags of a recipe they are read as they were meant, of the twin, too; the first is none."""
    for recipe in (load_recipe(name, ["vwn-recompute-block=null"]), load_recipe(name, baseline=True)):
        plain = shape_of(recipe)
        every = list(kinds(plain, grouped=True))
        assert every[0] == Recompute() and len(set(every)) == len(every) > 2
        for kind in every:
            assert shape_of(recipe.with_values(kind.flags())) == replace(plain, **_meant(kind, recipe))
        blocks, modules = {kind.block for kind in every}, {kind.modules for kind in every}
        assert (len(blocks) > 2) == (not recipe.baseline)
        assert (("layernorm", "moe_act") in modules) == (name != "dense-1b")
        # Which Megatron does not recompute where it overlaps them with messages.
        assert not any("shared_experts" in each for each in modules)
    apart = shape_of(load_recipe("moe-a3.3b", ["moe-shared-expert-overlap=false"]))
    assert any("shared_experts" in kind.modules for kind in kinds(apart, grouped=True))
    assert not any("moe_act" in kind.modules for kind in kinds(apart, grouped=False))


def _meant(kind: Recompute, recipe: Recipe) -> dict[str, object]:
    """A kind as the fields of a shape; the block is one of the settings of a virtual width, too."""
    width = virtual_width_of(recipe.flags)
    blocks = {} if width is None else {"virtual_width": replace(width, recompute_block=kind.block)}
    return asdict(kind) | blocks


def test_connections_of_hardware_without_predictions_take_their_floor():
    how = {"bandwidth": SLOW.memory, "flop_rate": SLOW.matrix}
    forward, backward = (floor_seconds("write_read", each, WIDE.width, 16, **how) for each in ("forward", "backward"))
    assert micro_batch_seconds(WIDE, 0, SLOW)["connections"] == pytest.approx(2 * (forward + backward))
    blocks = micro_batch_seconds(replace(WIDE, block=2), 0, SLOW)["connections"]
    assert blocks == pytest.approx(2 * (forward + backward) + forward)
    full = replace(WIDE, granularity="full", method="uniform", recompute_layers=1)
    assert micro_batch_seconds(full, 0, SLOW)["connections"] == pytest.approx(2 * (2 * forward + backward))
    # The residual is the connection's work: the norm alone reads and writes D.
    plain, wide = (micro_batch_seconds(shape, 0, SLOW)["attention"] for shape in (SMALL, WIDE))
    assert plain - wide == pytest.approx(2 * RESIDUAL * 1e-6)


@pytest.fixture
def predicted(monkeypatch, tmp_path):
    """A file of predictions for two streams."""
    results = []
    for (m, n), direction in product(((2, 4), (2, 16)), PASSES):
        share = (0.5 if direction == "forward" else 0.25) * (1 if n == 4 else 1.5)
        row = {"gpu": "h200", "op": "write_read", "m": m, "n": n, "hidden_size": 8, "pass": direction, "tokens": 10}
        row |= {"status": "predicted", "kernel": "all", "small_operations": 1, "fixed_seconds": 3e-6}
        results.append(row | {"floor_seconds": 1e-6, "seconds": 1e-6 / share + 3e-6})
        results.append(row | {"kernel": "one", "limit": "L2", "share_of_traffic": 0.6, "seconds": 1e-6})
    path = tmp_path / "times.json"
    head = {"date": "today", "commit": {"hash": "0123456789abcdef", "dirty": True}, "versions": {"triton": "3.6.0"}}
    kernel_times.write({**head, "settings": {"calibration": "by hand", "gpus": {}}, "results": results}, path)
    monkeypatch.setattr(kernel_times, "PATH", path)
    for cached in (kernel_times._content, kernel_times.speed):
        cached.cache_clear()
    yield
    for cached in (kernel_times._content, kernel_times.speed):
        cached.cache_clear()


def test_connections_take_what_is_predicted(predicted):
    rates = replace(SLOW, connections="h200")
    # Elements of two bytes at 10^6 bytes per second, at a half and a quarter of it, and three microseconds a pass.
    forward, backward = 16 * 2 * (2 * 16 + 2 * 8) / 0.5 * 1e-6, 16 * 2 * (3 * 16 + 3 * 8) / 0.25 * 1e-6
    seconds = micro_batch_seconds(WIDE, 0, rates)["connections"]
    assert seconds == pytest.approx(2 * (forward + backward + 6e-6))
    blocks = micro_batch_seconds(replace(WIDE, block=2), 0, rates)["connections"]
    assert blocks == pytest.approx(seconds + forward + 3e-6)
    assert kernel_times.speed("h200", "forward", Width(2, 4, 8)).of == ("(2, 4) D = 8",)
    between = kernel_times.speed("h200", "forward", Width(2, 8, 8))
    assert between.share == pytest.approx(0.625) and between.fixed == pytest.approx(3e-6)
    nearer = kernel_times.speed("h200", "backward", Width(2, 5, 8))
    assert 0.25 < nearer.share < 0.3125 and nearer.of[0] == "(2, 4) D = 8"


def test_what_was_taken_of_predictions_is_printed(predicted):
    lines = "\n".join(kernel_times.taken_lines("h200", Width(2, 8, 8)))
    assert "Connections of (2, 8) D = 8 on an h200, interpolated, mostly from (2, " in lines
    assert "forward 62% of the traffic floor and 3 us a call, backward 31%" in lines
    assert "not measured: kernels of commit 0123456789ab with changes compiled by triton 3.6.0; by hand" in lines
    assert "interpolated" not in "\n".join(kernel_times.taken_lines("h200", Width(2, 4, 8)))


def test_the_committed_predictions_serve_every_kind_of_gpu():
    for rates in HARDWARE.values():
        for direction in PASSES:
            assert 0 < kernel_times.speed(rates.connections, direction, Width(4, 32, 2048)).share <= 1


def test_the_ends_of_a_wide_model():
    assert edge_flops(WIDE, 0)["reduction and expansion"] == 16 * 2 * 8 * 16
    further = replace(WIDE, predictions=("*E",))
    # A reduction of the trunk; an expansion, a reduction and a fusion of n segments of the prediction; two heads.
    assert edge_flops(further, 1) == {
        "head": 2 * 16 * 2 * 8 * 64,
        "reduction and expansion": 3 * 16 * 2 * 8 * 16,
        "fusion": 16 * 4 * 4 * 4**2,
    }
    assert edge_flops(replace(SMALL, predictions=("*E",)), 1)["fusion"] == 16 * 4 * 8**2
    # D' or D of 16 tokens in bf16: a norm reads and writes it, and backward reads two and writes one.
    norm = 2 * 16 * (2 + 3) * 1e-6
    normed = replace(further, virtual_width=replace(further.virtual_width, reduce_norm=True))
    for name, norms in (("reduction and expansion", 2), ("fusion", 2)):
        seconds = micro_batch_seconds(normed, 1, SLOW)[name] - 3 * edge_flops(further, 1)[name] * 1e-6
        assert seconds == pytest.approx(norms * norm * 16)
    assert micro_batch_seconds(WIDE, 1, SLOW)["reduction and expansion"] == pytest.approx(3 * 2 * 8 * 16 * 16 * 1e-6)
    plain = micro_batch_seconds(replace(SMALL, predictions=("*E",)), 1, SLOW)["fusion"]
    assert plain == pytest.approx(3 * 16 * 4 * 8**2 * 1e-6 + 2 * norm * 8)


def test_micro_batches_in_flight_without_interleaving():
    assert [in_flight(replace(SMALL, pipeline=4, batch=16), rank) for rank in range(4)] == [[4], [3], [2], [1]]
    assert in_flight(replace(SMALL, pipeline=4, batch=4), 0) == [2]


def test_rates_are_those_of_the_data_sheets():
    h100, h200, b200 = (HARDWARE[name] for name in ("h100", "h200", "b200"))
    # Data sheets state products with sparsity, which doubles them, and both directions of NVLink.
    assert h100.matrix_tflops == h200.matrix_tflops == pytest.approx(1979 / 2, rel=1e-3)
    assert h100.nvlink_gbs == h200.nvlink_gbs == 900 / 2
    assert (h100.memory_gb, h100.memory_gbs, h200.memory_gb, h200.memory_gbs) == (80, 3350, 141, 4800)
    # Of eight GPUs: fp8 with sparsity is four times bf16 without.
    assert (b200.memory_gb * 8, b200.memory_gbs * 8, b200.nvlink_gbs * 16) == (1440, 64000, 14400)
    assert b200.matrix_tflops * 8 * 4 == 72000
    assert {each.network_gbs for each in HARDWARE.values()} == {400 / 8}
