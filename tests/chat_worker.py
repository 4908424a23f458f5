"""What test_chat.py runs on a pseudo-terminal.

`chat_worker.py [plain] alphabet FOLDER`: a chat with a model that says the alphabet;
`chat_worker.py [plain] COMMAND ...`: as `python -m llama` would. `plain`: without the packages of
the extra `cli`."""

import sys
import time
from pathlib import Path

from conftest import Scripted, write_tokenizer

from llama import Llama, SamplingParams, Tokenizer
from llama.commands import main
from llama.commands.chat import talk


def next_letter(token, position):
    time.sleep(0.004)
    return 97 + (token - 96) % 26 if 97 <= token <= 122 else 97


def alphabet(folder):
    tokenizer = Tokenizer(str(write_tokenizer(Path(folder) / "tokenizer.model")))
    llama = Llama(Scripted(next_letter, max_seq_len=400, max_batch_size=1), tokenizer)
    talk(llama, SamplingParams(temperature=0, max_tokens=60), hello="Hello.")


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        sys.modules.update(prompt_toolkit=None, rich=None, tqdm=None)
        del sys.argv[1]
    if sys.argv[1] == "alphabet":
        alphabet(sys.argv[2])
    else:
        main()
