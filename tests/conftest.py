"""How the suite is spread over processes, what kind each check is, and what ``--quick`` leaves of it."""

import signal
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# These files share a fixture of the session, which no second process should compute again.
SHARED = {"checkpoint"}
# By the seconds that they took (--durations), the longest first: a long file that began last would leave the other core
# idle.
LONGEST_FIRST = [
    "parallel/test_parallel.py",
    "ops/test_kernels.py",
    "checkpoint",
    "examples/test_recipes_elastic.py",
    "benchmark/test_gpu_hour.py",
    "training/test_kernels_in_training.py",
    "examples/test_recipes_launch.py",
    "data/test_dali_data.py",
    "examples/test_recipes_models.py",
    "study/test_study_run.py",
    "training/test_refusals.py",
    "training/test_attention_kinds.py",
    "training/test_kill_and_resume.py",
    "megatron_lm/test_patched.py",
    "planner/test_plan.py",
    "cpu/test_cpu_session.py",
    "hf/test_parity.py",
    "training/test_data.py",
]
# Marker of a file, or of all files of a folder. "emulated" pins our assumptions of something that is not there.
KINDS = {
    "gpu": ["gpu"],
    "te": ["modules/test_transformer_engine.py", "modules/test_fp8.py", "gpu/test_fp8.py"],
    "bridge": ["checkpoint/test_bridge.py"],
    "emulated": ["modules/test_fp8.py", "hf/test_serving.py"],
    "slow": LONGEST_FIRST,
}
# What --quick runs: from every room what costs little, of the parallel layouts one.
QUICK = [
    "test_config.py",
    "benchmark/test_benchmark_table.py",
    "checkpoint/test_fixture.py",
    "cpu/test_cpu_emulation.py",
    "data/test_indexed_data.py",
    "data/test_token_windows.py",
    "examples/test_recipes.py",
    "hf/test_config.py",
    "hf/test_connection.py",
    "megatron_fixes/test_fixes.py",
    "megatron_lm/test_apply_patches.py",
    "modules/test_specs.py",
    "ops/test_composed.py",
    "ops/test_connection.py",
    "ops/test_costs.py",
    "ops/test_reference.py",
    "parallel/test_parallel.py::test_check[parity: TP2+SP]",
    "planner/test_plan_formulas.py",
    "recipes/test_recipe_flags.py",
    "study/test_study_plan.py",
    "training/test_layer_rules.py",
    "training/test_monitoring_report.py",
    "training/test_stage_rules.py",
]


# A shell that starts the suite in the background has it ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="something from every room, in minutes")


def pytest_itemcollected(item):
    """The kind of a check, as a marker."""
    for kind, places in KINDS.items():
        if any(_path(item) == place or _path(item).startswith(f"{place}/") for place in places):
            item.add_marker(kind)
    if "needs a GPU" in [mark.kwargs.get("reason") for mark in item.iter_markers("skipif")]:
        item.add_marker("gpu")


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_quick(item)]
    for item in items:  # a report's keywords are names of folders, too
        item.user_properties += [("kind", kind) for kind in KINDS if item.get_closest_marker(kind)]
    places = {group: place for place, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(group_of(_path(item)), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hands whole groups to the processes. xdist's own "loadgroup" does nothing, in silence, with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid.partition("::")[0].removeprefix(f"{TESTS.name}/"))

    return Groups(config, log)


def pytest_terminal_summary(terminalreporter):
    """One line: how many checks of each kind ran, and what the skipped ones lacked."""
    ran, skipped = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call":
                ran["all"] += 1
                ran.update(kind for name, kind in report.user_properties if name == "kind")
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason.removeprefix("Skipped: ")] += 1
    kinds = ", ".join(f"{ran[kind]} {kind}" for kind in KINDS)
    lacking = "; ".join(f"{count} {reason}" for reason, count in skipped.most_common()) or "none"
    terminalreporter.write_line(f"checks that ran: {ran['all']}, of which {kinds}; skipped: {lacking}")


def _path(item) -> str:
    return item.path.relative_to(TESTS).as_posix()


def group_of(path: str) -> str:
    """What stays in one process: a file, or all files of a folder."""
    room = path.partition("/")[0]
    return room if room in SHARED else path


def _is_quick(item) -> bool:
    return _path(item) in QUICK or f"{_path(item)}::{item.name}" in QUICK
