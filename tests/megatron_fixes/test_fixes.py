"""megatron_vwn.megatron_fixes: fixes_checks.py in a process of its own.

That runs resume bitwise with the repairs is tested on two ranks in tests/cpu/test_cpu_session.py.
"""

from pathlib import Path

import launch


def test_fixes():
    # A real process: a server has the emulation and the repairs already.
    done = launch.real(0, "-m", "pytest", Path(__file__).parent / "fixes_checks.py", env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stdout + done.stderr
