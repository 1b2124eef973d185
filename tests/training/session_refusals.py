"""One process that prepares many command lines: ``python session_refusals.py CASES.json RESULTS.json``."""

import contextlib
import dataclasses
import errno
import io
import json
import os
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
from megatron.core.transformer import MLATransformerConfig  # noqa: E402
from megatron.training.models import hybrid  # noqa: E402
from torch.distributed.checkpoint import CheckpointException  # noqa: E402

from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.training import model as model_config  # noqa: E402
from megatron_vwn.training import run  # noqa: E402
from megatron_vwn.training.refusals import checkpoint as resume  # noqa: E402
from megatron_vwn.training.refusals import folders as folder_checks  # noqa: E402
from megatron_vwn.training.refusals import (  # noqa: E402
    function,
    monitoring,
    optimizer,
    optimizer_choice,
    resumed_data,
    unknown,
)
from megatron_vwn.training.refusals.megatron import quoting_megatron  # noqa: E402
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


def without_a_launcher():
    """The sentence of a run that no launcher told where its ranks meet."""
    try:
        run.Run.train(mock.Mock())
    except VirtualWidthError as refusal:
        return {"refusal": str(refusal)}


def with_a_later_megatron(argv):
    """Flags that the support matrix lacks: refused unless they are at their default or --allow-untested is given."""
    fewer = unknown.known_flags() - {"--mtp-loss-scaling-factor"}
    with mock.patch.object(unknown, "known_flags", return_value=fewer):
        return {
            "not typed": prepare(argv),
            "its default": prepare([*argv, "--mtp-loss-scaling-factor", "0.1"]),
            "typed": prepare([*argv, "--mtp-loss-scaling-factor", "0.5"]),
            "allowed": prepare([*argv, "--mtp-loss-scaling-factor", "0.5", "--allow-untested"]),
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


def refused_by_choice(rules, **args):
    """The sentence of the first rule about the optimizer that applies to a run of Muon."""
    run = {"optimizer": "muon", "muon_tp_mode": "duplicated", "muon_split_qkv": True, "fp16": False}
    args = Namespace(**run, **args)
    return {"refusal": next((sentence for applies, sentence in rules if applies(args)), None)}


def without_emerging_optimizers():
    """The sentence about Muon where its package is not installed."""
    with mock.patch.object(optimizer_choice, "HAVE_EMERGING_OPTIMIZERS", False):
        return refused_by_choice(optimizer_choice.OPTIMIZER_RULES)


def settings_of_muon():
    """Muon's settings that a resumed run may not change, and the sentence about one that divides the layers."""
    compared = [name for name in optimizer._COMPARED if name.startswith("muon_")]
    same = dict.fromkeys(optimizer._COMPARED)
    layers = "use_layer_wise_distributed_optimizer"
    try:
        optimizer._refuse_other_state("here", Namespace(**same | {layers: False}), Namespace(**same | {layers: True}))
    except VirtualWidthError as refusal:
        return [compared, str(refusal)]


def moved_experts():
    """The sentence about experts of Muon that leave their own data-parallel group; among the others they may move."""
    eight, four, one = (Namespace(optimizer="muon", num_experts=8, expert_model_parallel_size=ep) for ep in (8, 4, 1))
    optimizer._refuse_moved_experts("here", eight, four)
    try:
        optimizer._refuse_moved_experts("here", eight, one)
    except VirtualWidthError as refusal:
        return {"refusal": str(refusal)}


def other_vocabulary():
    """Sentences about tokenizers for a checkpoint, whose vocabulary two ranks padded to a multiple of 256."""
    said = []
    for rows, tokens, padded in ((256, 200, 384), (512, 200, 512), (256, 300, 384), (256, 300, 256), (512, 200, 384)):
        saved = Namespace(padded_vocab_size=rows, make_vocab_size_divisible_by=128, tensor_model_parallel_size=2)
        now = Namespace(padded_vocab_size=padded, finetune=False, load="here")
        try:
            resume.refuse_other_vocabulary(resume.Checkpoint("here", True, saved), now, tokens)
            said.append(None)
        except VirtualWidthError as refusal:
            said.append(str(refusal))
    return said


def drifted_reader(argv):
    """The sentence about a Megatron whose reader gives one value more."""
    with mock.patch.object(resume, "_load_base_checkpoint", return_value=({}, 2, 3, 4, 5)):
        return prepare(argv)


def fault_of_the_machine():
    """What becomes of a fault of CUDA while Megatron validates."""
    try:
        with quoting_megatron():
            raise RuntimeError("CUDA error: uncorrectable ECC error")
    except Exception as error:
        return {"error": repr(error)}


def full_disk():
    """What is said of an error that names the fault, of one that hides it on a full disk, and of another fault."""
    free = [1000, 1000, 10**9]
    errors = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("<class 'OSError'>"), RuntimeError("NaN")]
    said = []
    for bytes_free, error in zip(free, errors, strict=True):
        with mock.patch.object(
            folder_checks.shutil, "disk_usage", return_value=Namespace(free=bytes_free, total=10**10)
        ):
            said.append(folder_checks.explain_full_disk(error, "/some/folder"))
    return said


