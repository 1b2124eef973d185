"""Sessions in forks of a server end as those under torchrun do."""

import subprocess
from pathlib import Path

import launch
import pytest

RANKS = """
import os, sys, time
import torch.distributed as dist
rank = int(os.environ["RANK"])
if sys.argv[1] == "fails" and rank == 1:
    raise ValueError("rank 1 cannot")
if sys.argv[1] in ("fails", "hangs"):
    time.sleep(600)
dist.init_process_group("gloo")
print(f"rank {rank} of {dist.get_world_size()} in {os.getcwd()} with {os.environ['GIVEN']}")
sys.exit(3 if sys.argv[1] == "exits" else None)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(RANKS)
    return path


def test_ranks_meet_in_the_given_folder_and_environment(script, tmp_path):
    done = launch.session(2, script, "meets", env={"GIVEN": "this"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 2 in {tmp_path} with this" for rank in range(2)]


def test_a_rank_that_fails_ends_those_that_wait(script):
    done = launch.session(2, script, "fails")
    assert done.returncode == 1
    assert "ValueError: rank 1 cannot" in done.stderr


def test_exit_codes_and_timeouts_come_back(script):
    assert launch.session(1, script, "exits", env={"GIVEN": ""}).returncode == 3
    with pytest.raises(subprocess.TimeoutExpired):
        launch.session(2, script, "hangs", timeout=1)
    assert launch.session(1, script, "meets", env={"GIVEN": ""}).returncode == 0  # the server goes on


def test_what_is_read_at_import_needs_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(os.environ['TORCH_LOGS'], 'megatron' in sys.modules)")
    assert launch.session(0, script, env={"TORCH_LOGS": "-dynamo"}).stdout == "-dynamo False\n"
    script.write_text("import os, sys; print('RANK' in os.environ, 'megatron' in sys.modules)")
    assert launch.session(0, script).stdout == "False True\n"


def test_a_file_stays_in_one_process(tmp_path):
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "checkpoint").mkdir()
    for name in ("test_one", "checkpoint/test_two", "checkpoint/test_three"):
        program = "import os, pytest\n\n@pytest.mark.parametrize('n', range(9))\ndef test(n):\n"
        program += f"    open({str(tmp_path / 'ran')!r}, 'a').write(f'{name.split('/')[0]} {{os.getpid()}}\\n')\n"
        (tmp_path / f"{name}.py").write_text(program)
    pytest_options = ["-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    done = launch.real(0, "-m", "pytest", *pytest_options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert len(ran) == 27
    assert len({(group, process) for group, process in ran}) == 2


SPAWNS = """
import multiprocessing, os
def where(number):
    return number, os.getcwd(), os.environ["GIVEN"]
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(where, [7])[0])
"""


def test_a_rank_can_spawn_processes_that_know_its_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWNS)
    done = launch.session(1, script, env={"GIVEN": "this"}, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"7 {tmp_path} this\n", done.stderr
