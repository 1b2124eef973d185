"""One process that asks FP8's rules about command lines on pretended machines.

``python session_fp8_rules.py CASES.json RESULTS.json``; cases are [flags, Transformer Engine's version or null, compute
capability].
"""

import json
import sys
import types
from dataclasses import make_dataclass
from pathlib import Path
from unittest import mock

from megatron_vwn import cpu

cpu.install(announce=False)

import torch  # noqa: E402

from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.training.refusals import fp8 as fp8_rules  # noqa: E402
from megatron_vwn.training.refusals.flags import refuse_unsupported  # noqa: E402
from megatron_vwn.training.run import parse_flags  # noqa: E402


def engine(hears_weight_gradients):
    """The part of Transformer Engine that the rules look at."""
    fields = ["margin", "override_linear_precision"] if hears_weight_gradients else ["margin"]
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = make_dataclass("DelayedScaling", fields)
    common, package = types.ModuleType("transformer_engine.common"), types.ModuleType("transformer_engine")
    package.common, common.recipe = common, recipe
    return {module.__name__: module for module in (package, common, recipe)}


def sentence(argv, version, capability):
    """What refuses this command line there, None if nothing does."""
    release = tuple(map(int, (version or "0").split(".")))
    with (
        mock.patch.object(fp8_rules, "HAVE_TE", version is not None),
        mock.patch.object(fp8_rules, "is_te_min_version", lambda least: release >= tuple(map(int, least.split(".")))),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=tuple(capability)),
        mock.patch.dict(sys.modules, engine(hears_weight_gradients=release < (2, 10))),
    ):
        args, virtual_width = parse_flags(argv)
        try:
            refuse_unsupported(args, virtual_width)
        except VirtualWidthError as refusal:
            return str(refusal)


def main(cases_file, results_file):
    results = {name: sentence(*case) for name, case in json.loads(Path(cases_file).read_text()).items()}
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
