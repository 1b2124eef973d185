"""Which checkpoint of a folder is the last."""

import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.tracker import TRACKER, last_step, steps_begun, tracked, whole_steps


@pytest.fixture
def folder(tmp_path):
    """Two whole checkpoints and one that was only begun."""
    for step, files in (
        (3, (".metadata", "metadata.json")),
        (20, (".metadata", "metadata.json")),
        (25, (".metadata",)),
    ):
        (tmp_path / f"iter_{step:07d}").mkdir()
        for name in files:
            (tmp_path / f"iter_{step:07d}" / name).touch()
    return tmp_path


@pytest.mark.parametrize("content", [None, "", " \n", "\0\0"])
def test_the_newest_whole_checkpoint_where_the_tracker_is_lost(folder, content):
    if content is not None:
        (folder / TRACKER).write_text(content)
    assert tracked(folder) is None
    assert whole_steps(folder) == [3, 20] and len(steps_begun(folder)) == 3
    assert last_step(folder) == 20


@pytest.mark.parametrize(("content", "step"), [("3", 3), ("3\n", 3), ("release", 0)])
def test_what_the_tracker_says(folder, content, step):
    (folder / TRACKER).write_text(content)
    assert tracked(folder) == content.strip() and last_step(folder) == step


def test_nothing_to_find(tmp_path):
    assert last_step(tmp_path) == last_step(tmp_path / "none") == 0


@pytest.mark.parametrize("content", ["two", "-3", "1.5", "٣", "1" * 5000])
def test_a_tracker_that_says_something_else_is_refused(folder, content):
    (folder / TRACKER).write_text(content)
    with pytest.raises(VirtualWidthError, match=r"cannot be read \(it names no checkpoint but .*\): .*\.$"):
        last_step(folder)
