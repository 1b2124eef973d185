"""apply_patches: applied, found applied, reverted to the last bit, and refused with nothing written."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from megatron_lm.patched_tree import TARGETS, small_tree

from megatron_vwn.megatron_lm import apply_patches

MARK = "megatron_vwn"


@pytest.fixture
def tree(tmp_path):
    return small_tree(tmp_path / "Megatron-LM")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, so that nothing may be left behind either."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    return captured.err


def test_apply_again_and_revert_to_the_last_bit(tree, capsys):
    before = contents(tree)
    modes = {name: (tree / name).stat().st_mode for name in TARGETS}
    os.chmod(tree / TARGETS[2], 0o755)
    assert apply_patches.main([str(tree)]) == 0
    assert "patches applied" in capsys.readouterr().out
    after = contents(tree)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} == set(TARGETS)
    for name in TARGETS:
        assert MARK in after[name].decode() and MARK not in _without_test_lines(before[name].decode())
        compile(after[name], name, "exec")
    assert (tree / TARGETS[2]).stat().st_mode & 0o777 == 0o755

    assert apply_patches.main([str(tree)]) == 0
    assert "already applied" in capsys.readouterr().out
    assert contents(tree) == after

    assert apply_patches.main([str(tree), "--revert"]) == 0
    assert "patches reverted" in capsys.readouterr().out
    assert contents(tree) == before
    assert all((tree / name).stat().st_mode == modes[name] for name in TARGETS[:2])
    assert apply_patches.main([str(tree), "--revert"]) == 0
    assert "has no patch" in capsys.readouterr().out
    assert contents(tree) == before


def test_check_says_and_writes_nothing(tree, capsys):
    before = contents(tree)
    assert apply_patches.main([str(tree), "--check"]) == 0
    said = capsys.readouterr().out
    assert "can be applied" in said and all(name in said for name in TARGETS)
    assert contents(tree) == before
    apply_patches.main([str(tree)])
    after = contents(tree)
    capsys.readouterr()
    assert apply_patches.main([str(tree), "--check", "--revert"]) == 0
    assert "can be reverted" in capsys.readouterr().out
    assert contents(tree) == after


def test_lines_of_the_user_elsewhere_stay_and_a_restored_file_is_patched_again(tree, capsys):
    entry = tree / TARGETS[2]
    entry.write_text("# mine\n" + entry.read_text())
    before = contents(tree)
    assert apply_patches.main([str(tree)]) == 0
    after = contents(tree)
    entry.write_bytes(before[TARGETS[2]])
    capsys.readouterr()
    assert apply_patches.main([str(tree)]) == 0
    said = capsys.readouterr().out
    assert TARGETS[2] in said and TARGETS[1] not in said
    assert contents(tree) == after
    assert apply_patches.main([str(tree), "--revert"]) == 0
    assert contents(tree) == before


def test_inside_a_git_repository_and_with_the_users_settings(tree, monkeypatch):
    """git apply would skip, without a word, files outside of the folder of a repository that it is called in."""
    subprocess.run(["git", "init", "-q", tree.parent], check=True)
    monkeypatch.setenv("GIT_DIR", str(tree.parent / ".git"))
    settings = tree.parent / "settings"
    settings.write_text("[core]\n\tautocrlf = true\n[apply]\n\twhitespace = error\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    (tree.parent / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tree.parent / "temporary"))
    before = contents(tree)
    assert apply_patches.main([str(tree)]) == 0
    after = contents(tree)
    assert all(after[name] != before[name] and b"\r" not in after[name] for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_a_changed_line_is_refused_before_anything_is_written(tree, capsys, name, flags):
    changed = {
        TARGETS[0]: ("    if is_hybrid_model(args):\n", "    if args.hybrid_layer_pattern:\n"),
        TARGETS[1]: ("def num_floating_point_operations(\n", "def count_floating_point_operations(\n"),
        TARGETS[2]: ("        model_cfg = hybrid_config_from_args(args)\n", "        model_cfg = mine(args)\n"),
    }[name]
    text = (tree / name).read_text()
    assert changed[0] in text
    (tree / name).write_text(text.replace(*changed))
    before = contents(tree)
    assert apply_patches.main([str(tree), *flags]) == 2
    assert name in refusal(capsys)
    assert contents(tree) == before


@pytest.mark.parametrize("name", TARGETS)
def test_a_missing_file_is_refused(tree, capsys, name):
    (tree / name).unlink()
    before = contents(tree)
    assert apply_patches.main([str(tree)]) == 2
    said = refusal(capsys)
    assert name in said and "whole Megatron-LM checkout" in said
    assert contents(tree) == before


def test_another_version_and_another_folder_are_refused(tree, tmp_path, capsys):
    version = tree / "megatron/core/package_info.py"
    text = version.read_text()
    assert "MINOR = 19\n" in text
    version.write_text(text.replace("MINOR = 19\n", "MINOR = 20\n"))
    before = contents(tree)
    assert apply_patches.main([str(tree)]) == 2
    said = refusal(capsys)
    assert "Megatron-LM 0.20." in said and "0.19.x" in said
    version.write_text(text.replace("MINOR = 19\n", ""))
    assert apply_patches.main([str(tree)]) == 2
    assert "does not say MAJOR" in refusal(capsys)
    shutil.copy(tree / TARGETS[1], version)  # the version of nothing
    assert apply_patches.main([str(tmp_path / "none")]) == 2
    assert "package_info.py" in refusal(capsys)
    del before["megatron/core/package_info.py"]
    assert before.items() <= contents(tree).items()


def test_a_disk_that_gives_up_leaves_every_file_as_it_was(tree, capsys, monkeypatch):
    before, replace, calls = contents(tree), os.replace, []

    def give_up_at_the_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(apply_patches.os, "replace", give_up_at_the_second)
    assert apply_patches.main([str(tree)]) == 2
    assert "No space left" in refusal(capsys)
    assert len(calls) == 2
    assert contents(tree) == before


def test_no_git_is_said(tree, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert apply_patches.main([str(tree)]) == 2
    assert "git is not installed" in refusal(capsys)


def _without_test_lines(text: str) -> str:
    """A file without the import of the plugin's data, which stands for Megatron-LM's own."""
    return text.replace("from megatron_vwn.training.batch import", "")
