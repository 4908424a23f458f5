"""The commands of `python -m llama`, and of `llama` where it is installed: one file a command.

Lists them by what they are for, with what their help pages share. Imports none of them: that is
done when one is chosen, so that a list, a version or a wrong word does not wait for torch.
"""

import sys
from pathlib import Path

from llama import __version__
from llama.commands.common import DEMO, OPTIONS, is_first_process
from llama.terminal.arguments import run
from llama.terminal.table import Entry, Table

_ENDING = """\
CKPT_DIR, a folder of weights or a .gguf file, comes first in every command, or anywhere as
--ckpt_dir. COMMAND --help says more; --debug shows where an error comes from; --version."""

COMMANDS = Table(
    {
        "chat": Entry(
            "talk",
            "llama.commands.chat:chat",
            "Talk with a model in the terminal, or line by line through a pipe.",
        ),
        "complete": Entry(
            "talk",
            "llama.commands.complete:complete",
            "Continue a text, which is given here, in a file, or on standard input.",
        ),
        "info": Entry(
            "look",
            "llama.commands.info:info",
            "Say what lies in a folder of weights, and what running it would take.",
            alone=True,
        ),
        "tokenize": Entry(
            "look",
            "llama.commands.tokenize:tokenize",
            "Show the token ids of a text, or the text of token ids.",
            alone=True,
        ),
        "verify": Entry(
            "look",
            "llama.commands.verify:verify",
            "Compare the files of a folder with its checklist.chk, and name those that differ.",
            alone=True,
        ),
        "perplexity": Entry(
            "look",
            "llama.commands.perplexity:perplexity",
            "Say how well a model expects a text.",
        ),
        "compare": Entry(
            "look",
            "llama.commands.compare:compare",
            "Say what quantization costs: models beside each other, on one text.",
        ),
        "bench": Entry(
            "look",
            "llama.commands.bench:bench",
            "Measure how fast a model runs here, as a share of what this machine can do.",
        ),
        "download": Entry(
            "make",
            "llama.commands.download:download",
            "Download Llama weights through the signed URL that Meta sends by e-mail.",
            alone=True,
        ),
        "convert": Entry(
            "make",
            "llama.commands.convert:convert",
            "Write a model, and its tokenizer, in another format.",
            old={"src": "ckpt_dir", "format": "to", "type": "quantize", "f": "to", "t": "quantize"},
            alone=True,
        ),
        "reshard": Entry(
            "make",
            "llama.commands.convert:reshard",
            "Write a model in another number of files, in Meta's format.",
            old={"src": "ckpt_dir"},
            alone=True,
        ),
        "quantize": Entry(
            "make",
            "llama.commands.convert:quantize",
            "Write a model with quantized weights, which then load as they are.",
            old={"src": "ckpt_dir", "s": "ckpt_dir"},
            alone=True,
        ),
    },
    is_first=is_first_process,
    version=f"llama {__version__}",
    options=OPTIONS,
    defaults={DEMO: "the demo that comes along"},
    ending=_ENDING,
)


def main() -> None:
    """Run the command line of this process."""
    called = Path(sys.argv[0]).name
    run(COMMANDS, "python -m llama" if called == "__main__.py" else called)
