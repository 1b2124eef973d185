"""Tests of megatron_vwn.megatron_fixes; test_fixes.py runs them in a pytest of their own.

They import Megatron without the CPU emulation, which is no matter for the process of other tests; so the file is named
such that pytest does not collect it.
"""

import ast
import errno
import inspect
import io
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import megatron.core.datasets
import numpy as np
import psutil
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets import utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.models.hybrid import hybrid_model
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.training import checkpointing
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem

import megatron_vwn
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.data.indexed import default_index_cache
from megatron_vwn.megatron_fixes import apply_fixes, extra_states, sample_index, torch_adam
from megatron_vwn.megatron_fixes.contract import USES, drift
from megatron_vwn.megatron_fixes.resharding import _finds_states_behind_padding, _with_padding
from megatron_vwn.modules.embedding import OverWidthEmbedding
from megatron_vwn.modules.model import VirtualWidthModel
from megatron_vwn.modules.multi_token_prediction import VirtualWidthMTPBlock
from megatron_vwn.modules.stack import VirtualWidthStack
from megatron_vwn.tracker import TRACKER

ROOT = Path(megatron_vwn.__file__).parent
PACKAGES = ("megatron", "torch", "triton", "transformers", "transformer_engine", "nvidia")
# Our own private names that a file reaches through another object, and the public method of every named tuple.
OURS = {"_active", "_vwn_mark", "_norm_of", "_open", "_fill", "_asdict", "_replace"}

OPTIMIZER = distrib_optimizer.DistributedOptimizer
PATCHED = [
    (utils, "compile_helpers"),
    (OPTIMIZER, "state_dict"),
    (OPTIMIZER, "load_state_dict"),
    (OPTIMIZER, "_set_main_param_and_optimizer_states"),
    (OPTIMIZER, "sharded_param_state_fully_reshardable"),
    (ChainedOptimizer, "load_state_dict"),
    (GPTDataset, "__init__"),
    (MegatronOptimizer, "_filter_and_reorder_param_groups"),
    (filesystem_async, "get_write_results_queue"),
]
# Not of Megatron, and so no part of what is compared with it at every start.
OF_TORCH = [(DefaultLoadPlanner, "load_bytes"), (filesystem, "pickle")]


@pytest.fixture(autouse=True)
def megatron_as_imported(monkeypatch):
    for owner, name in PATCHED + OF_TORCH:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))
    monkeypatch.setattr(checkpointing, "maybe_msc", checkpointing.maybe_msc)
    monkeypatch.setattr(dist_checkpointing, "load", dist_checkpointing.load)
    monkeypatch.setattr(
        async_utils.PersistentAsyncCaller, "async_loop", staticmethod(async_utils.PersistentAsyncCaller.async_loop)
    )


def state():
    return [getattr(owner, name) for owner, name in PATCHED]


def test_applies_once():
    before = state()
    apply_fixes()
    after = state()
    assert all(old is not new for old, new in zip(before, after, strict=True))
    for repaired in after:  # a later Megatron may pass more
        kinds = {each.kind for each in inspect.signature(repaired, follow_wrapped=False).parameters.values()}
        assert kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, repaired
    apply_fixes()
    assert state() == after


def test_refuses_a_torch_whose_metadata_it_would_not_see(monkeypatch):
    monkeypatch.setattr(filesystem.FileSystemReader, "read_metadata", lambda self: None)
    with pytest.raises(
        VirtualWidthError, match=r"^torch .* reads the metadata of checkpoints .* install torch 2\.11\.$"
    ):
        apply_fixes()


def test_does_not_compile_what_is_compiled():
    apply_fixes()
    utils.compile_helpers()  # the original would run make and exit


def write_data(prefix, lengths, first=0):
    """Documents of consecutive token ids."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    ids = torch.arange(first, first + sum(lengths))
    for document in ids.split(lengths):
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


def read_data(*prefixes, cache=None):
    """The samples of a data set, or of a blend, in their order."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([str(prefix) for prefix in prefixes], [1.0] * len(prefixes) if len(prefixes) > 1 else None),
        split="1,0,0",
        path_to_cache=None if cache is None else str(cache),
        tokenizer=NullTokenizer(60_000),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    data = BlendedMegatronDatasetBuilder(GPTDataset, (10, 0, 0), lambda: True, config).build()[0]
    return [data[number]["tokens"].tolist() for number in range(len(data))]


