"""Train one small model with and without a virtual width on the same tokens and compare them.

Called by run.sh. Everything is written to examples/quickstart/out; starting again goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from progress import Clock, RunFailedError, last_checkpoint, run_logged, train
from report import summarise

ROOT = Path(__file__).parent.parent.parent
TEXT = Path("examples/quickstart/data/austen.txt.xz")
OUT = Path("examples/quickstart/out")
DATA = OUT / "data" / "austen"
# Time of a step with a virtual width in steps without; only for the estimate of what remains.
WIDE_STEP_COST = 1.4


@dataclass(frozen=True)
class Preset:
    """A model and a schedule that suit the machine; the two runs share all of it but the virtual width.

    Attributes:
        ranks: processes; two share each layer by tensor and sequence parallelism.
        pattern: one symbol per sublayer, * attention and - MLP.
        sequence: tokens per sample.
        batch: samples per step.
        virtual_width: the flags that the second run has in addition.
        precision: further flags of both.
    """

    ranks: int
    hidden_size: int
    heads: int
    pattern: str
    sequence: int
    batch: int
    steps: int
    learning_rate: float
    virtual_width: str = "--vwn-m 2 --vwn-n 8"
    precision: str = ""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.batch * self.sequence

    @property
    def flags(self) -> list[str]:
        """Megatron's flags without those of folders and virtual width."""
        layout = "--tensor-model-parallel-size 2 --sequence-parallel" if self.ranks == 2 else ""
        evaluation_batch = 2 * self.batch
        return f"""
            --hybrid-layer-pattern {self.pattern} --hidden-size {self.hidden_size} --num-attention-heads {self.heads}
            --normalization RMSNorm --disable-bias-linear --squared-relu --position-embedding-type rope
            --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
            --seq-length {self.sequence} --max-position-embeddings {self.sequence}
            --train-data-path {DATA}_train --valid-data-path {DATA}_valid --data-cache-path {OUT}/data/index
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model {DATA}_tokenizer
            --micro-batch-size {self.batch} --global-batch-size {self.batch} --train-iters {self.steps}
            --lr {self.learning_rate} --min-lr {self.learning_rate / 10} --lr-decay-style cosine
            --lr-warmup-iters {self.steps // 20} --adam-beta2 0.95 --weight-decay 0.1 --seed 1
            --eval-interval {self.steps // 10} --eval-iters {49_152 // (evaluation_batch * self.sequence)}
            --eval-micro-batch-size {evaluation_batch} --eval-global-batch-size {evaluation_batch}
            --log-interval {self.steps // 50} --log-timers-to-tensorboard --save-interval {self.steps // 4}
            --use-distributed-optimizer {layout} {self.precision}
        """.split()


def preset_for_this_machine() -> Preset:
    """Two CPU processes, or a larger model on up to two GPUs."""
    if not torch.cuda.is_available():
        return Preset(
            ranks=2, hidden_size=128, heads=4, pattern="*-*-*-*-", sequence=128, batch=8, steps=400, learning_rate=3e-3
        )
    return Preset(
        ranks=min(2, torch.cuda.device_count()),
        hidden_size=512,
        heads=8,
        pattern="*-*-*-*-*-*-",
        sequence=256,
        batch=16,
        steps=500,
        learning_rate=1e-3,
        precision="--bf16",
    )


def main() -> int:
    """Prepare, train, resume, report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs and start over")
    fresh = parser.parse_args().fresh
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: end the ranks too
    if fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    preset, baseline, wide = preset_for_this_machine(), OUT / "baseline", OUT / "virtual-width"
    costs = {baseline: 1.0, wide: WIDE_STEP_COST}
    clock = Clock(sum(cost * (preset.steps - last_checkpoint(folder)) for folder, cost in costs.items()))
    try:
        keep_settings(preset)
        prepare_data(clock)
        train(baseline, command(preset, baseline), preset.steps, clock)
        # Interrupted half-way on purpose: a checkpoint is worth something only if training goes on from it.
        wide_command, half = command(preset, wide, *preset.virtual_width.split()), preset.steps // 2
        train(wide, [*wide_command, "--exit-interval", str(half)], half, clock, WIDE_STEP_COST)
        train(wide, wide_command, preset.steps, clock, WIDE_STEP_COST)
    except RunFailedError as failure:
        print(f"quickstart: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; start again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    print(summarise(baseline, wide, preset.virtual_width, preset.tokens_per_step))
    print(f"Logs, event files and checkpoints: {baseline} and {wide}.")
    print(f"Curves: .venv/bin/tensorboard --logdir {OUT}")
    print(f"This took {clock.elapsed}.")
    return 0


def keep_settings(preset: Preset) -> None:
    """Refuse to go on with runs that were started with other settings."""
    settings, path = json.dumps([preset.flags, preset.virtual_width], indent=1), OUT / "settings.json"
    if path.exists() and path.read_text() != settings:
        raise RunFailedError(f"{OUT} holds runs with other settings: start with --fresh to replace them.")
    path.write_text(settings)


def prepare_data(clock: Clock) -> None:
    """Tokenise the novels, once."""
    if DATA.with_name("austen_valid.bin").exists():
        return
    clock.say("data", f"training a tokenizer on {TEXT} and encoding it")
    DATA.parent.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "megatron_vwn_tools.prepare_data", str(TEXT), "--output", str(DATA)]
    options = ["--train-tokenizer", "4096", "--validation-fraction", "0.05", "--overwrite"]
    for line in run_logged([*program, *options], OUT / "data" / "log.txt"):
        clock.say("data", line)


def command(preset: Preset, folder: Path, *virtual_width: str) -> list[str]:
    """The launch of one run, which resumes from its own checkpoints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(preset.ranks)]
    checkpoints, events = str(folder / "checkpoints"), str(folder / "events")
    folders = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", events]
    return [*launcher, "-m", "megatron_vwn.training.pretrain", *preset.flags, *folders, *virtual_width]


if __name__ == "__main__":
    sys.exit(main())
