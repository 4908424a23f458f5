"""The same measurements on Meta's own model code; run by speed.py with that checkout on the path.

Needs one NVIDIA GPU. Its `llama` package is theirs, so nothing of this library can be imported
here.
"""

import json
import os
import socket
import statistics
import sys
import time

import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel

from llama.model import ModelArgs, Transformer  # theirs


def main() -> None:
    task = json.loads(sys.argv[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda")
    rows, lengths = task["rows"], task["lengths"]
    model = Transformer(
        ModelArgs(**task["args"], vocab_size=128256, max_batch_size=max(rows), max_seq_len=8192)
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    results = {}
    with torch.inference_mode():
        for n in rows:
            model.forward(torch.randint(0, 128000, (n, 128)), 0)
            times = []
            for step in range(68):
                torch.cuda.synchronize()
                start = time.perf_counter()
                logits = model.forward(torch.randint(0, 128000, (n, 1)), 128 + step)
                logits[:, -1].argmax(-1).tolist()
                times.append(time.perf_counter() - start)
            results[f"decode {n}, ms a step"] = 1e3 * statistics.median(times[4:])
        for n in lengths:
            times = []
            for _ in range(3):
                tokens = torch.randint(0, 128000, (1, n))
                torch.cuda.synchronize()
                start = time.perf_counter()
                try:
                    model.forward(tokens, 0)[:, -1].argmax(-1).tolist()
                except torch.cuda.OutOfMemoryError:
                    break
                times.append(time.perf_counter() - start)
            if times:
                results[f"prefill {n}, ms"] = 1e3 * min(times)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
