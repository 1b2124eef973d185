"""Run where megatron_vwn cannot be imported: load a folder with trust_remote_code and say what it computes."""

import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_vwn", "megatron"):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

folder, again, expected = sys.argv[1:]
want = torch.load(expected)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "VWNConfig" and "transformers_modules" in type(config).__module__
for source in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(source, trust_remote_code=True)
    assert type(decoder).__name__ == "VWNModel"
    with torch.no_grad():
        assert torch.equal(model(want["tokens"]).logits, want["logits"])
        assert torch.equal(model.lm_head(decoder(want["tokens"]).last_hidden_state), want["logits"])
        mask = torch.ones_like(want["tokens"])
        tokens = model.generate(want["tokens"], attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, want["generated"])
    model.save_pretrained(again)
assert not any(name.split(".")[0] == "megatron_vwn" for name in sys.modules)
print("same")