@pytest.mark.parametrize("blend", [False, True])
def test_an_index_of_other_data_is_not_used(blend, tmp_path):
    apply_fixes()
    a, b, c = (tmp_path / name for name in "abc")
    write_data(a, [30] * 40)
    write_data(b, [20] * 60, first=20_000)
    write_data(c, [30] * 40, first=40_000)
    names, cache = ([a, c] if blend else [a]), tmp_path / "cache"
    old = read_data(*names, cache=cache)
    assert old == read_data(*names, cache=cache)
    count = len(os.listdir(cache))
    for suffix in (".bin", ".idx"):
        os.utime(f"{b}{suffix}", (1, 1))  # as mv, cp -p and rsync -a keep the time
        os.replace(f"{b}{suffix}", f"{a}{suffix}")
    new = read_data(*names, cache=cache)
    assert new != old and new == read_data(*names, cache=tmp_path / "fresh")
    count += 4 + 3 * blend  # an index is three arrays and their description, a blend's two
    assert len(os.listdir(cache)) == count
    # The same lengths: the index would be the same, and is used.
    write_data(a, [20] * 60, first=10_000)
    assert read_data(*names, cache=cache) == read_data(*names, cache=tmp_path / "fresh 2")
    assert len(os.listdir(cache)) == count


def test_an_index_beside_the_data_is_found_again(tmp_path):
    apply_fixes()
    write_data(tmp_path / "a", [30] * 40)
    first = read_data(tmp_path / "a")
    (folder,) = (tmp_path / "a" / "cache").iterdir()
    files = sorted(folder.iterdir())
    assert folder == default_index_cache(str(tmp_path / "a")) and read_data(tmp_path / "a") == first
    assert sorted(folder.iterdir()) == files


