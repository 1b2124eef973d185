"""What a GPU is asked in its first hour, in order of value, and how each answer is read."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_vwn.benchmark.arguments import PAIRS
from megatron_vwn.benchmark.report import file_name
from megatron_vwn.recipes.recipe import load_recipe

HERE = Path(__file__).parent
NAMES = [f"{m},{n}" for m, n in PAIRS]
SANITIZED = ["2,3", "4,16", "8,64"]  # one of each family of kernels
# Between kernels and torch operations: bf16 rounds each sublayer anew (first loss), and 200 steps drift apart by it.
FIRST_LOSS, LAST_LOSS = 5e-3, 2e-2
_LAST = 20  # steps, over which the last loss is a mean

Collected = tuple[object, str]


@dataclass(frozen=True)
class Step:
    """One question.

    Attributes:
        name: in tables.
        seconds: at most.
        commands: command lines.
        collect: from what they printed, and results of the steps before by name, to a result and one phrase.
        at_once: how many commands run at a time.
        environment: of the commands.
        lacks: why it cannot run here; "" if it can.
    """

    name: str
    seconds: float
    commands: list[list[str]]
    collect: Callable[[list[str], dict[str, object]], Collected]
    at_once: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    lacks: str = ""


def steps(output: Path, *, rehearse: bool) -> list[Step]:
    """All of them in order.

    Args:
        output: a folder for files that commands write.
        rehearse: on a CPU, with tiny shapes.
    """
    return [step for make in _MAKERS for step in make(output, rehearse)]


def _environment(output: Path, rehearse: bool) -> list[Step]:
    def collect(outputs, done):
        found = json.loads(outputs[0].splitlines()[-1])
        versions = found["versions"]
        return found, f"{found['hardware']['name']}, torch {versions['torch']}, triton {versions['triton']}"

    return [Step("environment", 60, [_python(HERE / "environment.py")], collect)]


def _parity(output: Path, rehearse: bool) -> list[Step]:
    # A stream takes a process of its own: what takes time is the compiler, which uses one core.
    sizes = ["32", "1"] if rehearse else ["2048", "257"]
    commands = [_python(HERE / "parity.py", pair, *sizes) for pair in (SANITIZED[:2] if rehearse else NAMES)]
    return [Step("parity", 120, commands, _cases, at_once=_cores())]


def _sanitizer(output: Path, rehearse: bool) -> list[Step]:
    tools = ["memcheck", "racecheck"]
    pairs = SANITIZED[:1] if rehearse else SANITIZED
    commands = []
    for tool in [""] if rehearse else tools:
        watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if tool else []
        commands += [[*watched, *_python(HERE / "parity.py", pair, "64", "1", "--dtypes", "bf16")] for pair in pairs]

    def collect(outputs, done):
        rows, _ = _cases(outputs, done)
        summaries = [line.strip("= ") for output in outputs for line in output.splitlines() if "SUMMARY" in line]
        said = "; ".join(dict.fromkeys(summaries)) or "without compute-sanitizer"
        return {"cases": rows, "summaries": summaries}, said

    lacks = "" if rehearse or shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    # Every allocation its own, so that a read beyond a tensor is one beyond an allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [Step("sanitizer", 75, commands, collect, at_once=_cores(), environment=environment, lacks=lacks)]


def _measured(output: Path, rehearse: bool, name: str, seconds: float, *words: str, environment=None) -> Step:
    """A step of ``vwn-benchmark kernels``."""
    path = output / file_name(name)
    # --tokens 9: no tile fits, so that a rehearsal shows more than the easiest case.
    small = "--pairs 2,3 --hidden-size 32 --tokens 9 --dtype fp32 --rounds 2 --warmup 1"
    size = small.split() if rehearse else ["--hidden-size", "2048", "--rounds", "11"]
    command = _benchmark("kernels", *words, *size, "--output", str(path), "--overwrite")
    return Step(name, seconds, [command], _report_of(path, _fastest), environment=environment or {})


def _kernels(output: Path, rehearse: bool) -> list[Step]:
    words = ["--ops", "write_read", "--variants", "triton", "torch"]
    return [_measured(output, rehearse, "kernels", 75, *words)]


def _tuning(output: Path, rehearse: bool) -> list[Step]:
    tiles = {"VWN_TILES": str(output / "tiles.json")}
    large = "--hidden-size 2048 --pairs 4,16 4,32 --minutes 1"
    small = "--predict h200 --hidden-size 64 --tokens 32 --pairs 2,3 --minutes 0.1"
    tune = _benchmark("tune", *(small if rehearse else large).split())
    tuned = ["--ops", "write_read", "--pairs", "4,16", "4,32", "--variants", "triton"]
    compiled = ["--ops", "write_read", "--pairs", "4,16", "--variants", "triton", "torch.compile"]
    peers = ["--ops", "connection", "--pairs", "1,4", "--variants"]
    peers += ["triton", "Transformer Engine mHC", "Liger mHC"]
    return [
        Step("tune", 80, [tune], _last_line, environment=tiles),
        _measured(output, rehearse, "kernels, tuned", 30, *tuned, environment=tiles),
        _measured(output, rehearse, "torch.compile", 60, *compiled),
        _measured(output, rehearse, "mHC of others", 40, *peers),
    ]


def _layers(output: Path, rehearse: bool) -> list[Step]:
    def layer(name: str, *words: str) -> Step:
        path = output / file_name(f"layer {name}")
        rounds = ["--rounds", "2", "--warmup", "1"] if rehearse else ["--rounds", "7"]
        command = _benchmark("layer", *words, *rounds, "--output", str(path), "--overwrite")
        return Step(f"layer, {name}", 60, [command], _report_of(path, _overheads))

    if rehearse:
        sizes = "--hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16"
        experts = "--num-query-groups 2 --kv-channels 16 --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32"
        experts += " --moe-shared-expert-intermediate-size 32"
        return [
            layer("experts r4", "--recipe", "moe-a3.3b", "--vwn-m", "4", "--vwn-n", "16", *f"{sizes} {experts}".split())
        ]
    found = []
    for r, width in (("r4", ["--vwn-m", "4", "--vwn-n", "16"]), ("r8", ["--vwn-m", "4", "--vwn-n", "32"])):
        for kind, recipe in (("experts", "moe-a3.3b"), ("dense", "dense-1b")):
            found.append(layer(f"{kind} {r}", "--recipe", recipe, *width))
    return found


def _training(output: Path, rehearse: bool) -> list[Step]:
    overrides = ["train-iters=3", "bf16=null"] if rehearse else []
    transformer_engine = has_transformer_engine() and not rehearse
    recipe = load_recipe(str(HERE / "train.yaml"), overrides, shrink=32 if rehearse else 1)
    flags = recipe.arguments(transformer_engine=transformer_engine)
    # No launcher: a rank of torchrun has a session of its own, and would outlive the step that is killed.
    program = ["-m", "megatron_vwn.training.pretrain", *flags, "--vwn-kernels"]

    def one(outputs, done):
        found = training_log(outputs[0])
        peak = f", peak {found['peak_mb'] / 1000:.2f} GB" if found["peak_mb"] else ""
        return found, f"{found['milliseconds']:.1f} ms a step, loss {found['losses'][-1]:.4f}{peak}"

    def other(outputs, done):
        found, said = one(outputs, done)
        first = done.get("training, kernels")
        if first is None:
            return found, f"{said}; nothing to compare it with"
        check_losses(first["losses"], found["losses"])
        return found, f"{said}; the same curve"

    def memory(outputs, done):
        own = json.loads((output / "plan.json").read_text())["own"]["memory_per_stage"][0]
        trained = done.get("training, kernels")
        predicted, peak = own["total"] / 1e6, trained and trained["peak_mb"]
        said = f"predicted {predicted / 1000:.2f} GB" + (f", measured {peak / 1000:.2f}" if peak else "")
        if not transformer_engine:
            said += "; measured with local layers, predicted for Transformer Engine's, which keep no scores"
        layers = "transformer_engine" if transformer_engine else "local"
        return {"predicted_mb": predicted, "measured_mb": peak, "measured_layers": layers, "parts": own}, said

    plan = [*_python("-m"), "megatron_vwn.planner", str(HERE / "train.yaml"), "--top", "0"]
    plan += ["--json", str(output / "plan.json")]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    # "auto" may be torch operations, which would be compared with themselves.
    kernels = "auto" if rehearse else "triton"
    return [
        Step("training, kernels", 90, [[sys.executable, *program, kernels]], one, environment=alone),
        Step("training, torch operations", 90, [[sys.executable, *program, "torch"]], other, environment=alone),
        # The planner builds its ranks as a machine without a GPU does.
        Step("memory against vwn-plan", 90, [plan], memory, environment={"CUDA_VISIBLE_DEVICES": ""}),
    ]


def _fp8(output: Path, rehearse: bool) -> list[Step]:
    command = _python("-m", "pytest", "-W", "ignore", "-q", "-n", "0", HERE / "test_fp8.py")
    lacks = "" if rehearse or has_transformer_engine() else "Transformer Engine is not installed or does not import"
    lacks = lacks or ("" if find_spec("pytest") and find_spec("xdist") else "pytest and pytest-xdist are not installed")
    return [Step("FP8", 120, [command], _last_line, lacks=lacks)]


def _all_parity(output: Path, rehearse: bool) -> list[Step]:
    pairs = SANITIZED[:1] if rehearse else NAMES
    words = ["64", "1"] if rehearse else ["512", "4096"]
    commands = [
        _python(HERE / "parity.py", pair, *words, "--dtypes", "fp32", "--more", *(["1"] if rehearse else []))
        for pair in pairs
    ]
    return [Step("parity, all cases", 120, commands, _cases, at_once=_cores())]


_MAKERS = (_environment, _parity, _sanitizer, _kernels, _layers, _training, _tuning, _fp8, _all_parity)


@cache
def has_transformer_engine() -> bool:
    """Whether it imports; one that does not is to Megatron as none."""
    if find_spec("transformer_engine") is None:
        return False
    return subprocess.run(_python("-c", "import transformer_engine.pytorch"), capture_output=True).returncode == 0


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def training_log(text: str) -> dict:
    """Losses, the median time of a step and the peak of CUDA's memory from a log of Megatron's.

    Raises:
        ValueError: it has no losses.
    """
    losses = [float(value) for value in re.findall(r"lm loss: ([-+.\dEe]+|nan|inf)", text)]
    times = sorted(float(value) for value in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)[1:])
    peaks = [float(value) for value in re.findall(r"max allocated: ([\d.]+)", text)]
    if not losses or not times:
        raise ValueError(f"no losses: {text.strip()[-200:]}")
    # Megatron's "MB" is 2^20 bytes.
    peak = round(max(peaks, default=0.0) * 1.048576, 1)
    return {"losses": losses, "milliseconds": times[len(times) // 2], "peak_mb": peak}


def check_losses(first: list[float], second: list[float]) -> None:
    """Whether two runs are the same training.

    Raises:
        ValueError: they are not.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} steps against {len(second)}")
    last = min(_LAST, len(first))
    for what, a, b, allowed in (
        ("the first loss", first[0], second[0], FIRST_LOSS),
        (f"the mean of the last {last} losses", sum(first[-last:]) / last, sum(second[-last:]) / last, LAST_LOSS),
    ):
        if not abs(a - b) <= allowed * abs(b):
            raise ValueError(f"{what} is {a:.4f} with the kernels and {b:.4f} with torch operations")


