"""Examine a model on the held-out questions and text of the little world.

`python -m llama.demo.evaluate` prints, for each kind, how many questions there are, how many of
them the model answers rightly (greedily), and how many a baseline does that answers like the
nearest training question; then the perplexity of held-out text. It refuses to know how answers are
judged: each question judges its own. The surprising thing: the baseline measures the questions, not
the model. Where it does well, a kind can be answered from memory; where it fails, only by reading.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import fire
import torch
import torch.nn.functional as F

from llama.cache import Batch
from llama.demo.batches import Encoder, rows
from llama.demo.world.corpus import ALL_KINDS, Question, held_out, held_out_text, training_documents
from llama.generation import Llama
from llama.model import Transformer
from llama.terminal.progress import progress
from llama.tokenizer import Dialog, Tokenizer
from llama.tokenizer.protocols import TextTokenizer

HERE = Path(__file__).parent
COMPLETION_TOKENS, ANSWER_TOKENS = 16, 160


def answers(llama: Llama, questions: list[Question]) -> list[str]:
    """What the model says, greedily: dialogues to their end, texts for a few tokens."""
    texts = [q.prompt for q in questions if isinstance(q.prompt, str)]
    dialogs = [q.prompt for q in questions if not isinstance(q.prompt, str)]
    continued = iter(
        llama.text_completion(texts, temperature=0, max_gen_len=COMPLETION_TOKENS) if texts else []
    )
    said = iter(
        llama.chat_completion(dialogs, temperature=0, max_gen_len=ANSWER_TOKENS) if dialogs else []
    )
    return [
        next(continued)["generation"]
        if isinstance(q.prompt, str)
        else next(said)["generation"]["content"]
        for q in questions
    ]


class NearestQuestion:
    """Answers like the training question whose words are nearest: cosine of tf-idf vectors.

    For a text it says what follows, in a training passage, the few words nearest to its last ones.
    """

    def __init__(self, documents: int = 20000, seed: int = 0) -> None:
        self.entries: list[tuple[Counter[str], str]] = []
        for document in islice(training_documents(seed), documents):
            if isinstance(document, str):
                words = document.split(" ")
                for i in range(4, min(len(words), 40), 2):
                    self._add(" ".join(words[max(0, i - 6) : i]), " ".join(words[i : i + 4]))
            else:
                for i, message in enumerate(document):
                    if message["role"] == "assistant":
                        self._add(_asked(document[:i]), message["content"])
        frequency = Counter(word for bag, _ in self.entries for word in bag)
        self.idf = {word: math.log(len(self.entries) / n) for word, n in frequency.items()}
        self.index: defaultdict[str, list[int]] = defaultdict(list)
        self.norms = [self._norm(bag) for bag, _ in self.entries]
        for i, (bag, _) in enumerate(self.entries):
            for word in bag:
                self.index[word].append(i)

    def _add(self, asked: str, answer: str) -> None:
        self.entries.append((_bag(asked), answer))

    def _norm(self, bag: Counter[str]) -> float:
        return math.sqrt(sum((n * self.idf.get(word, 0)) ** 2 for word, n in bag.items())) or 1.0

    def answer(self, question: Question) -> str:
        prompt = question.prompt
        bag = _bag(" ".join(prompt.split(" ")[-6:]) if isinstance(prompt, str) else _asked(prompt))
        scores: defaultdict[int, float] = defaultdict(float)
        for word, n in bag.items():
            value = self.idf.get(word, 0)
            for i in (
                self.index[word] if value > 2 else ()
            ):  # words of every question decide nothing
                scores[i] += n * value * self.entries[i][0][word] * value / self.norms[i]
        return self.entries[max(scores, key=lambda i: scores[i])][1] if scores else ""


def _asked(dialog: Dialog) -> str:
    """The system prompt and the last thing said by the user, and what else the user said before."""
    return " ".join(m["content"] for m in dialog if m["role"] != "assistant")


def _bag(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d|[^\W\d]+|[^\w\s]", text.lower()))


def perplexity(
    model: Transformer, tokenizer: TextTokenizer, documents: int = 1200
) -> tuple[int, float]:
    """Number of tokens, and exp of the mean negative log likelihood, of the held-out text."""
    assert isinstance(tokenizer, Tokenizer), tokenizer
    encode, device = Encoder(tokenizer), model.norm.weight.device
    texts = held_out_text(documents)
    total, tokens = 0.0, 0
    for i in range(0, len(texts), 50):
        data = rows(texts[i : i + 50], encode, tokens=1 << 30)
        positions = torch.cat([torch.arange(n, device=device) for n in data.counts])
        inputs = torch.from_numpy(data.inputs).to(device).long()
        with torch.inference_mode():
            logits = model.forward_flat(inputs, positions, Batch(data.counts, device=device))
            targets = torch.from_numpy(data.targets).to(device).long()
            loss = F.cross_entropy(logits, targets, reduction="none").cpu()
        told = torch.from_numpy(data.weights) > 0
        total, tokens = total + loss[told].double().sum().item(), tokens + int(told.sum())
    return tokens, math.exp(total / tokens)


def main(
    ckpt_dir: str = str(HERE),
    n_per_kind: int = 100,
    max_batch_size: int = 32,
    device: str | None = None,
    baseline: bool = True,
    show: int = 0,
) -> None:
    """Print the table. show: how many wrong answers of each kind to print after it."""
    llama = Llama.build(ckpt_dir, max_seq_len=2048, max_batch_size=max_batch_size, device=device)
    questions = held_out(n_per_kind)
    with progress("answering", len(ALL_KINDS), unit="kinds") as advance:
        given: dict[str, list[tuple[Question, str]]] = {}
        for kind in ALL_KINDS:
            asked = [q for q in questions if q.kind == kind]
            given[kind] = list(zip(asked, answers(llama, asked), strict=True))
            advance(1)
    nearest = NearestQuestion() if baseline else None
    totals = [0, 0, 0]
    print(f"{'kind':12} {'n':>5} {'model':>8} {'nearest question':>18}")
    for kind, pairs in given.items():
        right = sum(q.accepts(text) for q, text in pairs)
        like = sum(q.accepts(nearest.answer(q)) for q, _ in pairs) if nearest else 0
        totals = [totals[0] + len(pairs), totals[1] + right, totals[2] + like]
        print(_line(kind, len(pairs), right, like))
    print(_line("all", *totals))
    tokens, value = perplexity(llama.model, llama.tokenizer)
    print(f"perplexity of {tokens} held-out tokens: {value:.3f}")
    for pairs in given.values():
        wrong = [(q, text) for q, text in pairs if not q.accepts(text)]
        for q, text in wrong[:show]:
            asked_for = q.prompt if isinstance(q.prompt, str) else _asked(q.prompt)
            print(f"{q.kind}: {asked_for!r} -> {text!r}, not {q.answer!r}")


def _line(kind: str, n: int, right: int, like: int) -> str:
    return f"{kind:12} {n:5} {100 * right / n:7.1f}% {100 * like / n:17.1f}%"


if __name__ == "__main__":
    fire.Fire(main)
