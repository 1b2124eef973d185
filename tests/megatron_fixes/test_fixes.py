"""megatron_vwn.megatron_fixes: fixes_checks.py in a process of its own.

That runs resume bitwise with the repairs is tested on two ranks in tests/cpu/test_cpu_session.py.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_fixes():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", Path(__file__).parent / "fixes_checks.py"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
