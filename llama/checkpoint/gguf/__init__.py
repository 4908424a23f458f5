"""GGUF, the format of llama.cpp: one file with a model and its tokenizer, read and written."""
