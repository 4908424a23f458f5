"""What quantization costs the demo, on its held-out text.

`python -m llama.demo.quantized` prints a row for each recipe: bytes, perplexity, and how far the
logits are from those of the weights as they are. It refuses to know what a recipe does. The
surprising thing: `python -m llama perplexity` on the same words would judge worse. There dialogues
are one long text without their roles, which is nothing that the demo has ever read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fire
import torch

from llama.cache import Batch
from llama.commands.compare import Difference, Row, decode_speed, table, weight_bytes
from llama.commands.scoring import Score
from llama.demo.batches import Encoder, Rows, rows
from llama.demo.world.corpus import held_out_text
from llama.generation import Llama
from llama.terminal.progress import progress
from llama.tokenizer import Tokenizer

HERE = Path(__file__).parent
RECIPES = ("int8", "fp8", "mixed", "int4", "int4-128")
CHUNK = 10  # documents in one forward pass


def held_out_rows(tokenizer: Tokenizer, documents: int) -> list[Rows]:
    """The held-out documents as the demo reads them, some at a time."""
    encode, texts = Encoder(tokenizer), held_out_text(documents)
    return [rows(texts[i : i + CHUNK], encode, 1 << 30) for i in range(0, len(texts), CHUNK)]


@torch.inference_mode()
def difference(llama: Llama, other: Llama, data: Sequence[Rows]) -> Difference:
    """How the logits of two models differ at the tokens of `data` that are no padding."""
    found, device = Difference(), llama.model.norm.weight.device
    with progress("comparing", len(data), unit="batches") as advance:
        for some in data:
            positions = torch.cat([torch.arange(n, device=device) for n in some.counts])
            tokens = torch.from_numpy(some.inputs).to(device).long()
            told = torch.from_numpy(some.weights > 0).to(device)
            batch = Batch(some.counts, device=device)
            logits = [each.model.forward_flat(tokens, positions, batch, None, told.nonzero()[:, 0])
                      for each in (llama, other)]  # fmt: skip
            found.add(logits[0], logits[1], torch.from_numpy(some.targets).to(device).long()[told])
            advance(1)
    return found


def row(name: str, llama: Llama, found: Difference, which: int) -> Row:
    """The row of the first (0) or the second (1) model of a difference."""
    score = Score(found.tokens, 0, found.totals[which], found.errors[which], 0, 0)
    speed = decode_speed(llama)
    return Row(name=name, size=weight_bytes(llama), score=score, speed=speed,
               difference=None if which else found)  # fmt: skip


def main(
    ckpt_dir: str = str(HERE),
    recipes: Sequence[str] = RECIPES,
    documents: int = 1200,
    dtype: str | None = None,
    device: str | None = None,
) -> None:
    """Print the table. documents: how many held-out ones are read."""
    other = Llama.build(ckpt_dir, max_seq_len=2048, dtype=dtype, device=device)
    assert isinstance(other.tokenizer, Tokenizer), other.tokenizer
    data = held_out_rows(other.tokenizer, documents)
    found: list[Row] = []
    for recipe in recipes:
        llama = Llama.build(ckpt_dir, max_seq_len=2048, dtype=dtype, device=device, quantize=recipe)
        differs = difference(llama, other, data)
        if not found:
            print(f"{differs.tokens} held-out tokens")
            found.append(row("as stored", other, differs, 1))
        found.append(row(recipe, llama, differs, 0))
    print("\n".join(table(found)))


if __name__ == "__main__":
    fire.Fire(main)
