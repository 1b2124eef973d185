"""Training in FP8 on a GPU against bf16. Without a GPU every test here is skipped and says so."""

from functools import cache

import pytest
import torch
from gpu.test_gpu import GPUS, needs_transformer_engine, torchrun
from models import tiny

CAPABILITY = torch.cuda.get_device_capability() if GPUS else (0, 0)
ITERATIONS = 100
FLAGS = tiny(
    "*-*-/*-",
    "--bf16 --use-distributed-optimizer --swiglu --vwn-m 2 --vwn-n 8 --vwn-embedding projected",
    hidden_size=256,
    ffn_hidden_size=512,
    seq_length=128,
    micro_batch_size=4,
    global_batch_size=8,
    lr="1e-3",
    train_iters=ITERATIONS,
    eval_iters=0,
    vocab_size=1023,
)
RECIPES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}

pytestmark = [pytest.mark.skipif(GPUS == 0, reason="needs a GPU"), needs_transformer_engine]


@cache
def losses(flags: str = "") -> list[float]:
    """The trunk's loss in every iteration."""
    run = torchrun(1, "-m", "megatron_vwn.training.pretrain", *FLAGS, *flags.split())
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "stays out of FP8" not in run.stdout + run.stderr
    found = [float(line.split("lm loss:")[1].split("|")[0]) for line in run.stdout.splitlines() if "lm loss:" in line]
    assert len(found) == ITERATIONS
    return found


@pytest.mark.parametrize("extra", ["", "--fp8-param-gather"], ids=["", "FP8 weights"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_stay_within_one_percent_of_bf16(recipe, extra):
    if RECIPES[recipe] > CAPABILITY:
        pytest.skip(f"{recipe} needs compute capability {'.'.join(map(str, RECIPES[recipe]))}")
    in_fp8, in_bf16 = losses(f"--fp8-format hybrid --fp8-recipe {recipe} {extra}"), losses()
    assert in_bf16[-1] < in_bf16[0] and in_fp8 != in_bf16
    for part in (slice(None), slice(-10, None)):  # of all iterations, and where training has come to
        mean, reference = (torch.tensor(each[part], dtype=torch.float64).mean() for each in (in_fp8, in_bf16))
        assert abs(mean - reference) < 0.01 * reference, (in_fp8[part], in_bf16[part])


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8-recipe tensorwise --first-last-layers-bf16 --num-layers-at-start-in-bf16 2",
        "--fp8-recipe delayed --vwn-recompute-block 2",
        "--fp8-recipe tensorwise --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
        "--fp8-recipe tensorwise --hybrid-layer-pattern *E*E --num-experts 4 --moe-router-topk 2 --moe-grouped-gemm "
        "--moe-ffn-hidden-size 256 --moe-router-padding-for-fp8",
    ],
    ids=["ends in bf16", "stream recompute", "full recompute", "amax history", "experts"],
)
def test_trains(flags):
    found = losses(f"--fp8-format hybrid {flags}")
    assert found[-1] < found[0]
