"""One process that prepares many command lines: ``python session_refusals.py CASES.json RESULTS.json``."""

import contextlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from traceback import StackSummary
from unittest import mock

from megatron_vwn import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import mpu, tensor_parallel  # noqa: E402
from megatron.core.models.hybrid import hybrid_layer_allocation  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.models import hybrid  # noqa: E402
from torch.distributed.checkpoint import CheckpointException  # noqa: E402

from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.training import model as model_config  # noqa: E402
from megatron_vwn.training import run  # noqa: E402
from megatron_vwn.training.refusals import checkpoint as resume  # noqa: E402
from megatron_vwn.training.refusals import folders as folder_checks  # noqa: E402
from megatron_vwn.training.refusals.stages import stages_of_ranks  # noqa: E402


def prepare(argv):
    """The sentence that refuses a command line, or what it says and adds if it is accepted."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            this = run.Run.parse(argv, gpu=False)
            this.check()
    except VirtualWidthError as refusal:
        return {"refusal": str(refusal)}
    except BaseException as error:  # fails the tests of this command line, and no others
        return {"error": repr(error)}
    lines = [line for line in said.getvalue().splitlines() if line.startswith("megatron_vwn: ")]
    return {
        "said": lines,
        "virtual_width": this.virtual_width is not None,
        "transformer_impl": this.args.transformer_impl,
    }


def other_document_end():
    """The sentence about a tokenizer that ends documents with another token than the checkpoint's n-grams know."""
    try:
        resume.refuse_other_document_end(resume.Checkpoint("folder", True, Namespace(vwn_document_end=3)), 4)
    except VirtualWidthError as refusal:
        return {"refusal": str(refusal)}


def other_backend():
    """The sentence about a checkpoint whose tensors are named for layers that the run does not have."""
    named = resume.Checkpoint("folder", True, Namespace(transformer_impl="transformer_engine"))
    resume.refuse_other_backend(named, Namespace(transformer_impl="transformer_engine"))
    try:
        resume.refuse_other_backend(named, Namespace(transformer_impl="local"))
    except VirtualWidthError as refusal:
        return {"refusal": str(refusal)}


def damaged_load():
    """The sentence about a tensor that Megatron misses when it loads; of a save there is none."""

    def load_checkpoint():
        missing = KeyError("x.weight from model not in state dict: ['a', 'b']")
        raise CheckpointException("read", {0: (missing, StackSummary())})

    args = Namespace(load="folder", pretrained_checkpoint=None)
    assert resume.refusal_of_load(CheckpointException("write", {0: (OSError(28), StackSummary())}), args) is None
    try:
        load_checkpoint()
    except CheckpointException as error:
        return {"refusal": str(resume.refusal_of_load(error, args))}


def stages():
    """Sublayers of every pipeline rank and virtual stage, as we and as Megatron cut a pattern."""
    found = []
    for pattern, ranks, first, last in (
        ("*-|*E|*-|*E", 2, None, None),
        ("*-|*E|*-|*E", 4, None, None),
        ("*-*E*-*E", 2, None, None),
        ("*-*E*-*E", 2, 2, None),
        ("*-*E*-*E", 4, None, 2),
        ("*-*E*-*E", 4, 3, 1),
        ("*-*E*-*E", 2, 3, 5),
        ("*-*E", 1, None, None),
    ):
        virtual = len(pattern.split("|")) // ranks or 1
        cut = []
        for rank in range(ranks):
            with (
                mock.patch.object(torch.distributed, "get_rank", return_value=rank),
                mock.patch.object(torch.distributed, "get_world_size", return_value=ranks),
                mock.patch.object(hybrid_layer_allocation, "log_on_each_pipeline_stage"),
                mock.patch.object(hybrid_layer_allocation, "log_single_rank"),
            ):
                cut.append(
                    [
                        "".join(
                            hybrid_layer_allocation.select_pipeline_segment(
                                pattern, mock.sentinel.group, stage if virtual > 1 else None, first, last
                            )[0]
                        )
                        for stage in range(virtual)
                    ]
                )
        found.append([pattern, stages_of_ranks(pattern, ranks, first, last), cut])
    return found


def exit_code(outcome):
    """The exit code of a run in which training ends by raising ``outcome``."""
    this = mock.Mock(spec=run.Run)
    this.train.side_effect = outcome
    with mock.patch.object(run.Run, "parse", return_value=this):
        try:
            return run.run([], gpu=False)
        except SystemExit as leave:
            return f"SystemExit({leave.code})"


def config_for(argv):
    with contextlib.redirect_stdout(io.StringIO()):
        this = run.Run.parse(argv, gpu=False)
        this.check()
        this.args.padded_vocab_size = 512  # what building the tokenizer would set
        return model_config.model_config_from_args(this.args, this.virtual_width)


def baseline_arguments(argv):
    """Arguments of the ordinary model as our builder and as Megatron's gives them, but for the layers."""
    config, groups = config_for(argv), ProcessGroupCollection.use_mpu_process_groups()
    calls = []
    for module, builder in (
        (model_config, model_config.VirtualWidthModelBuilder),
        (hybrid, hybrid.HybridModelBuilder),
    ):
        with mock.patch.object(module, "HybridModel") as model:
            builder(config).build_model(groups, vp_stage=3)
        calls.append(
            {name: repr(value) for name, value in model.call_args.kwargs.items() if name != "hybrid_stack_spec"}
        )
    return calls


def backbone_difference(argv, virtual_width_flags):
    """Names of the parameters that both models have, and of those that differ for the same seed."""
    states = []
    for flags in ([], virtual_width_flags):
        config = config_for([*argv, *flags])
        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = config.get_builder_cls()(config).build_model(groups)
        states.append(dict(model.named_parameters()))
    baseline, wide = states
    shared = sorted(baseline.keys() & wide.keys())
    return {
        "missing": sorted(baseline.keys() - wide.keys()),
        "shared": shared,
        "different": [name for name in shared if not torch.equal(baseline[name], wide[name])],
    }


def main(cases_file, results_file):
    apply_fixes()
    cases = json.loads(Path(cases_file).read_text())
    results = {name: prepare(argv) for name, argv in cases["argv"].items()}
    results["stages"] = stages()
    with mock.patch.object(folder_checks.os, "access", return_value=False):  # root may write anywhere
        results["nothing may be written"] = prepare([*cases["model"], "--save", str(Path(cases_file).parent / "new")])
    results["other document end"] = other_document_end()
    results["other backend"] = other_backend()
    results["damaged load"] = damaged_load()
    results["exit codes"] = [exit_code(end) for end in (None, SystemExit(0), SystemExit(), SystemExit(3))]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    results["baseline arguments"] = baseline_arguments(cases["model"])
    for embedding in ("tiled", "projected"):
        flags = ["--vwn-m", "2", "--vwn-n", "8", "--vwn-embedding", embedding]
        results[f"backbone {embedding}"] = backbone_difference(cases["model"], flags)
    torch.distributed.destroy_process_group()
    Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
