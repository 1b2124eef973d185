"""All metadata is in pyproject.toml; this file puts into a wheel what lies outside the package: recipes and patches."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Folder of the repository: where the installed package looks for it.
DATA = {"examples/recipes": "megatron_vwn/recipes/yaml", "patches": "megatron_vwn/megatron_lm/patches"}


class BuildWithData(build_py):
    """Also copies DATA; an editable installation finds these folders in its checkout."""

    def run(self):
        """Build, then copy."""
        super().run()
        if self.editable_mode:
            return
        for source, target in DATA.items():
            for file in (ROOT / source).rglob("*"):
                if file.is_file():
                    copy = Path(self.build_lib, target, file.relative_to(ROOT / source))
                    self.mkpath(str(copy.parent))
                    self.copy_file(str(file), str(copy))


setup(cmdclass={"build_py": BuildWithData})
