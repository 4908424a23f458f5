"""Chat with an Instruct model. From a folder of weights to answers:

torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_dir llama/demo
"""

from llama.terminal.lines import ctrl_c_ends

with ctrl_c_ends(__name__ == "__main__"):  # also while torch is imported
    from llama import Dialog, Llama
    from llama.generation import check_sampling
    from llama.terminal import arguments

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "Hello! How are you?"}],
    [{"role": "user", "content": "What is 17 + 25?"}],
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And Japan?"},
    ],
    [
        {"role": "system", "content": "Answer like a pirate."},
        {"role": "user", "content": "What is the opposite of hot?"},
    ],
    [
        {"role": "user", "content": "Hello! My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "Can you spell umbrella?"},
        {"role": "assistant", "content": "u-m-b-r-e-l-l-a"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Write a haiku about the sea."}],
]


def main(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    seed: int = 9,
    quantize: str | None = None,
) -> None:
    """Answer a few dialogs and print them.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's, or a .gguf file.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        temperature: 0 takes the most probable token, more is more varied.
        top_p: the share of probability that tokens are sampled from.
        max_seq_len: tokens of a dialog, its answer included.
        max_batch_size: dialogs that run at one time; more than that wait in line.
        max_gen_len: tokens of an answer at most; by default all that max_seq_len leaves.
        seed: another number gives other samples.
        quantize: int8, fp8, int4 or mixed: fewer bytes for the weights, almost the same answers.
    """
    check_sampling(temperature, top_p, max_gen_len)  # before anything is loaded
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, quantize=quantize
    )
    results = llama.chat_completion(DIALOGS, temperature, top_p, max_gen_len)
    if llama.is_main:
        for dialog, result in zip(DIALOGS, results, strict=True):
            for message in [*dialog, result["generation"]]:
                print(f"{message['role']}: {message['content']}")
            print()


if __name__ == "__main__":
    arguments.run(main)
