"""How the suite is spread over processes: one file stays in one process, and the longest begin first."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# These files share a fixture of the session, which no second process should compute again.
SHARED = {"checkpoint"}
# By the sessions that they start, the longest first: a long file that began last would leave the other core idle.
LONGEST_FIRST = [
    "examples/test_recipes_elastic.py",
    "study/test_study_run.py",
    "parallel/test_parallel.py",
    "training/test_refusals.py",
    "examples/test_evaluate.py",
    "training/test_kill_and_resume.py",
    "planner/test_plan.py",
    "megatron_lm/test_patched.py",
    "ops/test_kernels.py",
    "data/test_dali_data.py",
    "cpu/test_cpu_session.py",
    "checkpoint",
]


def group_of(path: Path) -> str:
    relative = path.relative_to(TESTS)
    return relative.parts[0] if relative.parts[0] in SHARED else relative.as_posix()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group_of(item.path)))
    places = {group: place for place, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(group_of(item.path), len(places)))
