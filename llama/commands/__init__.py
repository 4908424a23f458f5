"""The commands of `python -m llama`: one file a command."""
