"""Attention by kernels: of sequences that bring one token (decode), and of prompts (prefill)."""
