"""vwn-benchmark from a checkout, without an installation of this package: python tools/benchmark.py ..."""

import sys
from pathlib import Path

# In place of this folder, whose files would be found under the names of modules.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_vwn.benchmark.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
