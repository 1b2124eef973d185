"""Megatron-Bridge's own checkpoints, on one rank: import_ckpt, export_ckpt and from_auto_config of folders that
session_bridge.py wrote. Writes what was found beside them."""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from checkpoint import transformer_engine_stub  # noqa: E402
from checkpoint.bridge_cases import CHECKPOINTS  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import megatron_vwn.training.model  # noqa: E402

transformer_engine_stub.install()

from megatron.bridge import AutoBridge  # noqa: E402

import megatron_vwn.checkpoint.bridge  # noqa: E402


def check(folder: Path) -> dict:
    megatron, back = Path(f"{folder}, imported"), Path(f"{folder}, exported")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    AutoBridge.import_ckpt(folder, megatron)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    AutoBridge.from_hf_pretrained(folder).export_ckpt(megatron, back, show_progress=False)
    found, expected = (load_file(each / "model.safetensors") for each in (back, folder))
    # What the checkpoint's provider says, where the folder only gives the class.
    said = AutoBridge.from_auto_config(str(megatron), str(folder)).hf_pretrained.to_dict()
    true = AutoBridge.from_hf_pretrained(folder).hf_pretrained.config.to_dict()
    return {
        "tensors": [name for name in expected if name not in found or not torch.equal(found[name], expected[name])],
        "settings": [name for name in true if name != "_name_or_path" and said.get(name) != true[name]],
    }


if __name__ == "__main__":
    report = {name: check(Path(sys.argv[1]) / name) for name in CHECKPOINTS}
    (Path(sys.argv[1]) / "checkpoints.json").write_text(json.dumps(report))
