"""What test_ranks.py runs in each process: `ranks_worker.py MODE DEVICE OUT_DIR ...`, see there.

`ranks_worker.py forked RANKS PORT MODE DEVICE OUT_DIR ...` starts the ranks itself, as forks of a
process that has imported torch for all of them."""

import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import torch

from llama import Llama, SamplingParams
from llama.parallel import ONE

DEVICE = "cpu"
PROMPTS = [[256, 72, 101, 108], [256, *range(40)], [7]]


def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def held(model):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(s.nbytes() for s in storages.values())


def answers(llama):
    greedy = llama.generate(PROMPTS, 5, temperature=0, logprobs=True)
    sampled = llama.generate(PROMPTS, 5, temperature=1.0, top_p=0.95, seed=11)
    return {"greedy": greedy, "sampled": sampled[0]}


def build(folder, tokenizer, **options):
    limits = {"max_seq_len": 128, "max_batch_size": 2, "device": DEVICE}
    return Llama.build(folder, tokenizer, **{**limits, **options})


def law(out, tokenizer, *folders):
    """Every folder's answers, and what this rank holds; random streams differ between ranks."""
    rank = int(os.environ["RANK"])
    torch.rand(rank)
    random.seed(rank)
    results = {}
    for folder in folders:
        before = anonymous_memory()
        llama = build(folder, tokenizer)
        built = anonymous_memory() - before
        results[folder] = {
            **answers(llama),
            "held": held(llama.model),
            "memory": built,
            "local_rank": int(os.environ["LOCAL_RANK"]),
            "main": llama.is_main,
        }
    Path(out, f"rank{rank}.json").write_text(json.dumps(results))


def quantized(out, tokenizer, folder, recipes):
    """Answers with weights quantized while loading, and from folders that were before."""
    rank, recipes = os.environ["RANK"], json.loads(recipes)
    plain = Path(folder, "plain")
    results = {
        "loading": [answers(build(plain, tokenizer, quantize=recipe)) for recipe in recipes],
        "stored": [
            answers(build(Path(folder, f"packed{at}"), tokenizer)) for at in range(len(recipes))
        ],
    }
    Path(out, f"rank{rank}.json").write_text(json.dumps(results))


def mistakes(out, tokenizer, folder):
    """Bad input on all ranks, then good; then ranks that are asked different things."""
    llama = build(folder, tokenizer)
    seen = []
    for call in (
        lambda: llama.generate([[]], 4),
        lambda: llama.generate([[1] * 200], 4),
        lambda: llama.generate([[1]], 4, temperature=-1),
        lambda: build(folder, tokenizer, model_parallel_size=3),
        lambda: build(folder, tokenizer, model_parallel_size=1),
        lambda: build(folder, tokenizer, max_seq_len=10**9),
    ):
        try:
            call()
        except ValueError as error:
            seen.append(str(error))
    seen.append(llama.generate([[1, 2, 3]], 4, temperature=0)[0])
    try:
        llama.generate([[1, 2, 3]], 40, temperature=1.0, seed=int(os.environ["RANK"]))
    except RuntimeError as error:
        seen.append(str(error))
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


def endless(out, tokenizer, folder):
    """Generate until somebody ends it; tells when it has begun."""
    llama = build(folder, tokenizer, max_seq_len=4096)
    Path(out, f"begun{os.environ['RANK']}").touch()
    while True:
        llama.generate(PROMPTS, 2000, temperature=0)


def waiting(out, tokenizer, folder):
    """Rank 0 calls generate, rank 1 does not: rank 0 waits as a server's followers do."""
    llama = build(folder, tokenizer)
    Path(out, f"begun{os.environ['RANK']}").touch()
    if os.environ["RANK"] != "0":
        time.sleep(600)
    llama.generate(PROMPTS, 4)


def led(out, tokenizer, folder):
    """Rank 0 alone is told what to do, and then nothing more; the other one follows."""
    llama = build(folder, tokenizer)
    rank = int(os.environ["RANK"])
    if rank:
        Path(out, "begun1").touch()
        llama.engine.follow()
    request = llama.engine.submit(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8))
    while request.finish_reason is None:
        llama.engine.step()
    Path(out, "tokens.json").write_text(json.dumps(request.tokens))
    Path(out, "begun0").touch()
    time.sleep(600)


def lone_error(out, tokenizer, folder):
    """Rank 1 runs out of memory in the middle of a step, catches that, and asks again."""
    llama = build(folder, tokenizer)
    rank, calls = int(os.environ["RANK"]), []
    layer = llama.model.layers[1].feed_forward
    forward = layer.forward

    def broken(x):
        calls.append(x)
        if rank == 1 and len(calls) == 3:
            raise torch.OutOfMemoryError("rank 1 alone has no memory left")
        return forward(x)

    layer.forward = broken
    Path(out, f"begun{rank}").touch()
    seen = []
    for _ in range(2):
        try:
            llama.generate(PROMPTS, 8, temperature=0)
        except RuntimeError as error:
            seen.append(f"{type(error).__name__}: {error}")
    Path(out, f"rank{rank}.json").write_text(json.dumps(seen))
    time.sleep(20)  # as a program does that goes on with other things


def forked(ranks, port, run):
    """Run a function on so many ranks; whether it came to its end on all of them."""
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return not any(statuses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert ONE.size == 1
    ranks, port = 1, ""
    if sys.argv[1] == "forked":
        ranks, port = int(sys.argv[2]), sys.argv[3]
        del sys.argv[1:4]
    mode, DEVICE, *given = sys.argv[1:]
    if ranks == 1:
        globals()[mode](*given)
    elif not forked(ranks, port, lambda: globals()[mode](*given)):
        sys.exit("a rank failed, and has said why")