def _cases(outputs: list[str], done) -> Collected:
    rows = [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]
    if not rows:
        raise ValueError("no case ended")
    failed = [row for row in rows if not row["passed"]]
    worst = max(rows, key=lambda row: row.get("error", 0.0) / max(row["allowed"], 1e-30))
    said = f"{len(rows) - len(failed)} of {len(rows)} cases"
    return rows, f"{said}; worst {worst.get('error', 0):.1e} of {worst['allowed']:.0e} allowed, {worst['case']}"


def _report_of(path: Path, say: Callable[[list[dict]], str]):
    def collect(outputs, done):
        content = json.loads(path.read_text())
        return content, say(content["results"])

    return collect


def _fastest(results: list[dict]) -> str:
    ours = [row for row in results if row["variant"] == "triton" and row["status"] == "measured"]
    if not ours:
        return "; ".join(sorted({f"{row['variant']}: {row.get('reason', row['status'])}" for row in results}))
    return ", ".join(f"({row['m']},{row['n']}) {row['pass']} {row['share_of_floor']:.0%} of its floor" for row in ours)


def _overheads(results: list[dict]) -> str:
    return ", ".join(
        f"{row['variant']} {row['overhead']:+.1%}" if "overhead" in row else f"{row['variant']} {row['status']}"
        for row in results
    )


def _last_line(outputs: list[str], done) -> Collected:
    lines = [line for line in outputs[0].splitlines() if line.strip()]
    return lines, lines[-1] if lines else ""


def _python(*words: object) -> list[str]:
    return [sys.executable, *map(str, words)]


def _benchmark(*words: str) -> list[str]:
    return _python("-W", "ignore", "-m", "megatron_vwn.benchmark", *words)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
