"""A checkpoint with the two files of code next to it works where this package is not installed."""

import ast
import sys
from pathlib import Path

import launch
import torch
from hf.test_model import PROMPT, build, greedy

import megatron_vwn.hf
from megatron_vwn.hf import add_code

CODE = Path(megatron_vwn.hf.__file__).parent


def test_a_folder_alone(tmp_path):
    model = build("experts by sigmoid")
    model.save_pretrained(tmp_path / "model")
    add_code(tmp_path / "model")
    with torch.no_grad():
        want = {
            "tokens": PROMPT,
            "logits": model(PROMPT).logits,
            "generated": greedy(model, PROMPT, 8, attention_mask=torch.ones_like(PROMPT)),
        }
    torch.save(want, tmp_path / "want.pt")
    run = launch.real(
        *(0, Path(__file__).parent / "remote.py", "model", "again", "want.pt"),
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert run.returncode == 0 and run.stdout.endswith("same\n"), run.stdout + run.stderr[-6000:]


def test_the_files_need_torch_and_transformers_alone():
    for name in ("configuration_vwn.py", "modeling_vwn.py"):
        for node in ast.walk(ast.parse((CODE / name).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 or (node.level, node.module) == (1, "configuration_vwn"), name
                modules = [] if node.level else [node.module]
            else:
                continue
            for module in modules:
                package = module.split(".")[0]
                assert package in {"torch", "transformers", *sys.stdlib_module_names}, (name, module)
