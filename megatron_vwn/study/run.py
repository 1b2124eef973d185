"""All runs of a study, at most so many at once; each goes on from its last checkpoint, and a done one is left alone."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vwn.benchmark.machine import commit, hardware, has_gpu, versions
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.study.child import Child, launch, tail
from megatron_vwn.study.folder import RunFolder, token_files
from megatron_vwn.study.plan import Run, Study
from megatron_vwn.study.progress import Progress, minutes
from megatron_vwn.training.log_lines import read_step, read_validation

_SECONDS_BETWEEN_LOOKS = 0.5
Gpus = tuple[str, ...] | None


def slots(ranks: int, jobs: int | None) -> list[Gpus]:
    """Where runs can be at once: GPUs of each place, None for a place on the CPU.

    Args:
        ranks: of one run, each with a GPU of its own.
        jobs: at most so many; None for one on a CPU and as many as fit on GPUs.

    Raises:
        VirtualWidthError: a run needs more GPUs than there are.
    """
    if not has_gpu():
        return [None] * (jobs or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    places = [tuple(names[first : first + ranks]) for first in range(0, len(names) - ranks + 1, ranks)]
    if not places:
        raise VirtualWidthError(f"a run has {ranks} ranks and this machine {len(names)} GPUs: lower ranks.")
    return places[:jobs]


def machine(ranks: int) -> dict:
    """What runs here run on, for their records."""
    facts = hardware(torch.device("cuda" if has_gpu() else "cpu"))
    # Each rank has one thread; those of this process are of no interest.
    name = facts["processor"] if facts["device"] == "cpu" else facts["name"]
    return {"device": facts["device"], "name": name, "cores": os.cpu_count(), "ranks": ranks}


def run_all(
    study: Study, output: Path, runs: Sequence[Run], places: Sequence[Gpus], counted: dict[str, dict], lock: int
) -> list[Run]:
    """Train what is not done.

    Args:
        study: whose runs they are.
        output: its folder.
        runs: those to train.
        places: as ``slots`` gives them.
        counted: of each variant, as ``count.count`` gives it.
        lock: the descriptor that children inherit.

    Returns:
        The runs that were refused or failed.
    """
    folders = [RunFolder(output, run) for run in runs]
    waiting = [folder for folder in folders if not folder.done]
    for folder in folders:
        if folder.done:
            folder.clean(keep_checkpoints=study.keep_checkpoints)
    left = {folder.run.name: (folder.run, folder.last_checkpoint) for folder in waiting}
    progress = Progress(left, len(places))
    if len(waiting) < len(folders):
        progress.say("study", f"{len(folders) - len(waiting)} of {len(folders)} runs were done earlier")
    facts = {"hardware": machine(study.ranks), "versions": versions(), "commit": commit()}
    free, busy, failed = list(places), {}, []
    try:
        while waiting or busy:
            while waiting and free:
                folder, place = waiting.pop(0), free.pop(0)
                child = _start(study, folder, place, facts, counted.get(folder.run.variant.name), lock)
                whence = f"resuming from step {folder.last_checkpoint}" if folder.last_checkpoint else "starting"
                progress.say(folder.run.name, f"{whence}; log: {folder.log}")
                busy[child] = folder, place, time.monotonic()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for child, (folder, place, begin) in list(busy.items()):
                code = child.poll()
                _show(child, folder.run, progress)
                if code is None:
                    continue
                del busy[child]
                free.append(place)
                progress.finish(folder.run)
                if not _settle(study, folder, code, time.monotonic() - begin, progress):
                    failed.append(folder.run)
    finally:
        for child in busy:
            child.end()
    return failed


def _start(study: Study, folder: RunFolder, place: Gpus, facts: dict, counted: dict | None, lock: int) -> Child:
    variant, flags, record = folder.run.variant, folder.arguments(), folder.record
    # A record that is older than "starts" has the facts of its last one itself.
    earlier = record.get("starts") or ([{key: record.get(key) for key in facts}] if record else [])
    folder.write(
        variant=variant.name,
        seed=folder.run.seed,
        flags=folder.run.arguments(),
        ranks=study.ranks,
        steps=variant.steps,
        tokens_per_step=variant.tokens_per_step,
        m=variant.flags.get("vwn-m"),
        n=variant.flags.get("vwn-n"),
        state="running",
        command=shlex.join(["torchrun", *launch(flags, study.ranks)[3:]]),
        data=token_files(folder.run),
        started=record.get("started") or time.strftime("%Y-%m-%d %H:%M:%S"),
        starts=[*earlier, {"step": folder.last_checkpoint} | facts],
        counted=counted,
    )
    return Child(flags, study.ranks, folder.log, place, keep_open=(lock,))


def _show(child: Child, run: Run, progress: Progress) -> None:
    for line in child.new_lines():
        if step := read_step(line):
            progress.step(run, step)
        elif validation := read_validation(line):
            progress.say(run.name, f"step {validation[0]}  validation loss {validation[1]:.4f}")


def _settle(study: Study, folder: RunFolder, code: int, seconds: float, progress: Progress) -> bool:
    """Record how a run has ended; whether it is done."""
    name, spent = folder.run.name, folder.record.get("seconds", 0.0) + seconds
    if code == 0 and folder.last_checkpoint >= folder.run.variant.steps:
        folder.write(seconds=spent)
        folder.finish(keep_checkpoints=study.keep_checkpoints)
        progress.say(name, f"done in {minutes(seconds)}")
        return True
    said = tail(folder.log)
    refused = said.startswith("megatron_vwn: ")
    folder.write(state="refused" if refused else "failed", seconds=spent, exit_code=code, said=said)
    if refused:
        progress.say(name, f"refused: {said.removeprefix('megatron_vwn: ')}")
    elif code == 0:
        progress.say(name, f"ended at step {folder.last_checkpoint} of {folder.run.variant.steps}; see {folder.log}")
    else:
        progress.say(name, f"failed with exit code {code}; the end of {folder.log} is\n{said}")
    return False
