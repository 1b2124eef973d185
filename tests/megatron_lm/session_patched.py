"""Two ranks train through a patched pretrain_hybrid.py, and count.

    torchrun --nproc-per-node 2 session_patched.py TREE FOLDER      (with TREE first on PYTHONPATH)

Writes what happened into FOLDER/rank<N>.json for test_patched.py.
"""

import copy
import io
import json
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from megatron_lm.patched_tree import FLAGS, WIDE, losses

TREE, FOLDER, RANK = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ.get("RANK", "0"))
SAVE = ["--save", str(FOLDER / "checkpoints"), "--save-interval", "2"]


def captured(action) -> tuple[object, str]:
    """What an action returns, and what this rank printed."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            result = action()
    except BaseException:
        print(printed.getvalue()[-6000:], file=sys.stderr)
        raise
    return result, printed.getvalue()


def run_patched() -> dict:
    sys.argv = [str(TREE / "pretrain_hybrid.py"), *FLAGS, *WIDE, *SAVE]
    _, printed = captured(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    return {"losses": losses(printed), "printed": [line for line in printed.splitlines() if " MB" in line]}


def variant(args, pattern: str = "*-|*-", **vwn):
    """These arguments with another virtual width, or none."""
    from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern

    from megatron_vwn.training.flags.vwn import record_virtual_width, virtual_width_from_args

    args = copy.copy(args)
    for name in [name for name in vars(args) if name.startswith("vwn_")]:
        setattr(args, name, None)
    args.hybrid_layer_pattern = pattern
    args.mtp_num_layers = parse_hybrid_pattern(pattern).mtp_num_depths or None
    for name in ("normalization",):
        setattr(args, name, vwn.pop(name, getattr(args, name)))
    if vwn:
        for name, value in vwn.items():
            setattr(args, f"vwn_{name}", value)
        virtual_width = virtual_width_from_args(args)
        record_virtual_width(args, replace(virtual_width, document_end=0) if virtual_width.ngrams else virtual_width)
    return args


VARIANTS = {
    "wide": {"m": 2, "n": 4},
    "wide, n-grams, r = 3/2": {"m": 2, "n": 3, "ngrams": (2, 3), "ngram_vocab": 16},
    "projected, norm, LayerNorm": {"m": 2, "n": 8, "normalization": "LayerNorm"},
    "static, identity, tiled, MTP": {
        "pattern": "*-|*-/*-/*-",
        "m": 2,
        "n": 4,
        "connection": "static",
        "carry": "identity",
        "embedding": "tiled",
    },
    "projected, MTP": {"pattern": "*-|*-/*-", "m": 1, "n": 4},
}


def parameters(args) -> int:
    """Of the whole model, both stages; of further predictions without what the estimate leaves out of both models."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_vwn.training.flags.vwn import virtual_width_from_args
    from megatron_vwn.training.model import VirtualWidthModelBuilder, model_config_from_args

    config = model_config_from_args(args, virtual_width_from_args(args))
    model = VirtualWidthModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    left_out = (".eh_proj.", ".enorm.", ".hnorm.")
    count = sum(each.numel() for name, each in model.named_parameters() if not any(part in name for part in left_out))
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    return int(total)


