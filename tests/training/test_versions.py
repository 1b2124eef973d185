"""What the entry point says of installed versions, before it imports any of them."""

import tomllib
from pathlib import Path

import pytest

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.training.refusals import versions


@pytest.fixture
def megatron_of(tmp_path, monkeypatch):
    """Makes a source checkout of some megatron-core the one that would be imported; "" for none."""

    def is_now(text):
        folder = tmp_path / "megatron" / "core"
        folder.mkdir(parents=True)
        (folder / "package_info.py").write_text(text)
        spec = type("Spec", (), {"submodule_search_locations": [str(folder)]})
        monkeypatch.setattr(versions, "find_spec", lambda name: spec if text else None)

    return is_now


@pytest.mark.parametrize("text", ["MAJOR = 0\nMINOR = 19\nPATCH = 0\n", "MAJOR = 0\nMINOR = 19\nPATCH = 7\n"])
def test_releases_of_019_are_let_through(megatron_of, text):
    megatron_of(text)
    versions.refuse_versions([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = ''\n", "megatron-core 0.20.0"),
        ("MAJOR = 0\nMINOR = 18\nPATCH = 2\n", "megatron-core 0.18.2"),
        ("VERSION = somewhere_else\n", "megatron-core (of unknown version)"),
    ],
)
def test_others_are_refused_unless_allowed(megatron_of, text, said):
    megatron_of(text)
    with pytest.raises(VirtualWidthError, match=r"install megatron-core 0\.19\.2, or give --allow-untested") as refusal:
        versions.refuse_versions(["--hidden-size", "64"])
    assert str(refusal.value).startswith(said)
    versions.refuse_versions(["--allow-untested"])
    assert versions.untested_megatron() == said


def test_a_missing_megatron_is_refused(megatron_of):
    megatron_of("")
    with pytest.raises(VirtualWidthError, match=r"is not installed: install megatron_vwn\[train\]\.$"):
        versions.refuse_versions(["--allow-untested"])


@pytest.mark.parametrize(("installed", "tried"), [("2.10.0", False), ("2.11.0+cu130", True), ("2.99.0a0", False)])
def test_a_torch_that_was_not_tried_is_said(monkeypatch, installed, tried):
    monkeypatch.setattr(versions, "version", lambda package: installed)
    said = versions.untested_packages()
    assert said == [] if tried else installed in said[0] and "-c constraints.txt" in said[0]


def test_the_tested_range_is_the_declared_one():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"][0]
    (oldest, (major, minor)) = versions.TESTED["torch"]
    assert declared == "torch>={}.{},<{}.{}".format(*oldest, major, minor + 1)
