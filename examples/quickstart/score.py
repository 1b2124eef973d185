"""What exported models make of held-out text, and a paragraph of each: score.py PREFIX RUN...

Every RUN has a Hugging Face folder and gets a file with the results.
"""

import json
import sys
from pathlib import Path

import torch
from evaluation import FOLDER, RESULTS
from heldout import bits_per_byte, read_text
from transformers import AutoTokenizer

from megatron_vwn.hf import VWNForCausalLM

PROMPT = "Emma had not been ten minutes in the room before she perceived that"
TOKENS = 90


def main(prefix: str, *runs: str) -> None:
    """Score the runs that have no results yet."""
    text = read_text(prefix)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for run in map(Path, runs):
        if (run / RESULTS).exists():
            continue
        model = VWNForCausalLM.from_pretrained(run / FOLDER, dtype=torch.float32).to(device).eval()
        results = {
            "bits_per_byte": bits_per_byte(model, text, model.config.max_position_embeddings),
            "prompt": PROMPT,
            "paragraph": paragraph(model, AutoTokenizer.from_pretrained(run / FOLDER, trust_remote_code=False)),
        }
        (run / RESULTS).write_text(json.dumps(results, indent=1) + "\n")


def paragraph(model, tokenizer) -> str:
    """What the model goes on with after the prompt, the same in every call."""
    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    torch.manual_seed(1)
    # As many at least as at most: no end of document. With the prompt it is less than a sample of the training.
    drawn = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.9}
    tokens = model.generate(prompt.input_ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **drawn)
    # Line ends are those of a book's page.
    return " ".join(tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]).split())


if __name__ == "__main__":
    main(*sys.argv[1:])
