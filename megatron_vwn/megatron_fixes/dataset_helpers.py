"""The wheel of megatron-core 0.19 has its dataset helpers compiled, but not the Makefile that ``pretrain()`` runs."""

from pathlib import Path

from megatron.core.datasets import utils as dataset_utils

from megatron_vwn.megatron_fixes.repair import repair


def skip_makefile_of_dataset_helpers() -> None:
    """Do not run ``make`` for dataset helpers that the wheel brings compiled, without the Makefile to compile them."""
    try:
        from megatron.core.datasets import helpers_cpp  # noqa: F401
    except ImportError:
        return
    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        repair(dataset_utils, "compile_helpers", lambda compile_helpers: lambda *args, **kwargs: None)
