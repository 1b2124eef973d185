"""megatron_vwn.cpu.install() in one process; every case is a subprocess, so that pytest keeps an unchanged torch."""

from pathlib import Path

import launch


def python(*arguments):
    """Run Python as rank 0 where no GPU can be seen; it has to succeed."""
    done = launch.real(0, *arguments, env=launch.WITHOUT_GPU | {"RANK": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_emulated_gpu():
    checks = Path(__file__).parent / "emulation_checks.py"
    done = python("-m", "pytest", "-s", checks)
    assert done.stderr.count("megatron_vwn.cpu:") == 1  # it says once that it is active


def test_never_active_where_a_gpu_is():
    code = """
import sys
import torch
import megatron_vwn.cpu

torch.cuda.is_available = lambda: True

def patchable():
    dist = torch.distributed
    places = [torch, torch.Tensor, torch.autograd, torch.amp, torch.amp.autocast_mode, dist, dist.distributed_c10d]
    places += [torch.cuda, torch.cuda.nvtx, torch.cuda.random, torch.accelerator]
    return {(p.__name__, name): value for p in places for name, value in vars(p).items()}

before = patchable()
assert megatron_vwn.cpu.install() is False
after = patchable()
assert before.keys() == after.keys()
assert all(before[name] is after[name] for name in before), [n for n in before if before[n] is not after[n]]
assert not torch.overrides._get_current_function_mode_stack()
assert torch.ones(1).type() == "torch.FloatTensor"
assert not any(name.startswith("megatron.") for name in sys.modules)
"""
    assert "megatron_vwn.cpu:" not in python("-c", code).stderr


def test_refuses_after_megatron():
    code = """
import sys, types
import megatron_vwn.cpu
from megatron_vwn.config import VirtualWidthError

sys.modules["megatron.core"] = types.ModuleType("megatron.core")
try:
    megatron_vwn.cpu.install()
except VirtualWidthError as error:
    print(error)
"""
    message = python("-c", code).stdout
    assert message.startswith("megatron was imported before") and message.count("\n") == 1
