"""Start one node of a recipe's run: torchrun.sh RECIPE [key=value ...] [options] [-- flags of the training program].

Run the same line on every node; --rdzv-endpoint names the one where all of them meet. When a worker dies all ranks
begin anew from the last checkpoint, and so they do when a node's agent dies. SIGTERM, SIGINT or SIGUSR1 to this program
make the training save a checkpoint and end.
"""

import argparse
import os
import shlex
import sys

from preflight import find_machine, preflight, require_packages
from supervise import supervise

from megatron_vwn.cli import REFUSED
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import check_flags
from megatron_vwn.recipes.recipe import Recipe, load_recipe, recipe_names
from megatron_vwn.training.log_lines import launch_order

TRAINING = "megatron_vwn.training.pretrain"
ENVIRONMENT = {
    # The store that agents share by default does not outlive a worker that was killed: no restart would succeed.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "OMP_NUM_THREADS": "1",
}
# Seconds after which a rank counts as hanging, by part of the run; --calc-ft-timeouts measures better ones. The setup
# may build the index of the data, as long as distributed-timeout-minutes lets it.
HANGING = ["--ft-rank-section-timeouts", "setup:3600,step:600,checkpointing:1800"]
HANGING += ["--ft-rank-out-of-section-timeout", "1800"]


def main(argv: list[str] | None = None) -> int:
    """Print or run the command; returns the exit code."""
    options, flags = parse(sys.argv[1:] if argv is None else argv)
    try:
        recipe = load_recipe(options.recipe, options.override, flags, baseline=options.baseline, shrink=options.shrink)
        if options.size:
            print(recipe.number("nodes"), recipe.number("gpus-per-node"), recipe.name)
            return 0
        if recipe.left_out:
            said = f"{recipe.name} has no experts, so this of its base is left out: {', '.join(recipe.left_out)}"
            print(f"torchrun.sh: {said}", file=sys.stderr)
        machine = options.machine or ("gpu" if options.dry_run else find_machine())
        arguments = recipe.arguments(transformer_engine=machine == "gpu")
        endpoint = options.rdzv_endpoint
        if options.dry_run and not endpoint and recipe.number("nodes") > 1:
            endpoint = "HOST:PORT"
            print(f"torchrun.sh: {endpoint} stands for one of the nodes, where all meet, and a port.", file=sys.stderr)
        command = node_command(recipe, arguments, endpoint, options.rdzv_id or recipe.name)
        surroundings = ENVIRONMENT | launch_order(arguments)
        if options.dry_run:
            check_flags(arguments)
            print(describe(command, surroundings))
            return 0
        require_packages(recipe, arguments)
        preflight(recipe, arguments)
    except VirtualWidthError as refusal:
        print(f"torchrun.sh: {refusal}", file=sys.stderr)
        return REFUSED
    print(f"torchrun.sh: {describe(command, surroundings)}", flush=True)
    retries = recipe.get("max-agent-restarts", 0)
    return supervise(command, surroundings | os.environ, worker=TRAINING, retries=retries)


def node_command(recipe: Recipe, arguments: list[str], endpoint: str | None, name: str) -> list[str]:
    """The launch of one node: agent, its settings, training program and its flags.

    Raises:
        VirtualWidthError: several nodes that would not find each other, or an unknown way to restart.
    """
    nodes = recipe.number("nodes")
    if nodes > 1 and not endpoint:
        raise VirtualWidthError(
            f"{recipe.name} runs on {nodes} nodes, which have to meet: add --rdzv-endpoint HOST:PORT with one of them."
        )
    for key in ("max-restarts", "max-agent-restarts"):
        times = recipe.get(key, 0)
        if type(times) is not int or times < 0:
            raise VirtualWidthError(f"{key} is {times!r}: give a whole number of at least 0.")
    restarts = recipe.get("max-restarts", 0)
    agent = ["-m", "megatron_vwn.training.torchrun"]
    if in_job_restart(recipe):
        agent = ["-m", "nvidia_resiliency_ext.fault_tolerance.launcher", *HANGING]
        arguments = [*arguments, "--enable-ft-package", "--calc-ft-timeouts"]
    meeting = (
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", name] if endpoint else ["--standalone"]
    )
    size = ["--nnodes", str(nodes), "--nproc-per-node", str(recipe.number("gpus-per-node"))]
    return [sys.executable, *agent, *size, "--max-restarts", str(restarts), *meeting, "-m", TRAINING, *arguments]


def in_job_restart(recipe: Recipe) -> bool:
    """Whether nvidia-resiliency-ext starts the ranks, rather than torchrun."""
    way = recipe.get("in-job-restart", "torchrun")
    if way not in ("torchrun", "nvidia-resiliency-ext"):
        raise VirtualWidthError(f"in-job-restart is {way!r}: choose torchrun or nvidia-resiliency-ext.")
    return way != "torchrun"


def describe(command: list[str], surroundings: dict[str, str]) -> str:
    """The command as one could type it: environment, agent, training program, one flag a line."""
    lines = [[f"{name}={value}" for name, value in surroundings.items()] + ["python"]]
    for word in command[1:]:
        if word.startswith("-") and not word[1:2].isdecimal():  # no negative number
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the flags after ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="torchrun.sh", description=__doc__.split(":")[0] + ".")
    parser.add_argument("recipe", help=f"a YAML file, or one of {', '.join(recipe_names())}")
    parser.add_argument("override", nargs="*", help="key=value, such as nodes=2 or global-batch-size=256")
    parser.add_argument("--baseline", action="store_true", help="leave the virtual width out, and nothing else")
    parser.add_argument("--shrink", type=int, default=1, metavar="F", help="divide all sizes, to try it on a CPU")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where the nodes meet: one of them, a free port")
    parser.add_argument("--rdzv-id", metavar="NAME", help="of the meeting (default: the recipe's)")
    parser.add_argument(
        "--machine",
        choices=("gpu", "cpu"),
        help="gpu: with Transformer Engine (default: what is here; with --dry-run gpu)",
    )
    parser.add_argument("--size", action="store_true", help="print nodes, GPUs per node and name, and start nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the command of this node and start nothing")
    return parser.parse_intermixed_args(argv[:end]), argv[end + 1 :]


if __name__ == "__main__":
    sys.exit(main())
