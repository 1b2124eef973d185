"""VWN models for transformers 5.8 to 5.24: importing this package makes Auto classes know the model type "vwn".

``configuration_vwn.py`` and ``modeling_vwn.py`` need torch and transformers alone. ``add_code`` puts them next to a
checkpoint, which then loads with ``trust_remote_code=True`` where this package is not installed.
"""

import json
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from megatron_vwn.hf.configuration_vwn import VWNConfig, copy_code
from megatron_vwn.hf.modeling_vwn import (
    VWNForCausalLM,
    VWNForSequenceClassification,
    VWNForTokenClassification,
    VWNModel,
)

__all__ = [
    "VWNConfig",
    "VWNForCausalLM",
    "VWNForSequenceClassification",
    "VWNForTokenClassification",
    "VWNModel",
    "add_code",
]

AutoConfig.register("vwn", VWNConfig, exist_ok=True)
AutoModelForCausalLM.register(VWNConfig, VWNForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(VWNConfig, VWNForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(VWNConfig, VWNForTokenClassification, exist_ok=True)

# AutoModel is what serving engines look for: they bring their own head.
AUTO_MAP = {
    "AutoConfig": "configuration_vwn.VWNConfig",
    "AutoModel": "modeling_vwn.VWNModel",
    "AutoModelForCausalLM": "modeling_vwn.VWNForCausalLM",
    "AutoModelForSequenceClassification": "modeling_vwn.VWNForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_vwn.VWNForTokenClassification",
}


def add_code(folder: str | Path) -> None:
    """Make a saved checkpoint self-contained: the two files of code, and their names in its config.json.

    Args:
        folder: where ``save_pretrained`` or the converter wrote config.json.
    """
    copy_code(folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": AUTO_MAP}, indent=2, sort_keys=True) + "\n")
