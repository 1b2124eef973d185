"""Recipes: from a readable YAML to the argument list of ``megatron_vwn.training.pretrain``.

A recipe has sections (``SECTIONS``) whose keys are flags of Megatron or of the virtual width without their dashes, and
a few of the launcher's own (``OWN``). ``base: other.yaml`` takes everything from another recipe first, from a file
beside it or from one of this package; null removes a key. Nothing here imports torch or Megatron, so that a login node
can read a recipe.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.recipes.flags import SECTIONS, Value, parse_overrides, read_yaml_file, typed
from megatron_vwn.recipes.layout import check_layout, hybrid_pattern
from megatron_vwn.recipes.shrink import shrink_recipe
from megatron_vwn.recipes.width import PREFIXES

# In a checkout, and where the wheel has them (setup.py).
_PLACES = (Path(__file__).parents[2] / "examples" / "recipes", Path(__file__).parent / "yaml")
FOLDER = next((place for place in _PLACES if place.is_dir()), _PLACES[-1])
# Keys that are no flags of the training program.
OWN = {
    "layers": "model",
    "mtp": "model",
    "nodes": "layout",
    "gpus-per-node": "layout",
    "stages-per-rank": "layout",
    "layers-per-stage": "layout",
    "max-restarts": "resilience",
    "max-agent-restarts": "resilience",
    "in-job-restart": "resilience",
}
_OTHER_KEYS = ("base", "stated")
# Sizes of the layout that say nothing without experts; all else about them begins like this.
_EXPERTS_LAYOUT, _EXPERTS_PREFIXES = ("expert-model-parallel-size", "expert-tensor-parallel-size"), ("moe-", "no-moe-")


@dataclass(frozen=True)
class Recipe:
    """One run, described; immutable.

    Attributes:
        name: of the file, with ``-baseline`` for the twin without a virtual width.
        sections: key to value, by section.
        stated: what the paper, or we, say of the backbone's parameters: ``active``, ``total``, ``by``.
        overridden: keys that did not come from the file.
        written: keys that the file itself has, and not its base.
        left_out: keys of a base with experts that say nothing in this model without any.
    """

    name: str
    sections: dict[str, dict[str, Value]]
    stated: dict[str, float | str]
    overridden: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()

    def get(self, key: str, default: Value = None) -> Value:
        """The value of a key, in whatever section it is."""
        for section in self.sections.values():
            if section.get(key) is not None:
                return section[key]
        return default

    @property
    def flags(self) -> dict[str, Value]:
        """All keys with their values."""
        return {key: value for section in self.sections.values() for key, value in section.items()}

    def number(self, key: str, default: int | None = None) -> int:
        """The value of a key that must be a whole number of at least 1.

        Raises:
            VirtualWidthError: it is something else, or missing without a default.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            said = "missing" if value is None else repr(value)
            raise VirtualWidthError(f"{key} of {self.name} is {said}: give a whole number of at least 1.")
        return value

    @property
    def baseline(self) -> bool:
        """Whether the model has no virtual width."""
        return not any(typed(*item) for item in self.sections["virtual_width"].items())

    @property
    def world_size(self) -> int:
        """GPUs of the run (processes, where there are none)."""
        return self.number("nodes") * self.number("gpus-per-node")

    def with_values(self, values: Mapping[str, Value]) -> "Recipe":
        """The recipe with other values; a key that no section has yet goes to the section ``run``."""
        sections = {name: dict(section) for name, section in self.sections.items()}
        for key, value in values.items():
            sections[self._section_of(key)][key] = value
        return replace(self, sections=sections)

    def without_virtual_width(self) -> "Recipe":
        """The twin: the same but for the virtual width, and its own name."""
        if self.baseline:
            return self
        return replace(self, name=f"{self.name}-baseline", sections=self.sections | {"virtual_width": {}})

    def _section_of(self, key: str) -> str:
        for name, section in self.sections.items():
            if key in section:
                return name
        return OWN.get(key) or ("virtual_width" if key.startswith(PREFIXES) else "run")

    def arguments(self, *, transformer_engine: bool) -> list[str]:
        """Flags for ``python -m megatron_vwn.training.pretrain``, each with its name.

        Args:
            transformer_engine: whether a GPU and Transformer Engine are there; otherwise the section ``gpu`` is left
                out.
        """
        words = []
        for name, section in self.sections.items():
            if name == "gpu" and not transformer_engine:
                # What somebody asked for is passed on, so that the training program can say why it cannot be had.
                section = {key: value for key, value in section.items() if key in self.overridden}
            flags = {key: value for key, value in section.items() if key not in OWN and key != "hybrid-layer-pattern"}
            if name == "model":
                flags = {"hybrid-layer-pattern": hybrid_pattern(self)} | flags
            for key, value in flags.items():
                words += typed(key, value.replace("{name}", self.name) if isinstance(value, str) else value)
        return words


