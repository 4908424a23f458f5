"""Make the model in the box from nothing: tokenizer, weights, params.json, checklist.chk.

`python -m llama.demo.train --out DIR` does all of it; on one machine the same call gives the same
bytes. It refuses to know what the text is about. The surprising thing: every step computes with the
weights rounded to bfloat16, as they will be shipped, while float32 masters collect the changes; so
nothing is lost when the file is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.cache import Batch
from llama.demo.batches import Maker, Rows, stream
from llama.demo.tokenizer_training import train_tokenizer
from llama.files.checklist import CHECKLIST, checklist
from llama.model import Transformer
from llama.parallel import local_device
from llama.terminal.progress import progress
from llama.tokenizer import Tokenizer

RANKS = 1280
TOKENIZER_DOCUMENTS = 12000
PARAMS = {
    "dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 256,
    "ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 500000.0, "context_length": 2048,
}  # fmt: skip
FILES = ("consolidated.00.pth", "params.json", "tokenizer.model")
WARMUP, PEAK, FLOOR, DECAY, CLIP = 300, 2e-3, 1e-5, 0.05, 1.0


class _Loss(nn.Module):
    """Summed cross entropy of a flat batch; a module, so that functional_call can swap weights."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: Rows, device: torch.device) -> Tensor:
        inputs, targets, weights = (
            torch.from_numpy(x).to(device, non_blocking=True)
            for x in (data.inputs, data.targets, data.weights)
        )  # (N,)
        ranges = [torch.arange(n, device=device) for n in sorted(set(data.counts))]
        repeats = [data.counts.count(len(p)) for p in ranges]
        positions = torch.cat([p.repeat(r) for p, r in zip(ranges, repeats, strict=True)])
        batch = Batch(data.counts, device=device)
        logits = self.model.forward_flat(inputs.long(), positions, batch)
        loss = F.cross_entropy(logits, targets.long(), reduction="none")  # (N,)
        return (loss * weights).sum() / weights.sum()


def initialise(model: Transformer, seed: int) -> None:
    """Normal weights of deviation 0.02; the two that write to the residual stream smaller."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)
            continue
        narrow = name.endswith(("wo.weight", "w2.weight"))
        deviation = 0.02 / math.sqrt(2 * model.params.n_layers) if narrow else 0.02
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise, then a cosine down to FLOOR."""
    rise = min(1.0, (step + 1) / min(WARMUP, max(1, steps // 4)))
    return FLOOR + rise * (peak - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _repeatable() -> Iterator[None]:
    """Deterministic algorithms for as long as it lasts."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def fit(
    args: ModelArgs,
    batches: Iterator[Rows],
    steps: int,
    device: torch.device,
    seed: int,
    peak: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train for `steps` batches: the weights in bfloat16, by name, and the loss of each step."""
    with torch.random.fork_rng(devices=[]):  # layers are made with random values of their own
        model = Transformer(args)
    initialise(model, seed)
    loss_of = _Loss(model.to(device))
    masters = dict(loss_of.named_parameters())
    flat = [p for p in masters.values() if p.dim() == 1]
    groups = [
        {"params": [p for p in masters.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": flat, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device.type == "cuda")
    losses: list[Tensor] = []
    start = time.monotonic()
    with _repeatable(), progress("training", steps, unit="step") as advance:
        for step, data in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            rounded = {name: p.bfloat16() for name, p in masters.items()}
            loss = torch.func.functional_call(loss_of, rounded, (data, device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(masters.values(), CLIP)
            optimizer.step()
            losses.append(loss.detach())
            advance(1)
            if (step + 1) % 500 == 0:
                recent = torch.stack(losses[-100:]).mean().item()
                print(f"step {step + 1}: loss {recent:.4f}, {time.monotonic() - start:.0f} s")
    weights = {
        name.removeprefix("model."): p.detach().bfloat16().cpu() for name, p in masters.items()
    }
    return weights, torch.stack(losses).tolist()


def write_checkpoint(weights: dict[str, Tensor], args: ModelArgs, out: Path) -> None:
    """The files of a Meta release beside the tokenizer that is already there."""
    torch.save(weights, out / FILES[0])
    params = PARAMS | {"vocab_size": args.vocab_size}
    (out / FILES[1]).write_text(json.dumps(params) + "\n", encoding="ascii")
    sums = checklist({name: out / name for name in FILES})
    (out / CHECKLIST).write_text(sums, encoding="ascii")


def main(
    out: str,
    steps: int = 5000,
    tokens: int = 65536,
    device: str | None = None,
    seed: int = 0,
    processes: int | None = None,
    peak: float = PEAK,
    tokenizer_documents: int = TOKENIZER_DOCUMENTS,
) -> None:
    """Make the demo in the folder `out`: `steps` batches of about `tokens` tokens each.

    device: a name of torch's, by default the best there is; processes: how many make batches
    beside this one, by default one fewer than there are cores (the result does not depend on it).
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    trained_on = local_device(device)
    tokenizer_path = folder / FILES[2]
    train_tokenizer(tokenizer_path, RANKS, tokenizer_documents)
    args = ModelArgs(**PARAMS, vocab_size=Tokenizer(tokenizer_path).n_words)  # type: ignore[arg-type]
    helpers = (os.cpu_count() or 1) - 1 if processes is None else processes
    batches = stream(Maker(tokenizer_path, seed, tokens), steps, helpers)
    weights, losses = fit(args, batches, steps, trained_on, seed, peak)
    write_checkpoint(weights, args, folder)
    digest = hashlib.sha256((folder / FILES[0]).read_bytes()).hexdigest()
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-10:]) / len(losses[-10:]):.3f} at last")
    print(f"{folder / FILES[0]}: sha256 {digest}")


if __name__ == "__main__":
    fire.Fire(main)
