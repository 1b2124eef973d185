"""A conversion holds a few tensors, not the checkpoint."""

import argparse
import shutil
from pathlib import Path

import launch
import pytest
import torch

from megatron_vwn.checkpoint import mapping
from megatron_vwn.checkpoint.arguments import megatron_arguments
from megatron_vwn.checkpoint.convert import expected_hf_tensors
from megatron_vwn.checkpoint.torch_dist import TensorInfo, write_torch_dist
from megatron_vwn.hf import VWNConfig
from megatron_vwn.training.flags.defaults import megatron_defaults

# Two tables of 40 MB and eight MLPs of 3 x 13 MB in fp32: 400 MB.
CONFIG = VWNConfig(
    vocab_size=20_000,
    hidden_size=512,
    hybrid_pattern="*" + 8 * "-",
    intermediate_size=6_500,
    vwn_m=2,
    vwn_n=3,
    vwn_embedding="projected",
)
LARGEST = 4 * 20_000 * 512
# Far from the 3 x largest + 1 GiB, which a checkpoint of this size would never reach.
ALLOWED = 4 * LARGEST


@pytest.fixture
def large(tmp_path):
    shapes = expected_hf_tensors(CONFIG)
    keys = dict.fromkeys(mapping.megatron_key(name, CONFIG) for name in shapes)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    infos = {
        key: TensorInfo(tuple(mapping.from_hf(key, empty.__getitem__, CONFIG).shape), torch.float32) for key in keys
    }
    args = argparse.Namespace(**(megatron_defaults() | megatron_arguments(CONFIG) | {"transformer_impl": "local"}))
    write_torch_dist(
        tmp_path / "megatron", infos, lambda key: torch.ones(infos[key].shape), objects=(), common={"args": args}
    )
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_peak(large):
    size = sum(path.stat().st_size for path in (large / "megatron").rglob("*"))
    assert size > 2 * ALLOWED  # all of it in memory at once would show
    run = launch.real(0, Path(__file__).with_name("session_memory.py"), large)
    assert run.returncode == 0, run.stderr[-3000:]
    there, back = map(int, run.stdout.split("grown")[1].split())
    assert max(there, back) <= ALLOWED, (there / LARGEST, back / LARGEST)
