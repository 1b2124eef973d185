"""The wheel has everything: it is built, installed without a network, and every module of it is imported."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Reads the installed package alone: recipes, results, patches, READMEs and templates are files of the wheel.
PROGRAM = """
import importlib, pkgutil, sys, tempfile, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import megatron_vwn
from megatron_vwn import cpu
from megatron_vwn.config import VirtualWidthError

folder = Path(megatron_vwn.__file__).parent
assert folder.is_relative_to(sys.argv[1]), folder
cpu.install(announce=False)
names = [module.name for module in pkgutil.walk_packages(megatron_vwn.__path__, "megatron_vwn.")]
assert len(names) > 100, len(names)
refused = []
for name in names:
    try:
        importlib.import_module(name)
    except VirtualWidthError:
        refused.append(name)
# Megatron-Bridge is not installed.
assert refused == ["megatron_vwn.checkpoint.bridge", "megatron_vwn.checkpoint.bridge_provider"], refused

from megatron_vwn.benchmark.report import RESULTS
from megatron_vwn.recipes.recipe import load_recipe, recipe_names

assert {"moe-a3.3b", "dense-1b"} <= set(recipe_names()), recipe_names()
load_recipe("moe-a3.3b")
with tempfile.TemporaryDirectory() as elsewhere:
    own = Path(elsewhere, "own.yaml")
    own.write_text("base: dense-1b")
    assert load_recipe(str(own)).flags == load_recipe("dense-1b").flags
assert list(RESULTS.glob("*.json")), RESULTS
assert list((folder / "megatron_lm" / "patches").glob("0.19/*.patch"))
refusals = folder / "training" / "refusals"
assert (refusals / "SUPPORT.md").is_file() and (refusals / "known_flags.txt").is_file()
for file in ("py.typed", "CHANGES.md", "study/report/report.md.j2"):
    assert (folder / file).is_file(), file
print(len(names), "modules")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a copy of the checkout, in ``source``, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def installed(folder):
    """A folder with the package as pip unpacks its wheel."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--target", folder / "site", folder / "source"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_every_module_and_every_file_is_inside(installed):
    # -S leaves out the editable installation of this checkout; what the package needs comes by the path.
    libraries = [installed, *dict.fromkeys(path for path in sys.path if Path(path).name == "site-packages")]
    libraries.append(sysconfig.get_paths()["purelib"])
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, installed],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, libraries)), "CUDA_VISIBLE_DEVICES": ""},
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.endswith("modules\n")


def test_sources_have_what_a_wheel_is_built_from(folder):
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "megatron_vwn/py.typed"}
    for outside in ("examples/recipes", "patches"):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / outside).rglob("*") if path.is_file()}
    assert len(wanted) > 10 and wanted <= names, wanted - names
