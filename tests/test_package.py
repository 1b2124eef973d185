"""What ``import megatron_vwn`` offers, and what it leaves unimported."""

import tomllib
from pathlib import Path

import launch
import pytest

import megatron_vwn

ROOT = Path(__file__).parent.parent


def run(program):
    done = launch.real(0, "-c", program)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_neither_torch_nor_megatron():
    run(
        "import sys, megatron_vwn\n"
        "megatron_vwn.VirtualWidthConfig(m=2, n=4), dir(megatron_vwn)\n"
        "assert not {'torch', 'megatron', 'triton'} & set(sys.modules), sorted(sys.modules)"
    )


def test_help_imports_neither_torch_nor_megatron():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert len(scripts) >= 7
    run(
        "import contextlib, importlib, io, sys\n"
        f"for entry in {list(scripts.values())}:\n"
        "    module, _, name = entry.partition(':')\n"
        "    program = getattr(importlib.import_module(module), name)\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        program(['--help'])\n"
        "    assert said.getvalue().startswith('usage: '), entry\n"
        "    assert not {'torch', 'megatron', 'triton', 'transformers'} & set(sys.modules), entry"
    )


def test_the_connection_needs_no_megatron():
    run(
        "import sys\n"
        "sys.modules['megatron'] = None\n"
        "import torch\n"
        "from megatron_vwn import Connection\n"
        "assert Connection(2, 4, 8)(torch.randn(3, 16), torch.sin).shape == (3, 16)"
    )


def test_every_name_is_there():
    run(
        "import megatron_vwn.cpu\n"
        "megatron_vwn.cpu.install(announce=False)\n"
        "from megatron_vwn import *\n"
        "for name in megatron_vwn.__all__:\n"
        "    assert globals()[name] is getattr(megatron_vwn, name) and globals()[name].__name__ == name"
    )
    assert set(megatron_vwn.__all__) <= set(dir(megatron_vwn))
    assert set(megatron_vwn.__all__) == set(megatron_vwn._HOMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'megatron_vwn' has no attribute 'Conection'"):
        megatron_vwn.Conection  # noqa: B018
    assert not hasattr(megatron_vwn, "__wrapped__")
