"""What the last commit before the rooms (bacbcef) saved still loads, and computes the same.

``before_rooms/saved.tar.xz`` holds a checkpoint after two of four steps (``--no-save-rng``) and the folder that
``vwn-convert to-hf`` made of it; ``expected.json`` has the losses of steps 3 and 4 and logits, by that commit's code.
"""

import json
import tarfile
from pathlib import Path

import launch
import pytest
import torch
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent / "before_rooms"
EXPECTED = json.loads((HERE / "expected.json").read_text())
FLAGS = tiny(
    "*-*-/*-",
    "--swiglu --vwn-m 2 --vwn-n 4 --vwn-embedding projected --vwn-recompute-block 2 --use-distributed-optimizer "
    "--dist-ckpt-optim-fully-reshardable --lr-decay-style constant --make-vocab-size-divisible-by 8 --seed 7 "
    "--no-load-rng",
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=32,
    seq_length=16,
    train_iters=4,
    eval_interval=100,
    vocab_size=31,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before_rooms")
    with tarfile.open(HERE / "saved.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_checkpoint_trains_on(saved, tmp_path):
    # Its vocabulary of 31 tokens has a 32nd row.
    command = [Path(__file__).parent / "padded_softmax.py", *FLAGS, "--load", saved / "ckpt"]
    done = launch.session(1, *command, "--tensorboard-dir", tmp_path, env=launch.WITHOUT_GPU, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("lm loss")]
    assert [step for step, _ in losses] == EXPECTED["steps"]
    # fp32 on one rank: a sum in another order may cost the last digits.
    assert [loss for _, loss in losses] == pytest.approx(EXPECTED["losses"], abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("own_code", [True, False], ids=["with the code beside it", "with this package"])
def test_an_exported_folder_computes_the_same(saved, own_code, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    if not own_code:
        import megatron_vwn.hf  # noqa: F401
    model = AutoModelForCausalLM.from_pretrained(saved / "hf", trust_remote_code=own_code).eval()
    logits = model(torch.tensor(EXPECTED["tokens"])).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), rtol=1e-6, atol=1e-6)
