"""The same work on gpt-fast: its model.py and generate.py from a checkout on PYTHONPATH.

One sequence only, as it runs them; decode compiled, prefill not, which is its default. Its loop
samples (softmax and an exponential race); it has no greedy one. `mode` is bf16, int8 or int4.
"""

import sys
import time
import types

import torch

sys.modules["tokenizer"] = types.ModuleType("tokenizer")  # theirs needs packages for files
sys.modules["tokenizer"].get_tokenizer = None  # that are not read here

import generate as theirs  # noqa: E402
from model import ModelArgs, Transformer  # noqa: E402
from workload import WARM, Results, median_seconds, prompt, room, seconds, task  # noqa: E402


def build(given: dict) -> torch.nn.Module:
    shape, device, kind = given["config"], given["device"], getattr(torch, given["dtype"])
    config = ModelArgs(
        block_size=max(8192, room(given)), vocab_size=given["vocab_size"], dim=shape["dim"],
        n_layer=shape["n_layers"], n_head=shape["n_heads"], n_local_heads=shape["n_kv_heads"],
        intermediate_size=shape["hidden_dim"], rope_base=500000,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
        if given["mode"] == "int8":
            from quantize import WeightOnlyInt8QuantHandler

            model = WeightOnlyInt8QuantHandler(model).convert_for_runtime()
        elif given["mode"] == "int4":
            from quantize import WeightOnlyInt4QuantHandler

            model = WeightOnlyInt4QuantHandler(model, 32).convert_for_runtime()
    model = model.to_empty(device=device).to(dtype=kind).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
        else:
            tensor.random_(-100, 100)
    return model


def main() -> None:
    given = task()
    device, context, vocab = given["device"], given["context"], given["vocab_size"]
    results = Results(given)
    with torch.no_grad():
        model = build(given)
        with torch.device(device):
            model.setup_caches(max_batch_size=1, max_seq_length=context + WARM + given["steps"] + 8)
        if given["compile_gpt_fast"]:
            theirs.decode_one_token = torch.compile(
                theirs.decode_one_token, mode="reduce-overhead", fullgraph=True
            )
        ids = torch.tensor([prompt(context, vocab, 0)], device=device)

        def prefill(ids: torch.Tensor = ids) -> torch.Tensor:
            return theirs.prefill(model, ids, torch.arange(ids.shape[1], device=device)).clone()

        def decode(steps: int) -> None:
            at = torch.tensor([context], device=device, dtype=torch.int)
            tokens, _ = theirs.decode_n_tokens(model, prefill().view(1, -1), at, steps)
            tokens[-1].tolist()

        began = time.perf_counter()
        decode(WARM)
        results.compiling(time.perf_counter() - began)
        long, short = (
            min(seconds(lambda n=n: decode(n), device) for _ in range(4))
            for n in (WARM + given["steps"], WARM)
        )
        results.decode(1, (long - short) / given["steps"])
        for length in given["lengths"]:
            ids = torch.tensor([prompt(length, vocab, 0)], device=device)
            with torch.device(device):
                model.setup_caches(max_batch_size=1, max_seq_length=length)
            results.prefill(length, median_seconds(lambda ids=ids: prefill(ids).tolist(), device))
        results.memory()


if __name__ == "__main__":
    main()
