"""vwn-benchmark layer and model on tiny sizes, in one process because Megatron is slow to import."""

import contextlib
import io
import json
import sys
from pathlib import Path

from megatron_vwn.benchmark import machine
from megatron_vwn.benchmark.__main__ import main

FOLDER = Path(sys.argv[1])
MODEL = "--hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 48 --seq-length 16 --micro-batch-size 2 "
MODEL += "--vocab-size 60 --rounds 2 --warmup 1"
EXPERTS = "--hybrid-layer-pattern *E --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24"
WIDTH = "--vwn-m 2 --vwn-n 6"
machine.measure_rates = lambda device, dtype: machine.Rates(1e9, 1e12)


def run(arguments: str, code: int) -> tuple[dict[str, dict], dict]:
    """Results by variant, and the whole file."""
    path = FOLDER / "results.json"
    path.unlink(missing_ok=True)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*arguments.split(), "--output", str(path)]) == code, said.getvalue()
    content = json.loads(path.read_text())
    return {row["variant"]: row for row in content["results"]}, content


def check_measured(row: dict) -> None:
    assert row["status"] == "measured", row
    assert row["seconds"]["samples"] == 2 and 0 < row["kept_bytes"] < row["peak_bytes"], row


def layers() -> None:
    rows, content = run(f"layer {MODEL} {EXPERTS} {WIDTH} --recompute-block 2", 0)
    assert list(rows) == ["baseline", "VWN", "VWN, recompute block 2"]
    for row in rows.values():
        check_measured(row)
    wide, recomputed = rows["VWN"], rows["VWN, recompute block 2"]
    assert wide["overhead"] == wide["seconds"]["median"] / rows["baseline"]["seconds"]["median"] - 1
    # 32 tokens in fp32 at 1 GB/s, two connections of r = 3, forward and backward: 2 (5r + 5) D elements.
    assert abs(wide["floor_seconds"] - 32 * 2 * 20 * 32 * 4 / 1e9) < 1e-12
    assert rows["baseline"]["kept_bytes"] < recomputed["kept_bytes"] < wide["kept_bytes"]
    # Two of four experts of 3 (gated) or 2 matrices, attention's four, the router; 6 FLOPs each; causal attention.
    matrices = 4 * 32 * 32 + 2 * 2 * 32 * 24 + 4 * 32
    assert rows["baseline"]["flops_per_token"] == 6 * matrices + 6 * 16 * 32, rows["baseline"]
    assert content["settings"]["virtual_width"] == WIDTH.split() and content["settings"]["transformer_impl"] == "local"


def models() -> None:
    rows, _ = run(f"model {MODEL} --hybrid-layer-pattern *-*- {WIDTH} --bf16 --recompute-block 3", 0)
    assert list(rows) == ["baseline", "VWN", "VWN, recompute block 3"]
    for row in rows.values():
        check_measured(row)
    wide, monitored = rows["VWN"], rows["VWN"]["monitored_seconds"]
    assert monitored["samples"] == 2 and "monitoring" not in rows["baseline"]
    assert abs(wide["monitoring"] - (monitored["median"] / wide["seconds"]["median"] - 1) / 100) < 1e-12


def wrong_models() -> None:
    """A fault that a fresh model hides, and one that it shows: no time for either, and exit code 1."""
    from megatron_vwn.ops import eager

    gate, raw = eager.gate, eager._raw
    try:
        # Zero gates hide it in outputs and in gradients.
        eager.gate = lambda *arguments: gate(*arguments) * (1 + gate(*arguments))
        rows, _ = run(f"layer {MODEL} {WIDTH}", 1)
        assert rows["VWN"]["status"] == "disagrees" and "perturbed" in rows["VWN"]["reason"], rows["VWN"]
        eager.gate, eager._raw = gate, lambda *arguments: 1.01 * raw(*arguments)
        rows, _ = run(f"model {MODEL} {WIDTH}", 1)
        assert rows["VWN"]["status"] == "disagrees" and "fresh" in rows["VWN"]["reason"], rows["VWN"]
    finally:
        eager.gate, eager._raw = gate, raw
    assert "seconds" not in rows["VWN"] and rows["baseline"]["status"] == "measured"


def refusals() -> None:
    for arguments, said in (
        (f"layer {MODEL} --vwn-m 3 --vwn-n 6", "--hidden-size 32 is not divisible by --vwn-m 3"),
        (f"model {MODEL} {WIDTH} --fp16", "drop --fp16"),
        (f"layer {MODEL} {WIDTH} --no-such-flag", "--no-such-flag"),
    ):
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            assert main([*arguments.split(), "--output", str(FOLDER / "refused.json")]) == 2, arguments
        assert said in error.getvalue() and not (FOLDER / "refused.json").exists(), error.getvalue()


if __name__ == "__main__":
    layers()
    models()
    wrong_models()
    refusals()
