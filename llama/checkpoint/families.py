"""The released models by their shapes: a name for people to read, guessed from ModelArgs."""

from llama.args import ModelArgs

SENTENCEPIECE = (32000, 32016)  # vocabularies of Llama 1, Llama 2 and Code Llama

# (dim, n_layers, whether each query head has its own keys) of those with SentencePiece's
_OLD_SIZES = {
    (4096, 32, True): "7B",
    (5120, 40, True): "13B",
    (6656, 60, True): "33B",
    (8192, 48, False): "34B",
    (8192, 80, True): "65B",
    (8192, 80, False): "70B",
}
_OLD_FAMILIES = {2048: "Llama 1", 4096: "Llama 2", 16384: "Code Llama"}  # by context

# (dim, n_layers) of the released models with Llama 3's vocabulary, without and with scaled rotary
_FAMILIES = {
    (4096, 32): ("Llama 3 8B", "Llama 3.1 8B"),
    (8192, 80): ("Llama 3 70B", "Llama 3.1 or 3.3 70B"),
    (16384, 126): (None, "Llama 3.1 405B"),
    (2048, 16): (None, "Llama 3.2 1B"),
    (3072, 28): (None, "Llama 3.2 3B"),
}


def family_of(args: ModelArgs) -> str:
    """The name of the released model that has this shape, or "a Llama of its own shape"."""
    plain, scaled = _FAMILIES.get((args.dim, args.n_layers), (None, None))
    name = scaled if args.rope_scaling else plain
    if args.vocab_size in SENTENCEPIECE:
        size = _OLD_SIZES.get((args.dim, args.n_layers, args.n_kv_heads == args.n_heads))
        family = _OLD_FAMILIES.get(args.context_length)
        name = f"{family} {size}" if family and size else None
    elif args.vocab_size != 128256:
        name = None
    return name or "a Llama of its own shape"
