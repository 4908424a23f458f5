"""The same work on transformers' LlamaForCausalLM, random weights made on the device.

Eager, the loop is written out, which spares it the overhead of its own `generate`. With compile in
the task, decode is its `generate` with a static cache, which it then compiles itself; the time of a
step is the difference between a long and a short answer.
"""

import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from workload import WARM, Results, median_seconds, prompt, ragged_prompts, room, seconds, task


def build(given: dict) -> LlamaForCausalLM:
    shape = given["config"]
    config = LlamaConfig(
        vocab_size=given["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden_dim"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=max(8192, room(given)),
        rope_theta=500000.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(getattr(torch, given["dtype"]))
    with torch.device(given["device"]):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def answer(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int, **options: object) -> None:
    out = model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                         do_sample=False, **options)  # fmt: skip
    assert out.shape[1] == ids.shape[1] + new_tokens


def decode_eager(model: LlamaForCausalLM, ids: torch.Tensor, given: dict) -> float:
    out = model(ids, use_cache=True, logits_to_keep=1)
    past, last, times = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True), []
    for _ in range(WARM + given["steps"]):

        def one(past: object = past, last: torch.Tensor = last) -> None:
            out = model(last, past_key_values=past, use_cache=True)
            out.logits[:, -1].argmax(-1).tolist()

        times.append(seconds(one, given["device"]))
    return statistics.median(times[WARM:])


def decode_static(
    model: LlamaForCausalLM, ids: torch.Tensor, given: dict, results: Results
) -> float:
    device, short, long = given["device"], WARM, WARM + given["steps"]

    def of(new_tokens: int) -> float:
        work = lambda: answer(model, ids, new_tokens, cache_implementation="static")  # noqa: E731
        return seconds(work, device)

    results.compiling(of(long))  # the longest first: it keeps a cache of that size
    of(short)
    return (min(of(long) for _ in range(3)) - min(of(short) for _ in range(3))) / (long - short)


def main() -> None:
    given = task()
    vocab, device = given["vocab_size"], given["device"]
    model, results = build(given), Results(given)
    with torch.inference_mode():
        for rows in given["rows"]:
            ids = torch.tensor([prompt(given["context"], vocab, seed) for seed in range(rows)])
            ids = ids.to(device)
            if given["compile"]:
                results.decode(rows, decode_static(model, ids, given, results))
            else:
                results.decode(rows, decode_eager(model, ids, given))
        for length in [] if given["compile"] else given["lengths"]:
            ids = torch.tensor([prompt(length, vocab, 0)]).to(device)
            first = lambda ids=ids: model(ids, logits_to_keep=1).logits.argmax(-1).tolist()  # noqa: E731
            results.prefill(length, median_seconds(first, device))
        if not given["compile"]:
            prompts = ragged_prompts(vocab, given["longest"])
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts]).to(device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            every = dict(attention_mask=mask.to(device))
            answer(model, ids[:, -8:], 4, attention_mask=mask[:, -8:].to(device))
            results.ragged(
                seconds(lambda: answer(model, ids, given["new_tokens"], **every), device)
            )
        results.memory()


if __name__ == "__main__":
    main()
