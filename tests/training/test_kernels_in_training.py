"""Fifty steps of training with the fused kernels follow those with torch operations."""

import launch
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 50
# One reading alone, three boundaries that a fused kernel crosses, a norm before the reduction; padded n and E.
FLAGS = tiny(
    "*-*-",
    "--vwn-m 2 --vwn-n 12 --adam-eps 1e-6 --lr-decay-style cosine --tensorboard-log-interval 1",
    hidden_size=48,
    seq_length=4,
    micro_batch_size=1,
    global_batch_size=1,
    train_iters=STEPS,
    lr="3e-3",
)


def train(folder, *further):
    flags = [*FLAGS, "--tensorboard-dir", folder, *further]
    env = launch.WITHOUT_GPU | launch.INTERPRETED
    done = launch.session(1, "-m", "megatron_vwn.training.pretrain", *flags, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    events = EventAccumulator(str(folder)).Reload()
    return done.stdout, [event.value for event in events.Scalars("lm loss")]


def test_losses_of_fifty_steps(tmp_path):
    said, by_torch = train(tmp_path / "torch", "--vwn-kernels", "torch")
    assert "; torch operations" in said
    said, by_kernels = train(tmp_path / "kernels", "--vwn-kernels", "triton")
    assert "; fused Triton kernels in Triton's interpreter" in said
    assert len(by_torch) == len(by_kernels) == STEPS and by_torch[-1] < by_torch[0] - 0.3
    # Seen: 2e-6. Both round differently, and training amplifies what differs; a larger learning rate, or a smaller eps
    # of Adam, which makes steps of what is rounding alone, would amplify it beyond any tolerance.
    differences = [abs(a - b) / b for a, b in zip(by_kernels, by_torch, strict=True)]
    assert max(differences) <= 1e-3, differences
    assert by_kernels != by_torch, "the kernels did not run"
