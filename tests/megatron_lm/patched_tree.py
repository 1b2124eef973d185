"""Trees to patch: Megatron's installed package, with an entry script that the wheel does not have.

The script stands for Megatron-LM's pretrain_hybrid.py. It is put together from the lines of that file which the patch
itself quotes, and from lines of ours between them: the patch applies to it as to the real file, and it runs. With
MEGATRON_LM_CHECKOUT naming a (not patched) source checkout, its real files are taken instead.
"""

import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from models import tiny

PATCHES = Path(__file__).parents[2] / "patches" / "0.19"
TARGETS = ("megatron/training/theoretical_memory_usage.py", "megatron/training/training.py", "pretrain_hybrid.py")
CHECKOUT = os.environ.get("MEGATRON_LM_CHECKOUT")
# What both entry points train: two stages, so that over-width states go from one to the other.
FLAGS = tiny(
    "*-|*-",
    "--pipeline-model-parallel-size 2 --ckpt-format torch_dist",
    global_batch_size=8,
    train_iters=2,
)
WIDE = ["--vwn-m", "2", "--vwn-n", "4", "--vwn-ngrams", "2", "--vwn-ngram-vocab", "32"]
# Between the pieces that the patch quotes. Data and loss are the plugin's, because the wheel has none.
_BETWEEN = (
    """
from megatron.core.enums import ModelType
from megatron.training import inprocess_restart, pretrain
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
""",
    """
from megatron_vwn.training.batch import forward_step, train_valid_test_datasets_provider

has_nvidia_modelopt = False

if __name__ == "__main__":
""",
    """    )
    if has_nvidia_modelopt:
""",
    """        full_config,
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
""",
    "",
)


def installed() -> Path:
    """The folder that has Megatron's installed package, found without importing it."""
    return Path(find_spec("megatron.core").origin).parents[2]


def small_tree(folder: Path) -> Path:
    """Only the files that the tool reads."""
    for name in ("megatron/core/package_info.py", *TARGETS[:2]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(CHECKOUT or installed(), name), folder / name)
    _add_entry(folder)
    return folder


def whole_tree(folder: Path) -> Path:
    """A tree that can be imported and run."""
    source = Path(CHECKOUT or installed())
    (folder / "megatron").mkdir()
    for each in (source / "megatron").iterdir():
        if each.name == "training":
            shutil.copytree(each, folder / "megatron" / "training")
        else:
            (folder / "megatron" / each.name).symlink_to(each)
    _add_entry(folder)
    return folder


def _add_entry(folder: Path) -> None:
    if CHECKOUT:
        for name in ("pretrain_hybrid.py", "hybrid_builders.py", "model_provider.py"):
            shutil.copy(Path(CHECKOUT, name), folder / name)
        return
    (folder / "hybrid_builders.py").write_text("hybrid_builder = None\n")
    (folder / "model_provider.py").write_text("model_provider = None\n")
    hunks = re.split(r"^@@ .*\n", (PATCHES / "pretrain_hybrid.patch").read_text(), flags=re.MULTILINE)[1:]
    assert len(hunks) == len(_BETWEEN)
    parts = []
    for hunk, between in zip(hunks, _BETWEEN, strict=True):
        parts += [line[1:] for line in hunk.splitlines(keepends=True) if not line.startswith("+")]
        parts.append(between)
    (folder / "pretrain_hybrid.py").write_text("".join(parts))


def losses(printed: str) -> list[str]:
    """Of every step in a log, all printed digits."""
    return re.findall(r"lm loss: (\S+)", printed)
