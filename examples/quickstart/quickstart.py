"""Train one small model with and without a virtual width on the same tokens, export both and compare them.

Called by run.sh. Everything is written to examples/quickstart/out; starting again goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from evaluation import FOLDER, evaluate, quote
from progress import Clock, RunFailedError, last_checkpoint, run_logged, train
from recipes import DEFAULT, RECIPES, megatron_flags, this_machine
from report import summarise

from megatron_vwn.cli import FAILED, exit_code
from megatron_vwn.config import VirtualWidthError

ROOT = Path(__file__).parent.parent.parent
TEXT = Path("examples/quickstart/data/austen.txt.xz")
OUT = Path("examples/quickstart/out")
DATA = OUT / "data" / "austen"
VALIDATION_FRACTION = 0.05
# Time of a step with a virtual width in steps without; only for the estimate of what remains.
WIDE_STEP_COST = 1.4
# Time of exports and evaluation on two CPU cores; likewise.
EVALUATION_SECONDS = 45


def main() -> int:
    """Prepare, train, resume, export, evaluate, report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default=DEFAULT, help="what to train (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what the recipe trained earlier and start over")
    options = parser.parse_args()
    os.chdir(ROOT)
    return exit_code("quickstart", lambda: run(options), "start again to go on from the last checkpoint")


def run(options: argparse.Namespace) -> int:
    """Everything after the command line; returns the exit code."""
    recipe, machine, results = RECIPES[options.recipe], this_machine(), results_folder(options.recipe)
    baseline, wide, settings = results / "baseline", results / "virtual-width", results / "settings.json"
    evaluation_log = results / "evaluation.txt"
    if options.fresh:
        forget(baseline, wide, settings, evaluation_log)
    results.mkdir(parents=True, exist_ok=True)
    flags, steps = megatron_flags(recipe, machine, str(DATA), str(DATA.parent / "index")), recipe.steps[machine.kind]
    half = steps // 2
    try:
        work = sum(cost * (steps - last_checkpoint(run)) for run, cost in ((baseline, 1.0), (wide, WIDE_STEP_COST)))
        starts = sum(last_checkpoint(run) < until for run, until in ((baseline, steps), (wide, half), (wide, steps)))
        clock = Clock(work, starts, EVALUATION_SECONDS)
        keep_settings(settings, [flags, recipe.virtual_width])
        prepare_data(clock)
        train(baseline, command(machine.ranks, flags, baseline), steps, clock)
        # Interrupted half-way on purpose: a checkpoint is worth something only if training goes on from it.
        wide_command = command(machine.ranks, [*flags, *recipe.virtual_width.split()], wide)
        train(wide, [*wide_command, "--exit-interval", str(half)], half, clock, WIDE_STEP_COST)
        train(wide, wide_command, steps, clock, WIDE_STEP_COST)
        held_out = evaluate(baseline, wide, f"{DATA}_valid", evaluation_log, clock)
    except (RunFailedError, VirtualWidthError) as failure:
        print(f"quickstart: {failure}", file=sys.stderr)
        return FAILED
    bits = tuple(each["bits_per_byte"] for each in held_out)
    print(summarise(baseline, wide, recipe.virtual_width, machine.tokens_per_step, bits))
    print(quote(["baseline", recipe.virtual_width], held_out))
    print(f"Logs, event files and checkpoints: {baseline} and {wide}.")
    print(f"Hugging Face folders: {results}/*/{FOLDER}; examples/evaluate runs lm-eval on them.")
    print(f"Curves: .venv/bin/tensorboard --logdir {results}")
    print(f"This took {clock.elapsed}.")
    return 0


def results_folder(recipe: str) -> Path:
    """Where a recipe's two runs are; those of the default have no folder of their own, as before there were others."""
    return OUT if recipe == DEFAULT else OUT / recipe


def forget(*paths: Path) -> None:
    """Delete runs and settings of one recipe; the tokenised text stays, because other recipes read it too."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def keep_settings(path: Path, settings: list) -> None:
    """Refuse to go on with runs that were started with other settings."""
    text = json.dumps(settings, indent=1)
    if path.exists() and path.read_text() != text:
        raise RunFailedError(f"{path.parent} holds runs with other settings: start with --fresh to replace them.")
    path.write_text(text)


def prepare_data(clock: Clock) -> None:
    """Tokenise the novels, once."""
    if DATA.with_name("austen_valid.bin").exists():
        return
    clock.say("data", f"training a tokenizer on {TEXT} and encoding it")
    DATA.parent.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-m", "megatron_vwn.data", str(TEXT), "--output", str(DATA)]
    options = ["--train-tokenizer", "4096", "--validation-fraction", str(VALIDATION_FRACTION), "--overwrite"]
    for line in run_logged([*program, *options], DATA.with_name("log.txt")):
        clock.say("data", line)


def command(ranks: int, flags: list[str], folder: Path) -> list[str]:
    """The launch of one run, which resumes from its own checkpoints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    checkpoints, events = str(folder / "checkpoints"), str(folder / "events")
    folders = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", events]
    return [*launcher, "-m", "megatron_vwn.training.pretrain", *flags, *folders]


if __name__ == "__main__":
    sys.exit(main())
