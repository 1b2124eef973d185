"""What only GPUs can show. Without one every test here is skipped and says so."""

import subprocess
from importlib.util import find_spec
from pathlib import Path

import launch
import pytest
import torch
from models import tiny

TESTS = Path(__file__).parents[1]
GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a GPU")
needs_transformer_engine = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


def torchrun(ranks: int, *arguments) -> subprocess.CompletedProcess:
    return launch.real(ranks, *arguments, env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})


@pytest.mark.skipif(GPUS < 2, reason="context parallelism needs two GPUs")
@needs_transformer_engine
def test_attention_under_context_parallelism_equals_one_gpu():
    run = torchrun(2, TESTS / "gpu" / "session_context_parallel.py")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


@pytest.mark.parametrize(
    "family",
    [
        "attention",
        "sliding window",
        "latent attention",
        pytest.param("Mamba", marks=needs("mamba_ssm", "causal_conv1d")),
        pytest.param("gated delta net", marks=needs("fla")),
    ],
)
@needs_transformer_engine
def test_a_fresh_virtual_width_computes_the_baseline(family):
    run = torchrun(1, TESTS / "gpu" / "session_families.py", family)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@needs("flash_attn")
@needs_transformer_engine
def test_dynamic_batching_generates():
    run = torchrun(1, TESTS / "gpu" / "session_generation.py")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


FLAGS = tiny(
    "*-*-",
    "--bf16 --use-distributed-optimizer",
    hidden_size=256,
    ffn_hidden_size=512,
    seq_length=128,
    lr="1e-3",
    train_iters=20,
    eval_iters=1,
    vocab_size=1023,
)


@pytest.mark.parametrize("width", ["", "--vwn-m 2 --vwn-n 8"], ids=["baseline", "virtual width"])
def test_one_gpu_trains_in_bf16(width):
    run = torchrun(1, "-m", "megatron_vwn.training.pretrain", *FLAGS, *width.split())
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "emulated" not in run.stderr, "the CPU emulation is active on a machine with a GPU"
    losses = [float(line.split("lm loss:")[1].split("|")[0]) for line in run.stdout.splitlines() if "lm loss:" in line]
    assert losses[19] < losses[0], losses
