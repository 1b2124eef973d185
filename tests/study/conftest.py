"""Event files whose speed-ups are known in closed form."""

import pytest
from study.event_files import SEEDS, STEPS, WIDTHS, falling, megatron_arguments, pace, write_run


@pytest.fixture
def known(tmp_path):
    """A folder of event files, twelve runs."""
    for r in WIDTHS:
        for seed, (offset, _) in SEEDS.items():
            scalars = {
                "lm loss": falling(pace(r, seed), 5 + offset, every=1),
                "lm loss validation": falling(pace(r, seed), 5 + offset),
                "mtp_1 loss": falling(pace(r, seed), 6 + offset, every=1),
                "iteration-time": dict.fromkeys(range(8, STEPS + 1, 8), 0.1 * r),
            }
            name = "base" if r == 1 else f"wide{r}"
            write_run(tmp_path / "runs" / name / f"seed-{seed}" / "events", scalars, megatron_arguments(r))
    return tmp_path / "runs"
