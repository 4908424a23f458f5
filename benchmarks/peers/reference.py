"""The same work on Meta's own code: run by compare.py with that checkout alone on PYTHONPATH.

Its package is named `llama` too, so nothing of this library can be imported here. Its code says
"cuda" in places; on another device, for trying this script out, a mode turns that into the device.
"""

import contextlib
import os
import socket
import statistics
import sys
from types import SimpleNamespace

import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel
from torch.overrides import TorchFunctionMode
from workload import (
    WARM,
    Results,
    median_seconds,
    prompt,
    ragged_prompts,
    room,
    seconds,
    task,
)

from llama.generation import Llama  # theirs
from llama.model import ModelArgs, Transformer


class Elsewhere(TorchFunctionMode):
    """Puts on `device` what the code inside puts on "cuda"."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if kwargs.get("device") == "cuda":
            kwargs["device"] = self.device
        return func(*args, **kwargs)


def build(given: dict) -> Transformer:
    cuda = given["device"].startswith("cuda")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=0, world_size=1)
    with contextlib.redirect_stdout(sys.stderr):
        initialize_model_parallel(1)
    if cuda:  # as in theirs: fairscale makes its weights by torch.Tensor, which a device misses
        kind = {"bfloat16": torch.cuda.BFloat16Tensor, "float16": torch.cuda.HalfTensor}
        torch.set_default_tensor_type(kind.get(given["dtype"], torch.cuda.FloatTensor))
    else:
        torch.set_default_dtype(getattr(torch, given["dtype"]))
        torch.set_default_device(given["device"])
    args = {k: v for k, v in given["args"].items() if k not in ("tied", "use_scaled_rope")}
    rows = max(*given["rows"], 8)
    model = Transformer(
        ModelArgs(**args, vocab_size=given["vocab_size"], max_batch_size=rows,
                  max_seq_len=room(given))
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return model


def measure(given: dict, model: Transformer, results: Results) -> None:
    vocab, device, context = given["vocab_size"], given["device"], given["context"]
    for rows in given["rows"]:
        ids = torch.tensor([prompt(context, vocab, seed) for seed in range(rows)])
        last = model.forward(ids, 0)[:, -1].argmax(-1, keepdim=True)
        times = []
        for step in range(WARM + given["steps"]):

            def one(last: torch.Tensor = last, step: int = step) -> list:
                return model.forward(last, context + step)[:, -1].argmax(-1).tolist()

            times.append(seconds(one, device))
        results.decode(rows, statistics.median(times[WARM:]))
    prompts = ragged_prompts(vocab, given["longest"])
    tokenizer = SimpleNamespace(pad_id=-1, stop_tokens=[vocab])  # an id that never comes
    llama = Llama(model, tokenizer)

    def generate() -> None:
        tokens, _ = llama.generate(prompts, given["new_tokens"], temperature=0)
        assert all(len(row) == given["new_tokens"] for row in tokens)

    results.ragged(seconds(generate, device))
    for length in given["lengths"]:
        ids = torch.tensor([prompt(length, vocab, 0)])
        with contextlib.suppress(torch.OutOfMemoryError):  # its mask and logits are S x S, S x V
            answer = lambda ids=ids: model.forward(ids, 0)[:, -1].argmax(-1).tolist()  # noqa: E731
            results.prefill(length, median_seconds(answer, device))


def main() -> None:
    given = task()
    cuda = given["device"].startswith("cuda")
    with contextlib.nullcontext() if cuda else Elsewhere(given["device"]), torch.inference_mode():
        model = build(given)
        results = Results(given)
        measure(given, model, results)
        results.memory()


if __name__ == "__main__":
    main()
