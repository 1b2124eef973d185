"""What a converted folder says about itself: a model card for people, and Megatron's arguments for the way back."""

import argparse
import json
from pathlib import Path

from megatron_vwn import __version__
from megatron_vwn.hf import VWNConfig

ARGUMENTS = "megatron_arguments.json"
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")  # a slash begins a further prediction
_JSON = (bool, int, float, str, type(None))

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- vwn
- virtual-width-networks
---

# {name}

A Virtual Width Network (arXiv 2511.11238): a decoder of width {hidden_size} around a residual stream of width
{over_width} ({vwn_n} segments of {segment}; r = {expansion:g}), {vwn_connection} {vwn_gate} connections, {vwn_carry}
carry, {vwn_embedding} embedding. Sublayers, one symbol each: `{hybrid_pattern}`{further}.

Converted from a Megatron checkpoint by megatron_vwn {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
tokens = tokenizer("It was", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))
```

`trust_remote_code=True` executes the code in this folder, `configuration_vwn.py` and `modeling_vwn.py`, with all your
rights: read both files, or install megatron_vwn, `import megatron_vwn.hf` and leave the argument out, and no code of
the folder is executed. The weights are safetensors, which hold numbers alone.

The arguments of the training run are in `{arguments}`.
"""


def plain(args: argparse.Namespace) -> dict[str, object]:
    """The arguments that JSON gives back as they were; not those that are enumerations or dtypes, and no paths: the
    folder is made to be given away, and they name the machine of the run."""
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(vars(args).items())}
    return {
        name: value
        for name, value in known.items()
        if all(
            isinstance(each, _JSON) and (name in _PATTERNS or "/" not in str(each))
            for each in (value if isinstance(value, list) else [value])
        )
    }


def write_model_card(folder: Path, name: str, args: argparse.Namespace, config: VWNConfig) -> None:
    """Write README.md, which calls the model by a name, and the arguments into a converted folder."""
    (folder / ARGUMENTS).write_text(json.dumps(plain(args), indent=1) + "\n")
    further = f", and {config.num_mtp_layers} x `{config.mtp_hybrid_pattern}` for further tokens"
    card = _CARD.format(
        **config.to_dict() | {"name": name},
        over_width=config.over_width,
        segment=config.hidden_size // config.vwn_m,
        expansion=config.vwn_n / config.vwn_m,
        further=further if config.num_mtp_layers else "",
        version=__version__,
        arguments=ARGUMENTS,
    )
    (folder / "README.md").write_text(card)