def count(args) -> dict:
    from megatron.training import theoretical_memory_usage as memory
    from megatron.training import training

    from megatron_vwn.megatron_lm import estimates

    flops = training.num_floating_point_operations
    none = variant(args)
    found = {
        "files": [training.__file__, memory.__file__],
        "flops": flops(args, 8),
        "flops of 100 tokens": flops(args, 8, 3200, 100),
        "flops without": flops(none, 8),
        "stock": flops.__wrapped__(none, 8),
        "stock of 100 tokens": flops.__wrapped__(none, 8, 3200, 100),
        "added flops": {name: estimates.added_flops(variant(args, **each)) for name, each in VARIANTS.items()},
    }
    # Both stages together are one stage's.
    found["parameters"] = {}
    for name, each in VARIANTS.items():
        wide = variant(args, **each)
        ordinary = variant(args, each.get("pattern", "*-|*-"), normalization=wide.normalization)
        added = parameters(wide) - parameters(ordinary)
        wide = copy.copy(wide)
        wide.pipeline_model_parallel_size = 1
        found["parameters"][name] = [added, estimates.added_parameters(wide).total]
        if RANK == 0 and name == "projected, norm, LayerNorm":
            found["sharded"] = sharded(wide)
    found["memory"] = {}
    for name, change in MEMORY.items():
        memory_args = copy.copy(args)
        for key, value in change.items():
            setattr(memory_args, key, value)
        none = variant(memory_args)
        (report, printed), (ordinary, said) = (
            captured(lambda args=args: memory.report_theoretical_memory(args, num_microbatches=4))
            for args in (memory_args, none)
        )
        transformer = copy.copy(none)
        transformer.hybrid_layer_pattern, transformer.num_layers = None, 2
        twin, _ = captured(lambda args=transformer: memory.report_theoretical_memory(args, num_microbatches=4))
        found["memory"][name] = {"report": report, "twin": twin, "ordinary": ordinary, "said": said, "printed": printed}
    return found


MEMORY = {
    "PP2": {},
    "PP2, blocks of 2": {"vwn_recompute_block": 2},
    "PP2 x VPP2": {"virtual_pipeline_model_parallel_size": 2},
    "one stage, TP2 width": {"pipeline_model_parallel_size": 1, "tensor_model_parallel_size": 2},
    "Mamba": {"hybrid_layer_pattern": "M-|*-"},
}


def sharded(args) -> dict:
    from megatron_vwn.megatron_lm import estimates

    by_layout = {}
    for name, ranks, sequence_parallel in (("TP1", 1, False), ("width", 2, False), ("sequence", 2, True)):
        layout = copy.copy(args)
        layout.tensor_model_parallel_size, layout.sequence_parallel = ranks, sequence_parallel
        by_layout[name] = asdict(estimates.added_parameters(layout))
    return by_layout


def refused(argv: list[str]) -> tuple[object, str]:
    """Exit code and sentence of the patched script's parser."""
    from megatron.training import training

    from megatron_vwn.megatron_lm import pretrain_hybrid as patched

    training.destroy_global_state()
    sys.argv = ["pretrain_hybrid.py", *argv]
    printed = io.StringIO()
    try:
        with redirect_stderr(printed), redirect_stdout(io.StringIO()):
            patched.parse_and_validate_args(gpu=False)
    except SystemExit as leave:
        return leave.code, printed.getvalue()
    return None, printed.getvalue()


def data_of_another_tokenizer() -> str:
    """The prefix of a document with a token id that no row of a table is for."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(FOLDER / "data")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.full((999,), 60_000), [999])
    builder.finalize(f"{prefix}.idx")
    return prefix


def main() -> None:
    found = {"patched": run_patched()}
    import torch
    from megatron.training import get_args

    args = get_args()
    found |= {"document end": args.vwn_document_end, "counts": count(args)}
    # Checkpoints are read together where ranks know each other, and refusals come before they do.
    torch.distributed.destroy_process_group()
    if RANK == 0:  # the others would wait for the first to have said it
        machine = ["--transformer-impl", "local", "--no-persist-layer-norm", "--distributed-backend", "gloo"]
        on_data = [flag for flag in FLAGS if flag != "--mock-data"]
        found["refused"] = {
            "unknown flag": refused([*FLAGS, *WIDE, "--modelopt-enabled"]),
            "segments": refused([*FLAGS, "--vwn-m", "3", "--vwn-n", "6"]),
            "other tokenizer": refused([*on_data, *WIDE, *machine, "--data-path", data_of_another_tokenizer()]),
            "wide checkpoint": refused([*FLAGS, *machine, "--load", str(FOLDER / "checkpoints")]),
        }
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(found))


main()