def recipe_names(folder: Path = FOLDER) -> list[str]:
    """Names of the recipes that come with a source checkout."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "common")


def load_recipe(
    name: str,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
    *,
    baseline: bool = False,
    shrink: int = 1,
    folder: Path = FOLDER,
) -> Recipe:
    """A recipe as it is to be run: with overrides, at its size, and with a layout that divides.

    Args:
        name: a recipe's name, or the path of a YAML file.
        overrides: ``key=value``.
        flags: flags of the training program, which override too.
        baseline: leave the virtual width out, and nothing else.
        shrink: the factor by which sizes are divided, for one CPU (``shrink_recipe``); 1 leaves the recipe alone.
        folder: where names are looked up.

    Raises:
        VirtualWidthError: a wrong name, value or layout; names of flags are not looked at (``check_flags``).
    """
    recipe = read_recipe(name, folder)
    values = parse_overrides(overrides, flags, OWN)
    if baseline:
        asked = [key for key in values if key.startswith(PREFIXES)]
        if asked:
            raise VirtualWidthError(f"the baseline has no virtual width: drop {asked[0]} or --baseline.")
        recipe = recipe.without_virtual_width()
    recipe = _without_experts(replace(recipe.with_values(values), overridden=frozenset(values)))
    if shrink != 1:
        recipe = shrink_recipe(recipe, shrink)
    check_layout(recipe)
    return recipe


def read_recipe(name: str, folder: Path = FOLDER) -> Recipe:
    """Read a recipe by name, or any YAML file by path.

    Raises:
        VirtualWidthError: no such recipe, or no readable one.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if name not in recipe_names(folder):
            raise VirtualWidthError(_unknown_recipe(name, folder))
    elif not path.is_file():
        raise VirtualWidthError(f"there is no recipe {name}: give the path of a YAML file, or a recipe's name.")
    content, written = _read(path, (), folder)
    stated = {key: _stated(key, value, path) for key, value in content.pop("stated", {}).items()}
    sections = {
        section: {key: value for key, value in content.get(section, {}).items() if value is not None}
        for section in SECTIONS
    }
    seen: dict[str, str] = {}
    for section, values in sections.items():
        for key in values:
            if seen.setdefault(key, section) != section:
                raise VirtualWidthError(
                    f"{path} has {key} in the sections {seen[key]} and {section}: make one of them null."
                )
    return Recipe(path.stem, sections, stated, written=written)


def _without_experts(recipe: Recipe) -> Recipe:
    """A model without experts, without what its base says of them.

    Raises:
        VirtualWidthError: the recipe itself, or an override, says something of experts that are not there.
    """
    if recipe.get("num-experts"):
        return recipe
    given = [key for key, value in recipe.flags.items() if typed(key, value)]
    of_experts = [key for key in given if key.startswith(_EXPERTS_PREFIXES)]
    for key in of_experts:
        if key in recipe.written | recipe.overridden:
            raise VirtualWidthError(f"{key} of {recipe.name} says nothing without num-experts: drop it, or give both.")
    of_experts += [key for key in given if key in _EXPERTS_LAYOUT and key not in recipe.written | recipe.overridden]
    return replace(recipe.with_values(dict.fromkeys(of_experts)), left_out=tuple(of_experts))


def _stated(key: str, value: Value, path: Path) -> float | str:
    if key == "by":
        return str(value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise VirtualWidthError(f"{path} states {key} {value!r}: give a number of parameters.") from None


def _unknown_recipe(name: str, folder: Path) -> str:
    names = recipe_names(folder)
    if not names:
        return f"there is no recipe {name}: recipes come with a source checkout, so give the path of a YAML file."
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"there is no recipe {name}: did you mean {near[0]}?"
    return f"there is no recipe {name}: choose one of {', '.join(names)}."


def _read(path: Path, readers: tuple[Path, ...], folder: Path) -> tuple[dict[str, dict], frozenset[str]]:
    """A file's content on top of its base's, and the keys that are its own."""
    content = read_yaml_file(path)
    for name, section in content.items():
        if name not in (*SECTIONS, *_OTHER_KEYS):
            raise VirtualWidthError(
                f"{path} has a section {name!r}: write keys into one of the sections {', '.join(SECTIONS)}."
            )
        if name != "base":
            _check_section(path, name, section)
    written = frozenset(key for name, section in content.items() if name in SECTIONS for key in section)
    base = content.pop("base", None)
    if base is None:
        return content, written
    source, readers = _base(path, str(base), folder), (*readers, path.resolve())
    if source in readers:
        raise VirtualWidthError(f"{path} has itself as its base: drop base.")
    return _merge(_read(source, readers, folder)[0], content), written


def _check_section(path: Path, name: str, section: object) -> None:
    if not isinstance(section, dict):
        raise VirtualWidthError(f"the section {name} of {path} is no list of keys with values: correct it.")
    for key, value in section.items():
        if not isinstance(key, str) or isinstance(value, dict) or not isinstance(value, Value):
            raise VirtualWidthError(
                f"{key} in the section {name} of {path} is no flag with a number, a word or a list: correct it."
            )


def _base(path: Path, base: str, folder: Path) -> Path:
    """The file beside ``path``, or else the recipe of this package, that ``base`` names."""
    for place in (path.parent / base, folder / base, folder / f"{base}.yaml"):
        if place.is_file():
            return place.resolve()
    raise VirtualWidthError(
        f"{path} has the base {base}, which is neither a file beside it nor one of "
        f"{', '.join(['common', *recipe_names(folder)])}: correct it."
    )


def _merge(below: dict[str, dict], above: dict[str, dict]) -> dict[str, dict]:
    return {name: below.get(name, {}) | above.get(name, {}) for name in below | above}
