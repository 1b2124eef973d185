"""vwn-study: train variants of a model with several seeds, and compare what came out.

vwn-study run STUDY.yaml --output DIR [--dry-run] [--only NAME] [--jobs N]
vwn-study time STUDY.yaml --output DIR
vwn-study keep DIR --output FOLDER
vwn-study report DIR... [--baseline NAME] [--output FOLDER]

A study that was interrupted or killed goes on where it was; done runs are left alone. The report reads event files
only, also those of other Megatron runs: every folder with event files is a run, a name ends in seed-N or -sN.
"""

import argparse
import shlex
import sys
from pathlib import Path

from megatron_vwn.cli import FAILED, exit_code, flag_groups
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import check_flags
from megatron_vwn.study.plan import Run, Study, check_data, load_study, repeated_data

# What the package's extra "study" installs; training needs none of it.
_EXTRA = ("jinja2", "markdown", "matplotlib", "scipy")


def main(argv: list[str] | None = None) -> int:
    """Run, time, keep or report; returns the exit code."""
    options = _parser().parse_args(argv)
    left = {
        _report: "nothing was written",
        _keep: "each run is written whole or not at all; start again for the rest",
    }.get(options.action, "start again to go on from the last checkpoints")
    return exit_code("vwn-study", lambda: options.action(options), left)


def _run(options: argparse.Namespace) -> int:
    study = load_study(options.study, options.data)
    runs = study.runs(options.only)
    check_data(study)
    for said in repeated_data(study):
        print(f"# {said}", flush=True)
    if options.dry_run:
        check_flags(_all_flags(study))
        _print_plan(study, runs, options.output)
        return 0
    return _train(study, runs, options)


def _train(study: Study, runs: list[Run], options: argparse.Namespace) -> int:
    from megatron_vwn.study.folder import RunFolder, locked
    from megatron_vwn.study.run import run_all, slots
    from megatron_vwn.study.timing import time_variants

    places = slots(study.ranks, options.jobs)
    for run in study.runs():
        RunFolder(options.output, run).check(study.ranks)
    with locked(options.output) as lock:
        counted = _counted(study, options.output, command=shlex.join(["vwn-study", *sys.argv[1:]]))
        failed = run_all(study, options.output, runs, places, counted, lock)
        done = [each for each in study.variants if any(run.variant == each and run not in failed for run in runs)]
        untimed = [] if options.no_timing else time_variants(study, options.output, done, places[0], lock)
    if failed or untimed:
        names = ", ".join([run.name for run in failed] + [f"timing of {name}" for name in untimed])
        print(f"vwn-study: failed: {names}; start again to try these once more.", file=sys.stderr)
        return FAILED
    print(f"All {len(runs)} runs are done. Compare them: vwn-study report {shlex.quote(str(options.output))}")
    return 0


def _time(options: argparse.Namespace) -> int:
    study = load_study(options.study, options.data)
    check_data(study)
    return _measure(study, options)


def _measure(study: Study, options: argparse.Namespace) -> int:
    from megatron_vwn.study.folder import locked
    from megatron_vwn.study.run import slots
    from megatron_vwn.study.timing import time_variants

    with locked(options.output) as lock:
        _counted(study, options.output)
        failed = time_variants(study, options.output, study.variants, slots(study.ranks, 1)[0], lock)
    return FAILED if failed else 0


def _counted(study: Study, output: Path, **more: str) -> dict[str, dict]:
    """FLOPs and parameters of every variant, counted once; refuses flags that nobody knows."""
    from megatron_vwn.study.count import count
    from megatron_vwn.study.folder import STUDY, read_json, write_study

    before = read_json(output / STUDY)
    known = {
        variant.name: before["counted"][variant.name]
        for variant in study.variants
        if before.get("variants", {}).get(variant.name) == variant.arguments()
        and "flops_per_token" in before.get("counted", {}).get(variant.name, {})
    }
    missing = {each.name: each.arguments() for each in study.variants if each.name not in known}
    if missing:
        print("Checking flags and counting parameters and FLOPs of each variant.", flush=True)
        check_flags(_all_flags(study))
        known |= count(missing, study.ranks)
        for name in missing:
            if "unknown" in known[name]:
                print(f"{name}: its FLOPs are unknown ({known[name]['unknown']}).", flush=True)
    write_study(output, study, counted=known, **more)
    return known


def _all_flags(study: Study) -> list[str]:
    """Every flag and value of the study once, for the parser; which of them go together is seen when a run starts."""
    groups = dict.fromkeys(group for variant in study.variants for group in flag_groups(variant.arguments()))
    return [word for group in groups for word in group]


def _print_plan(study: Study, runs: list[Run], output: Path) -> None:
    from megatron_vwn.study.child import launch
    from megatron_vwn.study.folder import RunFolder

    for run in runs:
        folder = RunFolder(output, run)
        state = "done" if folder.done else f"from step {folder.last_checkpoint}"
        print(f"# {run.name} ({run.variant.steps} steps, {state})")
        print(shlex.join(["torchrun", *launch(folder.arguments(), study.ranks)[3:]]))
    print(f"# {len(runs)} runs of {len(study.variants)} variants; the baseline is {study.baseline}.")


def _report(options: argparse.Namespace) -> int:
    try:
        from megatron_vwn.study.report.write import write_report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise VirtualWidthError(f"a report needs {error.name}: pip install 'megatron_vwn[study]'.") from None

    output = options.output or options.folders[0] / "report"
    for line in write_report(options.folders, output, options.baseline, shlex.join(["vwn-study", *sys.argv[1:]])):
        print(line)
    return 0


def _keep(options: argparse.Namespace) -> int:
    from megatron_vwn.study.report.keep import keep

    print(*keep(options.folder, options.output), sep="\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vwn-study", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True, metavar="run|time|keep|report")
    run = actions.add_parser("run", help="train all variants with all seeds, then measure their steps' time")
    run.set_defaults(action=_run)
    run.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    run.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this variant or run (r8, r8/seed-2); may repeat"
    )
    run.add_argument("--jobs", type=_count, metavar="N", help="runs at once (default: 1, or one per ranks GPUs)")
    run.add_argument("--no-timing", action="store_true", help="do not measure seconds per step afterwards")
    time = actions.add_parser("time", help="measure the seconds per step of every variant, alone")
    time.set_defaults(action=_time)
    for each in (run, time):
        each.add_argument("study", type=_file, metavar="STUDY.yaml")
        each.add_argument("--output", type=Path, required=True, metavar="DIR", help="where runs are or will be")
        each.add_argument("--data", metavar="PREFIX", help="replaces data of the study")
    keep = actions.add_parser("keep", help="write finished runs as small text files, from which report works as well")
    keep.set_defaults(action=_keep)
    keep.add_argument("folder", type=Path, metavar="DIR", help="of a study, or with event files below")
    keep.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="what it holds of other runs stays")
    report = actions.add_parser("report", help="compare runs by their event files")
    report.set_defaults(action=_report)
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="of a study, or with event files below")
    report.add_argument("--baseline", metavar="NAME", help="variant that the others are compared with")
    report.add_argument("--output", type=Path, metavar="FOLDER", help="of the report (default: DIR/report)")
    return parser


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not there: give the path of a YAML file")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
