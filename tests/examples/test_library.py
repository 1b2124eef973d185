"""The examples of the library run, stay short, and their connections agree."""

import ast
import math
from pathlib import Path

import launch
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "library"
# After the example, in the same process: its Megatron connection against the plain one with the same parameters.
COMPARISON = """
import runpy, sys, torch
variables = runpy.run_path(sys.argv[1])
from megatron_vwn import Connection
theirs = variables["model"].decoder.layers[1].connection
ours = Connection(2, 8, 64)
torch.manual_seed(0)
for parameter in theirs.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
ours.load_state_dict(theirs.state_dict())
h, y = torch.randn(5, 2, 256), torch.randn(5, 2, 64)
(x, gates), (our_x, our_gates) = theirs.read(h), ours.read(h)
assert torch.equal(x, our_x)
assert torch.equal(theirs.write(h, theirs.share(y), gates).view_as(h), ours.write(h, y, our_gates))
without = [name for name, p in variables["model"].named_parameters() if p.grad is None]
assert not without, without
"""


def loss_of(*arguments):
    # In a process as a user starts it: what the examples import, and in which order, is part of them.
    done = launch.real(0, *arguments, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return float(done.stdout.split("loss ")[-1].split()[0])


def test_plain_torch_learns_its_batch():
    assert loss_of(FOLDER / "plain_torch.py") < 0.5 * math.log(50)


def test_the_model_of_megatron_has_the_same_connection():
    assert abs(loss_of("-c", COMPARISON, FOLDER / "megatron_model.py") - math.log(96)) < 0.5


@pytest.mark.parametrize("name", ["plain_torch.py", "megatron_model.py"])
def test_they_are_short(name):
    text = (FOLDER / name).read_text()
    aside = {node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)} | {1}
    lines = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in aside]
    assert len(lines) <= 25