def full_disk_elsewhere(folder):
    """Exit codes and sentences of runs that meet a full disk: at their data, which is a refusal or not, and saving."""

    def save_checkpoint_and_time():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = []
    for end in (
        VirtualWidthError("the sample indices cannot be written ([Errno 28] No space left on device): give a folder."),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        save_checkpoint_and_time,
    ):
        this = mock.Mock(spec=run.Run, args=Namespace(save=folder))
        this.train.side_effect = end
        said = io.StringIO()
        with mock.patch.object(run.Run, "parse", return_value=this), contextlib.redirect_stderr(said):
            try:
                found.append([run.run([], gpu=False), said.getvalue()])
            except OSError as error:
                found.append([repr(error), said.getvalue()])
    return found


def parts_of_a_schedule():
    """What of two runs' schedules and optimizers differs, and whether the data of a run that goes on may end early."""
    plain = dict.fromkeys((*optimizer._LENGTH, *optimizer._SCHEDULE))
    in_samples = [Namespace(**plain | {"train_samples": 64, "global_batch_size": size}) for size in (4, 8)]
    early = []
    for more in ({}, {"dataloader_type": "cyclic"}, {"step_batch_size_schedule": "0:2 8:4"}, {"train_samples": 64}):
        given = {"train_samples": None, "dataloader_type": "single", "step_batch_size_schedule": None}
        now = Namespace(**given | {"global_batch_size": 2} | more)
        saved = resume.Checkpoint("folder", True, Namespace(consumed_train_samples=8), iteration=2)
        try:
            optimizer._refuse_want_of_data(saved, now)
            early.append(False)
        except VirtualWidthError:
            early.append(True)
    where = {"main_grads_dtype", "use_torch_optimizer_for_cpu_offload"} & set(optimizer._COMPARED)
    return [optimizer._schedule(in_samples[0]) == optimizer._schedule(in_samples[1]), early, sorted(where)]


def moved_files(argv):
    """What a run says of a checkpoint whose arguments name a file or code that are gone."""
    with contextlib.redirect_stdout(io.StringIO()):
        this = run.Run.parse(argv, gpu=False)
        this.check()
    found = []
    for change in ({"te_precision_config_file": "/gone.yaml"}, {"spec": ["no.such.module", "layers"]}):
        saved = resume.Checkpoint(this.args.load, True, Namespace(**vars(this.checkpoint.args) | change))
        try:
            found.append(function.refuse_other_function(saved, this.args))
        except VirtualWidthError as refusal:
            found.append(str(refusal))
    return found


