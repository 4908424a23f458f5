"""`python -m llama COMMAND ...`: the commands are in `llama/commands/`, one file each."""

from llama.terminal.lines import ctrl_c_ends

with ctrl_c_ends(__name__ == "__main__"):
    from llama.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]

if __name__ == "__main__":
    main()
