"""`verify`: the files of a folder against its checklist, without torch."""

import sys

from llama.commands.common import DEMO
from llama.files.checklist import verify as find_problems


def verify(ckpt_dir: str = DEMO) -> None:
    """Compare the files of a folder with its checklist.chk, and name those that differ.

    Meta's downloads have a checklist, and so do folders that convert, reshard and quantize write.
    Ends with status 1 where a file differs.

        python -m llama verify Meta-Llama-3-8B-Instruct

    Args:
        ckpt_dir: folder with checklist.chk and the files it lists.
    """
    problems = find_problems(ckpt_dir)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{ckpt_dir}: all files are what the checklist says")