def test_a_damaged_index_is_refused_by_name(tmp_path):
    apply_fixes()
    write_data(tmp_path / "a", [30] * 40)
    read_data(tmp_path / "a", cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*-shuffle_index.npy")
    for content in (path.read_bytes()[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(VirtualWidthError, match=f"sample index of {tmp_path / 'a'} cannot be used .*remove"):
            read_data(tmp_path / "a", cache=tmp_path / "cache")


def test_a_full_disk_leaves_no_half_of_an_index(tmp_path, monkeypatch):
    apply_fixes()
    write_data(tmp_path / "a", [30] * 40)
    save = np.save

    def full(path, array, **options):
        save(path, array, **options)
        if "sample_index" in path:
            raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(np, "save", full)
        read_data(tmp_path / "a", cache=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(("number", "rank"), [(errno.EACCES, 0), (errno.ENOSPC, 1)])
def test_an_index_that_cannot_be_read_stays(number, rank, tmp_path, monkeypatch):
    apply_fixes()
    write_data(tmp_path / "a", [30] * 40)
    read_data(tmp_path / "a", cache=tmp_path / "cache")
    files = sorted(os.listdir(tmp_path / "cache"))

    def deaf(*arguments, **named):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched, pytest.raises(OSError, match=re.escape(os.strerror(number))):
        patched.setattr(sample_index, "_writes", lambda: rank == 0)
        patched.setattr(np, "load", deaf)
        read_data(tmp_path / "a", cache=tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache")) == files


def test_leaves_fused_adam_alone(monkeypatch):
    before = state()
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    apply_fixes()
    assert [state()[i] for i in (1, 3)] == [before[i] for i in (1, 3)]
    assert "_load_state_dict_with_own_steps" not in OPTIMIZER.load_state_dict.repaired_by_megatron_vwn


def test_leaves_the_makefile_of_a_source_checkout_alone(monkeypatch, tmp_path):
    before = state()
    Path(tmp_path, "Makefile").touch()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    apply_fixes()
    assert state()[0] is before[0]


def test_leaves_helpers_that_are_not_compiled_to_the_compiler(monkeypatch):
    before = state()
    monkeypatch.delattr(megatron.core.datasets, "helpers_cpp", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)  # None: the import fails
    apply_fixes()
    assert state()[0] is before[0]


def test_pads_what_was_gathered_without_padding_and_nothing_else():
    buckets = [SimpleNamespace(offset=0, numel_unpadded=3), SimpleNamespace(offset=4, numel_unpadded=4)]
    buffer = SimpleNamespace(numel=8, buckets=buckets)
    padded = torch.tensor([1.0, 2, 3, 0, 4, 5, 6, 7])
    assert torch.equal(_with_padding(torch.arange(1.0, 8), buffer), padded)
    assert _with_padding(padded, buffer) is padded


def test_leaves_states_alone_that_are_found_behind_padding(monkeypatch):
    def mended(self, model_sharded_state_dict, is_loading=False, metadata=None):
        """It adapts to what is gathered without padding, so adding the padding would shift what it finds."""
        gathered = self.get_parameter_state_dp_zero()[0]["dtype"]["param"]
        return [{"param": SimpleNamespace(data=data)} for data in (gathered[:3], gathered[3:5])]

    assert not _finds_states_behind_padding()
    monkeypatch.setattr(OPTIMIZER, "sharded_param_state_fully_reshardable", mended)
    apply_fixes()
    assert OPTIMIZER.sharded_param_state_fully_reshardable is mended


def test_states_are_found_behind_padding():
    apply_fixes()
    assert _finds_states_behind_padding()


def group(**more):
    return {"wd_mult": 1.0, "max_lr": 1e-3, "min_lr": 1e-4, "params": [0], **more}


def reordered(current, saved):
    return MegatronOptimizer._filter_and_reorder_param_groups(current, saved)


def test_a_group_of_another_rate_is_the_only_one_of_its_kind():
    new, plain = group(max_lr=5e-3), group(wd_mult=0.0, max_lr=5e-3)
    with pytest.raises(ValueError, match="Could not find parameter group"):
        reordered([new], [group()])
    apply_fixes()
    saved = [group(betas=(0.9, 0.99)), group(wd_mult=0.0)]
    found = reordered([plain, new], saved)
    assert [each["wd_mult"] for each in found] == [0.0, 1.0]
    assert [each["max_lr"] for each in found] == [5e-3] * 2 and found[1]["betas"] == (0.9, 0.99)
    assert saved[0]["max_lr"] == 1e-3
    with pytest.raises(ValueError, match="Could not find parameter group"):
        reordered([group(wd_mult=3.0)], [group()])  # no schedule's business
    with pytest.raises(ValueError, match="Could not find parameter group"):
        reordered([group(max_lr=1), group(max_lr=2)], [group(max_lr=3), group(max_lr=4)])  # which is which?
    equal = [group(max_lr=1), group(max_lr=2)]
    assert [each["max_lr"] for each in reordered(equal, equal[::-1])] == [1, 2]


def test_leaves_groups_alone_that_are_found(monkeypatch):
    def mended(current_groups, state_dict_groups):
        return current_groups

    monkeypatch.setattr(MegatronOptimizer, "_filter_and_reorder_param_groups", staticmethod(mended))
    apply_fixes()
    assert MegatronOptimizer._filter_and_reorder_param_groups is mended


def test_leaves_a_chain_alone_that_loads_either_arrangement(monkeypatch):
    def mended(self, state_dict):
        for optimizer, part in zip(self.chained_optimizers, [state_dict] * 2, strict=False):
            optimizer.load_state_dict({"optimizer": part.get("optimizer", part.get(0))})

    monkeypatch.setattr(ChainedOptimizer, "load_state_dict", mended)
    apply_fixes()
    assert ChainedOptimizer.load_state_dict is mended


def test_arranges_for_a_chain_that_does_not():
    apply_fixes()
    assert hasattr(ChainedOptimizer.load_state_dict, "repaired_by_megatron_vwn")
    chain, one = object.__new__(ChainedOptimizer), SimpleNamespace(load_state_dict=lambda state: loaded.append(state))
    chain.chained_optimizers, loaded = [one], []
    part = {"optimizer": {"param_groups": [{"is_expert_parallel": True}]}}
    chain.load_state_dict({0: part, 1: part})
    assert len(loaded[0]["optimizer"]["param_groups"]) == 2


def checkpoint(folder, step):
    (folder / f"iter_{step:07d}").mkdir()
    for name in (".metadata", "metadata.json"):
        (folder / f"iter_{step:07d}" / name).touch()


@pytest.mark.parametrize("lost", ["empty", "missing"])
def test_a_lost_tracker_means_the_newest_whole_checkpoint(tmp_path, lost):
    apply_fixes()
    tracker = checkpointing.get_checkpoint_tracker_filename(tmp_path)
    assert not checkpointing.checkpoint_exists(tmp_path)
    if lost == "empty":
        Path(tracker).touch()
    checkpoint(tmp_path, 7)
    checkpoint(tmp_path, 12)
    assert checkpointing.checkpoint_exists(tmp_path)
    # Where it exists, --save-retain-interval deletes the checkpoint that it names.
    assert not checkpointing.maybe_msc.os.path.exists(tracker)
    assert checkpointing.read_metadata(tracker) == (12, False)
    Path(tracker).write_text("7")
    assert checkpointing.read_metadata(tracker) == (7, False)
    assert checkpointing.maybe_msc.os.path.exists(tracker)
    Path(tracker).write_text("release")
    assert checkpointing.read_metadata(tracker) == (0, True)
    assert not checkpointing.maybe_msc.os.path.exists(tracker)  # no number


def test_the_tracker_is_whole_at_every_moment(tmp_path):
    apply_fixes()
    tracker, other = tmp_path / TRACKER, tmp_path / "other"
    tracker.write_text("5")
    with pytest.raises(KeyboardInterrupt), checkpointing.maybe_msc.open(str(tracker), "w") as file:
        assert tracker.read_text() == "5"
        raise KeyboardInterrupt
    assert tracker.read_text() == "5"
    with checkpointing.maybe_msc.open(str(tracker), "w") as file:
        file.write("10")
    assert tracker.read_text() == "10" and list(tmp_path.iterdir()) == [tracker]
    with checkpointing.maybe_msc.open(str(other), "w") as file:  # every other file is opened as ever
        assert other.exists()


def test_what_waits_for_a_killed_rank_ends_with_it(monkeypatch):
    apply_fixes()
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        filesystem_async.get_write_results_queue("fork").put("still works")
        assert filesystem_async.get_write_results_queue("fork").get() == "still works"
        os.write(writing, b"%d" % psutil.Process().children()[0].pid)
        time.sleep(600)
    server = psutil.Process(int(os.read(reading, 20)))
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    end = time.monotonic() + 60
    try:
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        server.kill()


def test_the_persistent_writer_finds_its_loop_where_it_is_spawned():
    apply_fixes()
    loop = async_utils.PersistentAsyncCaller.async_loop
    assert isinstance(pickle.loads(pickle.dumps(loop)), type(loop))


def test_a_checkpoint_may_lack_extra_states(tmp_path):
    there, lost = (ShardedObject(f"{name}._extra_state", None, (1,), (0,)) for name in "ab")
    vital = ShardedObject("a.vital", None, (1,), (0,))
    torch.distributed.checkpoint.save({there.unique_key: io.BytesIO()}, checkpoint_id=tmp_path, no_dist=True)
    load = extra_states._load_what_is_there(lambda state, folder: state)
    state = load({"model": {"a": there, "b": lost, "c": vital}}, str(tmp_path))["model"]
    assert state["a"] is there and state["c"] is vital and state["b"].unwrap() is None


@pytest.mark.parametrize(
    ("more", "refused"), [({}, True), ({"finetune": True}, False), ({"fp8_recipe": "tensorwise"}, False)]
)
def test_fp8_does_not_resume_without_its_history(more, refused, tmp_path, monkeypatch):
    given = {"fp8": "hybrid", "fp8_recipe": "delayed", "finetune": False}
    monkeypatch.setattr("megatron.training.get_args", lambda: SimpleNamespace(**given | more))
    monkeypatch.setattr(
        extra_states,
        "_get_filesystem_reader",  # as of an object storage, whose paths no file system knows
        lambda folder: SimpleNamespace(read_metadata=lambda: SimpleNamespace(state_dict_metadata={})),
    )
    state = {"a": ShardedObject("a._extra_state", None, (1,), (0,))}
    load = extra_states._load_what_is_there(lambda state, folder: state)
    if refused:
        with pytest.raises(VirtualWidthError, match=r"lacks 1 extra states.*--fp8-recipe, or add --finetune.*\.$"):
            load(state, "msc://a/iter_0000002")
    else:
        assert load(state, "msc://a/iter_0000002")["a"].unwrap() is None


def adam():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))])
    return SimpleNamespace(optimizer=optimizer, optimizer_state_keys=("exp_avg", "exp_avg_sq"))


def one_step(self):
    (step,) = {state["step"].item() for state in self.optimizer.state.values()} or {None}
    assert step is not None
    return step


def test_gives_a_fresh_adam_its_state_where_megatron_needs_it():
    fresh = adam()
    assert torch_adam._state_dict_of_fresh_optimizer_too(one_step)(fresh) == 0
    assert len(fresh.optimizer.state) == 2


def test_leaves_a_fresh_adam_alone_where_megatron_does_not_need_it():
    fresh = adam()
    assert torch_adam._state_dict_of_fresh_optimizer_too(lambda self: "saved")(fresh) == "saved"
    assert not fresh.optimizer.state


@pytest.mark.parametrize("shared", [True, False])
def test_parts_only_steps_that_are_one_tensor(shared):
    step = torch.tensor(5.0)
    given = [step, step if shared else step.clone()]

    def load(self, state_dict):
        for parameter, value in zip(self.optimizer.param_groups[0]["params"], given, strict=True):
            self.optimizer.state[parameter] = {"step": value}

    loaded = adam()
    torch_adam._load_state_dict_with_own_steps(load)(loaded, {})
    first, second = (state["step"] for state in loaded.optimizer.state.values())
    assert first is step and (second is given[1]) == (not shared)
    assert first.data_ptr() != second.data_ptr() and second == 5


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.owner}.{use.name}")
def test_the_installed_packages_are_those_of_the_contract(use):
    pytest.importorskip(use.package)
    assert drift(use) is None
    assert (ROOT / use.file).is_file()


