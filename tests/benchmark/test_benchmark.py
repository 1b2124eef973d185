"""vwn-benchmark: order of the samples, no speed for what is wrong, what it writes, and what it refuses."""

import json
import subprocess
from pathlib import Path

import launch
import pytest
import torch

from megatron_vwn.benchmark import kernels, machine, report
from megatron_vwn.benchmark.__main__ import main
from megatron_vwn.benchmark.operations import Composed, Kernels, Problem, Reference, differentiated
from megatron_vwn.benchmark.timing import CpuClock, Spread, Timed, interleave
from megatron_vwn.ops import costs
from megatron_vwn.ops.costs import OPS, Width

HERE = Path(__file__).parent
SMALL = ("--pairs", "1,4", "--hidden-size", "32", "--tokens", "9", "--dtype", "fp32", "--rounds", "2", "--warmup", "1")


@pytest.fixture(autouse=True)
def no_slow_rates(monkeypatch):
    """Rates of this machine are measured once, in ``test_rates``."""
    monkeypatch.setattr(machine, "measure_rates", lambda device, dtype: machine.Rates(1e9, 1e12))


class TooLarge(Composed):
    name = "too large"

    def write(self, h_TNE, y_TD, gates, p):
        return 1.001 * super().write(h_TNE, y_TD, gates, p)


class WrongGradient(Composed):
    """The right outputs, and no gradient into the sublayer's output."""

    name = "wrong gradient"

    def write(self, h_TNE, y_TD, gates, p):
        return super().write(h_TNE, y_TD.detach(), gates, p) + 0 * y_TD.sum()


class Raises(Composed):
    name = "raises"

    def read(self, h_TNE, p):
        raise RuntimeError("out of patience\nand a second line")


def use(monkeypatch, *variants):
    monkeypatch.setattr(kernels, "variants", lambda: {variant.name: variant for variant in variants})


def problem(op="write", dtype=torch.float32, m=2, n=4):
    return Problem(op, Width(m, n, 32), 33, dtype, torch.device("cpu"))


def test_variants_take_turns_and_rotate_their_buffers():
    order = []

    class Clock:
        def seconds(self, timed, number):
            order.append((timed.call(timed.prepare(number)), number))
            return float(len(order))

    variants = {name: Timed(lambda _, name=name: name) for name in "AB"}
    found = interleave(variants, Clock(), sets=2, warmup=1, rounds=3)
    assert order == [(name, number % 2) for number in range(4) for name in "AB"]
    assert found["A"] == Spread(5.0, 3.0, 7.0, 3) and found["B"] == Spread(6.0, 4.0, 8.0, 3)


def test_spread_is_median_and_deciles():
    assert Spread.of([float(i) for i in range(20, -1, -1)]) == Spread(10.0, 2.0, 18.0, 21)
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_preparation_is_not_timed_and_caches_are_written(monkeypatch):
    clock = CpuClock(64)
    before = clock._scratch.clone()
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    called = []
    timed = Timed(lambda prepared: called.append(prepared), prepare=lambda number: f"set {number}")
    assert clock.seconds(timed, 7) == 2.5 and called == ["set 7"]
    assert not torch.equal(clock._scratch, before) and clock._scratch.numel() == 128


def test_buffers_exceed_the_cache_twice():
    cpu = torch.device("cpu")
    size = machine.cache_bytes(cpu) // 5
    assert machine.buffer_sets(cpu, size) * size >= 2 * machine.cache_bytes(cpu)
    assert machine.buffer_sets(cpu, 100 * size) == 2 and machine.buffer_sets(cpu, 1) == 16


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_torch_operations_agree_with_fp64(op, dtype):
    for m, n in ((1, 4), (2, 4)):
        found = kernels.errors(Composed(), problem(op, dtype, m, n))
        assert kernels.disagreement(found, dtype) is None
        leaves = Composed().leaves(problem(op, dtype, m, n), torch.Generator().manual_seed(0))
        assert {f"d{name}" for name in differentiated(leaves)} < set(found)
        # Those of the connection that writes are the work of the read that made its gates.
        assert ("drouting" in found) == (op in ("read", "connection")), op