def other_data(argv):
    """What a run says of a checkpoint of other data: each setting, cyclic loaders, DALI, a long blend, a release."""
    args = run.Run.parse([*argv, "--train-data-path", "1", "/new/a"], gpu=False).args
    cyclic = {"dataloader_type": "cyclic", "data_parallel_size": 2}

    def said(theirs, ours=None, release=False):
        theirs, ours = (Namespace(**vars(args) | (change or {})) for change in (theirs, ours))
        return resumed_data.changed_data(resume.Checkpoint(ours.load, True, theirs, release=release), ours)

    def blend(weight):
        return {"train_data_path": [word for number in range(99) for word in (str(number % weight), f"/data/{number}")]}

    return {
        "each": [said({name: "other"}) for name in resumed_data.COMPARED],
        "each of a cyclic loader": [said(cyclic | {name: "other"}, cyclic) for name in resumed_data.CYCLIC],
        "none": [
            said({}),
            said(dict.fromkeys(resumed_data.CYCLIC, "other")),
            said({"dataloader_type": "single"}, {"dataloader_type": "external"}),
            said({"seed": 7}, release=True),
            said({"seed": 7}, {"finetune": True}),
        ],
        "a folder": said({"train_data_path": ["1", "/old/a"]}),
        "to a cyclic loader": said({"dataloader_type": "single"}, cyclic),
        "a long blend": said(blend(9), blend(8)),
    }


def fields_of_a_model():
    """Names in the lists that no configuration has, names in two of them, and names that must not differ."""
    kinds = (MLATransformerConfig, model_config.VirtualWidthModelConfig)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    lists = function.MAY_DIFFER, function.SAID
    return [sorted((lists[0] | lists[1]) - names), sorted(lists[0] & lists[1]), sorted(names - lists[0] - lists[1])]


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
    results["sublayers"] = sorted(hybrid_layer_allocation.Symbols.VALID_LAYERS)
    with mock.patch.object(folder_checks.os, "access", return_value=False):  # root may write anywhere
        results["nothing may be written"] = prepare([*cases["model"], "--save", str(Path(cases_file).parent / "new")])
    with mock.patch.object(monitoring.os, "fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        flags = ["--tensorboard-dir", str(Path(cases_file).parent / "new" / "events")]
        results["full disk"] = prepare([*cases["model"], *flags])
        with mock.patch.dict(os.environ, RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE="2"):  # the other node writes
            results["full disk elsewhere"] = prepare([*cases["model"], "--micro-batch-size", "1", *flags])
    results["no launcher"] = without_a_launcher()
    results["later megatron"] = with_a_later_megatron([*cases["model"], "--vwn-m", "2", "--vwn-n", "6"])
    results["other vocabulary"] = other_vocabulary()
    results["full disk of a checkpoint"], results["fields"] = full_disk(), fields_of_a_model()
    results["full disk elsewhere than --save"] = full_disk_elsewhere(str(Path(cases_file).parent))
    results["parts of a schedule"] = parts_of_a_schedule()
    results["moved files"] = moved_files(cases["argv"]["resume"])
    results["other data"] = other_data(cases["argv"]["resume"])
    results["drifted reader"] = drifted_reader(cases["argv"]["resume"])
    results["fault of the machine"] = fault_of_the_machine()
    results["other document end"] = other_document_end()
    results["other backend"] = other_backend()
    results["no Muon"], results["Muon's settings"] = without_emerging_optimizers(), settings_of_muon()
    results["moved experts"] = moved_experts()
    layout = {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 2}
    results["split query groups"] = refused_by_choice(optimizer_choice.WIDE_OPTIMIZER_RULES, **layout)
    experts = {"num_experts": 8, "expert_model_parallel_size": 2, "add_bias_linear": True}
    divided = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 1, "bf16": True}
    results["biases of experts"] = refused_by_choice(optimizer_choice.OPTIMIZER_RULES, **experts, **divided)
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
