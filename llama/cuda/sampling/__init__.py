"""Sampling by kernels: the lean step, and the full one with filters, penalties and logprobs."""
