"""All metadata is in pyproject.toml; this file packs what lies outside the package: recipes and patches."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
# Folder of the repository: where the installed package looks for it.
DATA = {"examples/recipes": "megatron_vwn/recipes/yaml", "patches": "megatron_vwn/megatron_lm/patches"}


def files(folder):
    """All files below a folder of the repository."""
    return [file for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]


class BuildWithData(build_py):
    """Also copies DATA; an editable installation finds these folders in its checkout."""

    def run(self):
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for source, target in DATA.items():
            for file in files(source):
                copy = Path(self.build_lib, target, file.relative_to(ROOT / source))
                self.mkpath(str(copy.parent))
                self.copy_file(str(file), str(copy))


class SourcesWithData(sdist):
    """Also packs DATA, without which a wheel that is built from the sources would lack it."""

    def make_distribution(self):
        """Pack what setuptools has found, and DATA."""
        self.filelist.extend(str(file.relative_to(ROOT)) for source in DATA for file in files(source))
        super().make_distribution()


setup(cmdclass={"build_py": BuildWithData, "sdist": SourcesWithData})
