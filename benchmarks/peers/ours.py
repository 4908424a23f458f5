"""The ragged prompts through this library's engine; the rest of ours is `python -m llama bench`."""

import torch
from workload import Results, ragged_prompts, room, seconds, task

from llama.checkpoint import random_checkpoint
from llama.engine import Engine
from llama.loading import load
from llama.loading.runners import runner_for
from llama.loading.settings import CHUNK_ROWS, as_dtype
from llama.model import ModelArgs
from llama.parallel import ONE
from llama.sampling import SamplingParams


def main() -> None:
    given = task()
    device, longest = torch.device(given["device"]), room(given)
    prompts = ragged_prompts(given["vocab_size"], given["longest"])
    args = ModelArgs(**given["args"], vocab_size=given["vocab_size"], context_length=longest)
    source = random_checkpoint(args, dtype=as_dtype(given["dtype"]), device=device)
    model = load(source, ranks=ONE, device=device)
    runner = runner_for(model, max_batch_size=len(prompts), max_seq_len=longest)
    engine = Engine(runner, chunk=CHUNK_ROWS)
    params = SamplingParams(temperature=0, max_tokens=given["new_tokens"])

    def generate(prompts: list[list[int]]) -> None:
        requests = [engine.submit(prompt, params) for prompt in prompts]
        while not engine.idle:
            engine.step()
        assert all(len(request.tokens) == given["new_tokens"] for request in requests)

    generate([prompt[:16] for prompt in prompts])
    results = Results(given)
    results.ragged(seconds(lambda: generate(prompts), given["device"]))
    results.memory()


if __name__ == "__main__":
    main()
