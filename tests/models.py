"""The tiny model that tests train, as flags of the training program; a test names what differs in its own."""

TINY = {
    "hidden-size": 32,
    "num-attention-heads": 4,
    "ffn-hidden-size": 64,
    "seq-length": 32,
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "hidden-dropout": 0,
    "attention-dropout": 0,
    "micro-batch-size": 2,
    "global-batch-size": 4,
    "lr": "1e-2",
    "eval-iters": 0,
    "eval-interval": 1000,
    "log-interval": 1,
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 127,
}


def tiny(pattern: str | None, further: str = "", **changes: object) -> list[str]:
    """Flags of the tiny model.

    Args:
        pattern: one symbol per sublayer; None where the test gives it.
        further: flags as they are typed, which TINY has not.
        changes: other values, by the names of flags; True is a switch, and None leaves a flag out.
    """
    flags = {"hybrid-layer-pattern": pattern} | TINY | {name.replace("_", "-"): changes[name] for name in changes}
    flags.setdefault("max-position-embeddings", flags["seq-length"])
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words + further.split()