def test_gates_whose_read_columns_come_last_are_expected_so():
    """Kernels order them [carry | write | read]."""
    this, width = problem("write_read", torch.float64), Width(2, 4, 32)
    leaves = Composed().leaves(this, torch.Generator().manual_seed(0))
    theirs = leaves | {"logits": leaves["logits"].roll(-width.m, -1)}
    ours, other = Composed().expected(this, leaves), Kernels().expected(this, theirs)
    assert torch.equal(ours[0], other[0]) and torch.equal(ours[2].roll(-width.m, -1), other[2])
    gradient = torch.arange(width.num_coefficients).expand(1, 4, -1)
    assert Composed().defined(this, "logits", gradient)[0, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert Kernels().defined(this, "logits", gradient)[0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_parts_of_the_tokens_are_compared_as_the_whole(monkeypatch):
    whole = kernels.errors(TooLarge(), problem("write_read"))
    monkeypatch.setattr(kernels, "_TOKENS_AT_ONCE", 4)
    parts = kernels.errors(TooLarge(), problem("write_read"))
    assert parts == pytest.approx(whole, rel=1e-3) and parts["output 0"] == pytest.approx(1e-3, rel=1e-2)


def test_what_is_wrong_gets_no_time(monkeypatch, tmp_path, capsys):
    use(monkeypatch, TooLarge(), Composed(), WrongGradient(), Raises())
    path = tmp_path / "results.json"
    assert main(["kernels", *SMALL, "--ops", "read", "write", "connection", "--output", str(path)]) == 1
    results = json.loads(path.read_text())["results"]
    assert len(results) == 3 * 2 * 4
    for row in results:
        wrong = {
            "too large": row["op"] != "read" and "output" in row.get("reason", "") and "disagrees",
            "wrong gradient": row["op"] != "read" and "dy" in row.get("reason", "") and "disagrees",
            "raises": row["op"] != "write" and row.get("reason") == "RuntimeError: out of patience" and "failed",
        }.get(row["variant"])
        assert row["status"] == (wrong or "measured"), row
        assert ("seconds" in row) == ("share_of_floor" in row) == (not wrong), row
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("write ") and "too large" in line)
    assert "disagrees: output 0 1.0e-03" in line and "allowed 1e-05" in line


def test_results_say_where_they_come_from(monkeypatch, tmp_path):
    use(monkeypatch, Composed())
    path = tmp_path / "new folder" / "results.json"
    arguments = ["kernels", *SMALL, "--output", str(path)]
    assert main(arguments) == 0
    content = json.loads(path.read_text())
    assert content["program"] == "vwn-benchmark" and content["schema"] == report.SCHEMA and content["mode"] == "kernels"
    assert content["arguments"] == arguments and content["date"].endswith("+00:00")
    assert content["hardware"]["device"] == "cpu" and content["hardware"]["name"] and content["hardware"]["cache_bytes"]
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert content["settings"] == {
        "copy_bytes_per_second": 1e9, "matrix_flops_per_second": 1e12, "rounds": 2, "warmup": 1,
    }  # fmt: skip
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    if head.returncode == 0:
        assert content["commit"]["hash"] == head.stdout.strip() and isinstance(content["commit"]["dirty"], bool)
    results = content["results"]
    assert [(row["op"], row["pass"]) for row in results] == [(op, p) for op in OPS for p in costs.PASSES]
    for row in results:
        assert row["status"] == "measured" and row["seconds"]["samples"] == 2
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        floor = costs.elements(row["op"], row["pass"], Width(1, 4, 32)) * 4 * 9 / 1e9
        assert row["floor_seconds"] == pytest.approx(floor)
        assert row["share_of_floor"] == pytest.approx(floor / row["seconds"]["median"])
        assert set(row["parity"]) and all(error <= 1e-5 for error in row["parity"].values())


def test_a_commit_can_be_told_where_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(machine, "_CHECKOUT", Path("/"))
    assert machine.commit() is None
    assert machine.commit("abc") == {"hash": "abc", "dirty": None}


def test_what_cannot_run_here_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    path = tmp_path / "results.json"
    assert main(["kernels", *SMALL, "--ops", "connection", "--output", str(path)]) == 0
    reasons = {row["variant"]: row.get("reason") for row in json.loads(path.read_text())["results"]}
    assert list(reasons) == ["triton", "torch", "torch.compile", "Transformer Engine mHC", "Liger mHC"]
    assert reasons["torch"] is None and all(reason for name, reason in reasons.items() if name != "torch"), reasons
    if not torch.cuda.is_available():
        assert "GPU" in reasons["triton"]
    assert "missing: TORCH_COMPILE_DISABLE=1 turns it off" in capsys.readouterr().out


def test_peers_are_compared_with_connections_of_mhc_only():
    for name in ("Transformer Engine mHC", "Liger mHC"):
        peer = kernels.variants()[name]
        assert kernels.concerns(peer, problem("connection", m=1, n=4))
        assert not kernels.concerns(peer, problem("write", m=1, n=4))
        assert not kernels.concerns(peer, problem("connection", m=2, n=4))
        assert "Sinkhorn" in peer.remark


@pytest.mark.parametrize("name", ["Transformer Engine mHC", "Liger mHC"])
def test_equations_of_the_peers(name):
    """Rows and columns of the carry sum to one, so streams that are all alike pass as they are; both layouts agree."""
    peer, this = kernels.variants()[name], problem("connection", m=1, n=4)
    leaves = {k: v.detach().double() for k, v in peer.leaves(this, torch.Generator().manual_seed(0)).items()}
    same = torch.randn(33, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(-1, 4, -1)
    x, out = peer.expected(this, {**leaves, "h": peer.stacked(same), "y": torch.zeros_like(leaves["y"])})
    torch.testing.assert_close(peer.unstacked(out), same, atol=1e-3, rtol=0)
    weight = x / same[:, 0]
    torch.testing.assert_close(weight, weight[:, :1].expand_as(weight))
    _, written = peer.expected(this, {**leaves, "h": peer.stacked(same)})
    share = (peer.unstacked(written) - same) / leaves["y"][:, None]
    assert ((share > 0) & (share < 2)).all()


def test_the_reference_is_not_the_variant():
    """In fp64 both agree to rounding, and not to the bit: they are two computations."""
    this = problem("connection", torch.float64)
    leaves = Composed().leaves(this, torch.Generator().manual_seed(0))
    ours, theirs = Composed().outputs(this, leaves), Reference().outputs(this, leaves)
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_rates(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_COPY_BYTES", {"cpu": 8 << 20})
    monkeypatch.setattr(machine, "_PRODUCT_SIZE", {"cpu": 128})
    rates = machine.measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.bandwidth < 1e13 and 1e8 < rates.flop_rate < 1e15


@pytest.mark.parametrize(
    "arguments,said",
    [
        ("", "required: MODE"),
        ("speed", "invalid choice: 'speed'"),
        ("kernels --pairs 4", "'4' is no pair m,n such as 4,16"),
        ("kernels --pairs 4,3", "n must be at least m"),
        ("kernels --pairs 3,4 --hidden-size 32", "m must divide the hidden size"),
        ("kernels --tokens 0", "'0' is no whole number of at least 1"),
        ("kernels --rounds many", "'many' is no whole number"),
        ("kernels --variants fast", "--variants 'fast' is none of 'triton', 'torch'"),
        ("kernels --ops add", "invalid choice: 'add'"),
        ("kernels --num-layers 3", "unknown argument --num-layers"),
        ("kernels --output .", "--output . is a folder"),
        ("kernels --output /proc/new/results.json", "cannot be written"),
        ("--compile-only sm_12", "--compile-only sm_12 is none of sm_80, sm_90, sm_100"),
        ("kernels --predict h200 a100", "--predict a100 is none of h200, h100"),
        ("tune --predict a100", "--predict a100 is none of h200, h100"),
        ("layer --hidden-size 64", "add --vwn-m and --vwn-n"),
        ("model --recipe nonsense", "there is no recipe nonsense"),
        ("table --bandwidth fast", "invalid float value: 'fast'"),
        ("table --results nowhere", "--results nowhere is no folder"),
        ("table --gpu a100", "--gpu a100 is not predicted: choose one of h100, h200"),
        ("table --hidden-size 12", "m must divide the hidden size"),
    ],
)
def test_refusals_are_one_sentence(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("vwn-benchmark: ") and captured.err.count("\n") == 1
    assert said in captured.err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    for arguments in (["kernels", "--device", "cuda"], ["tune", "--minutes", "1"]):
        assert main(arguments) == 2
        assert "there is no GPU" in capsys.readouterr().err


def test_results_are_not_replaced_unasked(monkeypatch, tmp_path, capsys):
    use(monkeypatch, Composed())
    path = tmp_path / "results.json"
    path.write_text("old")
    arguments = ["kernels", *SMALL, "--ops", "read", "--output", str(path)]
    assert main(arguments) == 2 and "add --overwrite" in capsys.readouterr().err and path.read_text() == "old"
    assert main([*arguments, "--overwrite"]) == 0 and json.loads(path.read_text())["results"]


def test_a_prediction_is_named_for_no_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    where = {"committed": False, "overwrite": False}
    assert str(report.choose_path(None, "predict-h200", None, **where)) == "results/predict-h200.json"
    assert report.choose_path(None, "kernels", torch.device("cpu"), **where).match("results/kernels-*-thread*.json")


def test_interrupted(monkeypatch, tmp_path, capsys):
    class Interrupted(Composed):
        def read(self, h_TNE, p):
            raise KeyboardInterrupt

    use(monkeypatch, Interrupted())
    assert main(["kernels", *SMALL, "--ops", "read", "--output", str(tmp_path / "results.json")]) == 130
    assert "nothing was written" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_layers_and_models_step(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = HERE / "session_benchmark_steps.py"
    run = launch.session(0, script, tmp_path, env=launch.WITHOUT_GPU, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_kernels_compile_for_a_gpu_that_is_not_here(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # Torch and Triton as they are, without the emulation that a server has installed.
    run = launch.real(0, HERE / "session_benchmark_compile.py", tmp_path, env=launch.WITHOUT_GPU, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