def private_uses(path):
    """Private names that a file reaches through anything but itself and its own package."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            names = [alias.name for alias in node.names]
            foreign |= set(names) if "._" in node.module else {name for name in names if private(name)}
        elif isinstance(node, ast.Attribute) and private(node.attr):
            base = node.value
            is_super = isinstance(base, ast.Call) and getattr(base.func, "id", None) == "super"
            if is_super or not (getattr(base, "id", None) in ("self", "cls") or node.attr in own):
                foreign.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and private(name):
                foreign.add(name)
    return foreign - OURS


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_stands_in_the_contract():
    known = {(use.file, use.name) for use in USES}
    found = {(str(path.relative_to(ROOT)), name) for path in ROOT.rglob("*.py") for name in private_uses(path)}
    assert not found - known


def test_the_scan_finds_a_new_private_name(tmp_path):
    file = tmp_path / "new.py"
    file.write_text("from torch.nn import _secret\nimport megatron\nmegatron.core._other()\nsuper()._third()\n")
    assert private_uses(file) == {"_secret", "_other", "_third"}


@pytest.mark.parametrize("owner, name", PATCHED)
@pytest.mark.parametrize("found", [None, lambda other: None])
def test_refuses_a_megatron_without_what_it_repairs(monkeypatch, owner, name, found):
    before = state()
    if found is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, found)
    drifted = rf"{name} (is gone|takes \(.*\), not \(.*\))"
    with pytest.raises(VirtualWidthError, match=rf"^megatron-core 0\.19.*{drifted}; install megatron-core 0\.19\.2\.$"):
        apply_fixes()
    after = [getattr(owner, name, None) for owner, name in PATCHED]
    assert sum(old is not new for old, new in zip(before, after, strict=True)) == 1, "repaired in spite of it"


def test_refuses_a_megatron_that_does_not_name_its_adam(monkeypatch):
    monkeypatch.delattr(distrib_optimizer, "HAVE_APEX_OR_TE")
    with pytest.raises(VirtualWidthError, match=r"^megatron-core 0\.19.*HAVE_APEX_OR_TE is gone; .*\.$"):
        apply_fixes()


@pytest.mark.parametrize("part", ["decoder", "embedding", "mtp"])
def test_refuses_a_model_with_a_stock_part(monkeypatch, part):
    def build(self, *args, **kwargs):  # a Megatron that takes its classes from elsewhere
        torch.nn.Module.__init__(self)
        self.pre_process = self.mtp_process = True
        parts = {"decoder": VirtualWidthStack, "embedding": OverWidthEmbedding, "mtp": VirtualWidthMTPBlock}
        for name, kind in parts.items():
            module = torch.nn.Linear(1, 1) if name == part else object.__new__(kind)
            self.__dict__[name] = module

    monkeypatch.setattr(HybridModel, "__init__", build)
    with pytest.raises(VirtualWidthError, match=rf"^megatron-core 0\.19.*'s {part} as Linear, not as .*\.$"):
        VirtualWidthModel(
            SimpleNamespace(hidden_size=32),
            None,
            virtual_width=VirtualWidthConfig(m=2, n=4),
            pg_collection=SimpleNamespace(),
        )


def test_refuses_a_megatron_that_moved_the_embedding(monkeypatch):
    monkeypatch.delattr(hybrid_model, "LanguageModelEmbedding")
    with pytest.raises(VirtualWidthError, match=r"^megatron-core 0\.19.* from LanguageModelEmbedding: .*\.$"):
        VirtualWidthModel(
            SimpleNamespace(hidden_size=32),
            None,
            virtual_width=VirtualWidthConfig(m=2, n=4),
            pg_collection=SimpleNamespace(),
        )
