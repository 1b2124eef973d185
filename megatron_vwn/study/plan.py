"""A study's YAML: what all runs share, the variants by name or as a grid, times seeds; expanded to command lines.

Keys under ``flags``, ``variants`` and ``grid`` are flags of Megatron or of the virtual width without their dashes, as
in ``examples/recipes``; null removes one. Nothing here imports torch or Megatron.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_vwn.config import LARGEST_SEED, VirtualWidthError
from megatron_vwn.data.indexed import check_indexed_dataset
from megatron_vwn.recipes.flags import EachKeyOnce, Value, read_yaml_file, typed
from megatron_vwn.recipes.width import PREFIXES, check_virtual_width
from megatron_vwn.study.grid import expand_grid
from megatron_vwn.training.refusals.stages import check_pattern

_KEYS = (
    "base",
    "title",
    "ranks",
    "seeds",
    "baseline",
    "data",
    "made-by",
    "keep-checkpoints",
    "flags",
    "variants",
    "grid",
)
# Each run has its own; a study could not find its runs again.
_RESERVED = ("seed", "save", "load", "tensorboard-dir")
_PREFIXES = ("data-path", "train-data-path", "valid-data-path", "test-data-path")
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")


@dataclass(frozen=True)
class Variant:
    """One column of the comparison.

    Attributes:
        name: of its folder.
        flags: key to value, those that all runs share included.
    """

    name: str
    flags: dict[str, Value]

    @property
    def is_baseline(self) -> bool:
        """Whether the model has no virtual width."""
        return not any(key.startswith(PREFIXES) and typed(key, value) for key, value in self.flags.items())

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.flags["train-iters"]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.flags["global-batch-size"] * self.flags["seq-length"]

    @property
    def data_prefixes(self) -> list[str]:
        """Of all its token files."""
        given = [self.flags.get(key) for key in _PREFIXES]
        # A blend is a list of weights and prefixes.
        words = [each for value in given for each in (value if isinstance(value, list) else [value])]
        return [str(each) for each in words if each is not None and not re.fullmatch(r"[\d.]+", str(each))]

    def arguments(self) -> list[str]:
        """Flags of the training program, without seed and folders."""
        return [word for key, value in self.flags.items() for word in typed(key, value)]


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Such as r8-tiled/seed-2, which is its folder as well."""
        return f"{self.variant.name}/seed-{self.seed}"

    def arguments(self) -> list[str]:
        """Flags of the training program, without folders."""
        return [*self.variant.arguments(), "--seed", str(self.seed)]


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Attributes:
        title: of the report.
        ranks: processes of one run; one GPU each where there are any.
        baseline: name of the variant that the others are compared with.
        variants: in the order of the file.
        seeds: of every variant.
        keep_checkpoints: also of finished runs.
        has_prefix: whether the file says what {data} stands for.
        made_by: the command that makes the data; None where the file says none.
    """

    title: str
    ranks: int
    baseline: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    keep_checkpoints: bool
    has_prefix: bool
    made_by: str | None

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """All runs, or those of the named variants or runs; the first seed of every variant comes first.

        Raises:
            VirtualWidthError: a name that is neither.
        """
        runs = [Run(variant, seed) for seed in self.seeds for variant in self.variants]
        names = [variant.name for variant in self.variants] + [run.name for run in runs]
        for name in only:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                advice = f"did you mean {near[0]}?" if near else f"choose of {', '.join(names[: len(self.variants)])}."
                raise VirtualWidthError(f"the study has no variant or run {name}: {advice}")
        return [run for run in runs if not only or run.name in only or run.variant.name in only]


def load_study(path: Path, data: str | None = None) -> Study:
    """Read and expand a study.

    Args:
        path: the YAML file.
        data: replaces the file's ``data``, the prefix that {data} stands for in values.

    Raises:
        VirtualWidthError: no readable study, unknown keys, names that repeat, values that make no run.
    """
    content = _content(path)
    prefix = data if data is not None else _text(path, "data", content.get("data"))
    shared = _flags(path, "flags", content.get("flags") or {})
    variants = []
    for name, own in _mapping(path, "variants", content.get("variants")).items():
        variants.append(_variant(path, str(name), shared | _flags(path, f"variants.{name}", own or {}), prefix))
    for grid in _grids(path, content.get("grid")):
        variants += [_variant(path, name, shared | flags, prefix) for name, flags in expand_grid(grid, shared)]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise VirtualWidthError(f"{path} has two variants called {name}: give one of them another name.")
    return Study(
        title=_text(path, "title", content.get("title")) or path.stem,
        ranks=_whole(path, "ranks", content.get("ranks", 1), 1),
        baseline=_baseline(path, content.get("baseline"), variants),
        variants=tuple(variants),
        seeds=_seeds(path, content.get("seeds", [1])),
        keep_checkpoints=_switch(path, "keep-checkpoints", content.get("keep-checkpoints", False)),
        has_prefix=content.get("data") is not None,
        made_by=_text(path, "made-by", content.get("made-by")),
    )


def check_data(study: Study) -> None:
    """Refuse data that is not there, with the command that makes it where the study says one (``made-by``).

    Raises:
        VirtualWidthError: a missing token file or tokenizer folder.
    """
    advice = f"make it with `{' '.join(study.made_by.split())}`" if study.made_by else "correct its path"
    for variant in study.variants:
        needed = [f"{prefix}{end}" for prefix in variant.data_prefixes for end in (".idx", ".bin")]
        tokenizer = variant.flags.get("tokenizer-model")
        # Anything else may be a name that the tokenizer's library looks up.
        if isinstance(tokenizer, str) and "/" in tokenizer and study.has_prefix:
            needed.append(tokenizer)
        for name in needed:
            if not Path(name).exists():
                raise VirtualWidthError(f"{name} is not there: {advice}, or give its prefix by --data.")


def _content(path: Path) -> dict:
    """A file's keys on top of its base's: flags one by one, variants and grid together, all others whole."""
    own = _read(path)
    if own.get("base") is None:
        return own
    source = path.parent / str(_text(path, "base", own["base"]))
    if not source.is_file():
        raise VirtualWidthError(f"{path} has the base {own['base']}, which is no file beside it: correct its name.")
    base = _read(source)
    if base.get("base") is not None:
        raise VirtualWidthError(f"{source}, the base of {path}, has a base: name that one, and all that differs.")
    if own.keys() & {"variants", "grid"}:
        base = {key: value for key, value in base.items() if key not in ("variants", "grid")}
    flags = [_flags(each, "flags", content.get("flags")) for each, content in ((source, base), (path, own))]
    return base | own | {"flags": flags[0] | flags[1]}


def _read(path: Path) -> dict:
    content = read_yaml_file(path, lambda text: yaml.load(text, EachKeyOnce))  # a safe loader
    for key in content:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(_KEYS)}."
            raise VirtualWidthError(f"{path} has the key {key!r}: {advice}")
    return content


def repeated_data(study: Study) -> list[str]:
    """A sentence on each training set, blends apart, that has fewer tokens than a run reads."""
    sets: dict[str, int] = {}
    for variant in study.variants:
        prefix = variant.flags.get("train-data-path")
        if isinstance(prefix, str):
            sets[prefix] = max(sets.get(prefix, 0), variant.steps * variant.tokens_per_step)
    held = {prefix: check_indexed_dataset(prefix).tokens for prefix in sets}
    return [
        f"{prefix} has {held[prefix]:,} tokens and a run reads {read:,}: it sees each {read / held[prefix]:.1f} times."
        for prefix, read in sets.items()
        if read > held[prefix]
    ]


def _variant(path: Path, name: str, flags: dict[str, Value], prefix: str | None) -> Variant:
    if not _NAME.fullmatch(name):
        raise VirtualWidthError(f"{path} has a variant {name!r}: names are folders, so write letters, digits, . - _ .")
    if re.search(r"(?:^|[-_])s(?:eed[-_]?)?\d+$", name):
        raise VirtualWidthError(f"{path} has a variant {name!r}, which would be read as a seed: call it otherwise.")
    if "{data}" in str(flags) and prefix is None:
        raise VirtualWidthError(f"{path} uses {{data}} without saying what it is: write data, or give --data.")
    filled = {key: _fill(value, prefix) for key, value in flags.items() if value is not None}
    if filled.get("vwn-reduce-norm") is False:  # a flag of its own says it: without either, the width decides
        del filled["vwn-reduce-norm"]
        filled["no-vwn-reduce-norm"] = True
    for key in ("train-iters", "global-batch-size", "seq-length"):
        _whole(path, f"{key} of {name}", filled.get(key), 1)
    try:
        check_virtual_width(filled)
        if "hybrid-layer-pattern" in filled:
            check_pattern(str(filled["hybrid-layer-pattern"]), filled.get("num-experts"))
    except VirtualWidthError as refusal:
        raise VirtualWidthError(f"{name} of {path} cannot be trained: {refusal}") from None
    return Variant(name, filled)


def _fill(value: Value, prefix: str | None) -> Value:
    if isinstance(value, list):
        return [_fill(each, prefix) for each in value]
    return value.replace("{data}", str(prefix)) if isinstance(value, str) else value


def _mapping(path: Path, name: str, value: object) -> dict:
    if value is not None and not isinstance(value, dict):
        raise VirtualWidthError(f"{name} of {path} is no list of keys with values: correct it.")
    return value or {}


def _grids(path: Path, value: object) -> list[dict[str, Value]]:
    grids = value if isinstance(value, list) else [value]
    return [_flags(path, "grid", grid, also=("r",)) for grid in grids if grid is not None]


def _flags(path: Path, name: str, value: object, also: tuple[str, ...] = ()) -> dict[str, Value]:
    flags: dict[str, Value] = {}
    for written, each in _mapping(path, name, value).items():
        key = str(written).replace("_", "-")
        if key in flags:
            raise VirtualWidthError(f"{name} of {path} has {key} with a dash and with an underscore: keep one.")
        flags[key] = each
        if key in _RESERVED:
            raise VirtualWidthError(f"{name} of {path} has {key}, which vwn-study gives to every run: drop it.")
        if key in ("r", "m", "n") and key not in also:
            raise VirtualWidthError(f"{name} of {path} has {key}: write vwn-m and vwn-n, or r in a grid.")
        if isinstance(each, dict) or not isinstance(each, Value):
            raise VirtualWidthError(f"{key} in {name} of {path} is neither a number, a word nor a list: correct it.")
    return flags


def _whole(path: Path, name: str, value: object, least: int, largest: int | None = None) -> int:
    if type(value) is not int or value < least or (largest is not None and value > largest):
        said = "missing" if value is None else repr(value)
        above = "" if largest is None else f" and at most {largest}"
        raise VirtualWidthError(f"{name} in {path} is {said}: give a whole number of at least {least}{above}.")
    return value


def _text(path: Path, name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise VirtualWidthError(f"{name} of {path} is {value!r}: write text, in quotes if it looks like a number.")
    return value


def _seeds(path: Path, value: object) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    seeds = tuple(_whole(path, "a seed", seed, 1, LARGEST_SEED) for seed in seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise VirtualWidthError(f"seeds of {path} are none or repeat: give each once.")
    return seeds


def _switch(path: Path, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise VirtualWidthError(f"{name} of {path} is {value!r}: write true or false.")
    return value


def _baseline(path: Path, name: object, variants: list[Variant]) -> str:
    names = [variant.name for variant in variants]
    if name not in names:
        said = "names no baseline" if name is None else f"has the baseline {name!r}, which is no variant"
        raise VirtualWidthError(f"{path} {said}: write baseline: with one of {', '.join(names) or 'its variants'}.")
    if not variants[names.index(name)].is_baseline:
        raise VirtualWidthError(f"the baseline {name} of {path} has vwn- flags: a baseline has no virtual width.")
    return str(name)
