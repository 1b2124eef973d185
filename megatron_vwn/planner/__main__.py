"""vwn-plan: what a recipe needs on a number of GPUs, and which layouts suit it best.

vwn-plan RECIPE --gpus N --hardware h100|h200|b200 [--top K] [--json FILE] [key=value ...]

Parameters are exact: they are built on the meta device. Everything else is predicted from formulas and stated rates,
which are printed and can be changed by flags; nothing is measured.
"""

import argparse
import gc
import logging
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from megatron_vwn.atomic import write_json
from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.planner.hardware import HARDWARE, rate_names, rates
from megatron_vwn.planner.shape import shape_of, with_gpus
from megatron_vwn.recipes.layout import check_layout
from megatron_vwn.recipes.recipe import Recipe, load_recipe, read_recipe

# Keys of the layout that a number of GPUs may make impossible, and that divide any number.
_ANY_LAYOUT = {
    "pipeline-model-parallel-size": 1,
    "stages-per-rank": 1,
    "context-parallel-size": 1,
    "expert-model-parallel-size": 1,
    "micro-batch-size": 1,
}
# More than one where there are more GPUs than a batch has sequences.
_TENSORS = (1, 2, 4, 8)

# Of the comparison with stream recompute.
_BLOCK = 4


def main(argv: list[str] | None = None) -> int:
    """Plan one recipe; returns the exit code."""
    options = _parser().parse_intermixed_args(argv)
    # The models of a plan are small, and each collection of garbage would go through a million objects of Megatron's.
    gc.disable()
    try:
        return exit_code("vwn-plan", lambda: _run(options))
    finally:
        gc.enable()


def _run(options: argparse.Namespace) -> None:
    # Everything that can be refused without Megatron is, before it is imported.
    assumed = rates(options.hardware, {name: getattr(options, name) for name in rate_names()})
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise VirtualWidthError(f"--json is {options.json}, whose folder is not there: make it.")
    recipe, impossible = _recipe(options)
    print(f"{recipe.name} on {recipe.world_size} {options.hardware}", flush=True)
    if recipe.left_out:
        print(f"It has no experts, so this of its base is left out: {', '.join(recipe.left_out)}", flush=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.disable(logging.WARNING)

    with tqdm(desc="importing Megatron", total=1, disable=None, leave=False):
        from megatron_vwn.planner.parameters import check, pieces
        from megatron_vwn.planner.print import as_json, assumption_lines, plan_lines, search_lines, shares, twin_lines
        from megatron_vwn.planner.search import plan, search

    written: dict = {
        "recipe": recipe.name,
        "gpus": recipe.world_size,
        "hardware": options.hardware,
        "rates": asdict(assumed),
    }
    twin = None if recipe.baseline else recipe.without_virtual_width()
    parts, twin_parts = pieces(recipe), twin and pieces(twin)
    own = same = None
    if impossible:
        print(f"Its own layout cannot be run or planned: {impossible}")
    else:
        check(recipe)
        own, same = plan(recipe, parts, assumed), twin and plan(twin, twin_parts, assumed)
        whole, plain = parts.count(own.shape), twin and twin_parts.count(same.shape)
        for line in _count_lines(whole, plain):
            print(line)
        print()
        print(*plan_lines(own, same, _other_block(own), assumed), sep="\n", flush=True)
        written |= {"parameters": _numbers(whole), "parameters_without_virtual_width": plain and _numbers(plain)}
        written["own"] = as_json(own, same)
    if options.top:
        plans, looked = search(recipe, parts, assumed, options.top)
        print()
        print(*search_lines(plans, looked, assumed), sep="\n", flush=True)
        written["found"] = [as_json(each, None) for each in plans]
    if options.top and twin is not None:
        best, looked = search(twin, twin_parts, assumed, 1)
        print()
        print(*twin_lines(own, plans, best, looked), sep="\n")
        written["found_without_virtual_width"] = [as_json(each, None) for each in best]
        written["share_of_virtual_width"] = shares(own, plans, best)
    print()
    print(*assumption_lines(options.hardware, assumed, shape_of(recipe).width), sep="\n")
    if options.json is not None:
        try:
            write_json(options.json, written)
        except OSError as error:
            raise VirtualWidthError(
                f"--json {options.json} cannot be written ({error.strerror}): choose another file."
            ) from None


def _recipe(options: argparse.Namespace) -> tuple[Recipe, VirtualWidthError | None]:
    """The recipe on these GPUs, and why its own layout cannot run there if it cannot."""
    if options.gpus is None:
        return _checked(load_recipe(options.recipe, options.overrides, baseline=options.baseline))
    # A layout that divides anything, so that the loader checks everything else; then the recipe's own again.
    recipe = read_recipe(options.recipe)
    recipe = with_gpus(recipe, options.gpus)
    size = [f"nodes={recipe.get('nodes')}", f"gpus-per-node={recipe.get('gpus-per-node')}"]
    try:
        return _checked(load_recipe(options.recipe, [*size, *options.overrides], baseline=options.baseline))
    except VirtualWidthError as impossible:
        if not options.top:
            raise
        refused = None
        for tensor in _TENSORS:
            loose = [f"{key}={value}" for key, value in (_ANY_LAYOUT | {"tensor-model-parallel-size": tensor}).items()]
            try:
                loaded = load_recipe(options.recipe, [*size, *options.overrides, *loose], baseline=options.baseline)
            except VirtualWidthError as refusal:
                refused = refused or refusal
            else:
                return loaded, impossible
        raise refused from None


def _checked(recipe: Recipe) -> tuple[Recipe, None]:
    check_layout(recipe)
    shape_of(recipe)
    return recipe, None


def _other_block(own):
    """Memory of the worst stage with stream recompute in blocks of four where the plan has none, or the reverse, and
    what that is called; full recompute would leave nothing to it, so it goes."""
    from megatron_vwn.planner.memory import rank_memory

    shape = own.shape
    if shape.width is None:
        return None
    name = "without stream recompute" if shape.block else f"with stream recompute in blocks of {_BLOCK}"
    other = replace(shape, block=None if shape.block else _BLOCK)
    if shape.granularity == "full" and not shape.block:
        name += " in place of full recompute"
        other = replace(other, granularity="")
    return name, rank_memory(other, own.held[own.worst], own.worst)


def _count_lines(whole, plain):
    yield f"Parameters, exact: {whole.total:,} in all, {whole.trunk:,} without the layers of further predictions,"
    yield f"  {whole.active:,} of these active per token"
    if plain is not None:
        more = f"{whole.total - plain.total:,} in all, {whole.active - plain.active:,} active"
        yield f"  because of the virtual width: {more}"


def _numbers(whole) -> dict[str, int]:
    return {"total": whole.total, "trunk": whole.trunk, "active": whole.active, "mtp": whole.mtp}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vwn-plan", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a value of the recipe")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs in all (default: the recipe's)")
    parser.add_argument("--hardware", default="h100", help=f"{', '.join(HARDWARE)} (default: %(default)s)")
    parser.add_argument("--baseline", action="store_true", help="the twin without a virtual width")
    parser.add_argument(
        "--top", type=_count, default=5, metavar="K", help="layouts to search for, 0 for none (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    group = parser.add_argument_group("assumptions", "printed with every plan")
    for name in rate_names():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=_default(name))
    return parser


def _default(name: str) -> str:
    values = {getattr(each, name) for each in HARDWARE.values()}
    if len(values) == 1:
        return f"default: {values.pop():g}"
    return "default: " + ", ".join(f"{kind} {getattr(each, name):g}" for kind, each in HARDWARE.items())


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
