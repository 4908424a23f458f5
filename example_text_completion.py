"""Let a model continue texts. From a folder of weights to completions:

torchrun --nproc_per_node 1 example_text_completion.py --ckpt_dir llama/demo
"""

from llama.terminal.lines import ctrl_c_ends

with ctrl_c_ends(__name__ == "__main__"):  # also while torch is imported
    from llama import Llama
    from llama.generation import check_sampling
    from llama.terminal import arguments

PROMPTS = [
    "The capital of Italy is",
    "Monday, Tuesday, Wednesday,",
    "Counting from 3 to 12:",
    # a task shown by examples
    "hot => cold\nbig => small\nearly => late\nopen =>",
    "A haiku about winter:\n\n",
]


def main(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 4,
    max_gen_len: int | None = 32,
    seed: int = 9,
    quantize: str | None = None,
) -> None:
    """Continue a few texts and print them.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's, or a .gguf file.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        temperature: 0 takes the most probable token, more is more varied.
        top_p: the share of probability that tokens are sampled from.
        max_seq_len: tokens of a text, its continuation included.
        max_batch_size: texts that run at one time; more than that wait in line.
        max_gen_len: tokens of a continuation at most; None for all that max_seq_len leaves.
        seed: another number gives other samples.
        quantize: int8, fp8, int4 or mixed: fewer bytes for the weights, almost the same answers.
    """
    check_sampling(temperature, top_p, max_gen_len)  # before anything is loaded
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, quantize=quantize
    )
    results = llama.text_completion(PROMPTS, temperature, top_p, max_gen_len)
    if llama.is_main:
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(f"{prompt.strip()}\n> {result['generation'].strip()}\n")


if __name__ == "__main__":
    arguments.run(main)
