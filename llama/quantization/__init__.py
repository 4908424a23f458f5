"""int8, int4 and fp8 weights: what their bytes mean, how numbers become them, layers that compute.

Knows linear layers and tables, not the Transformer, and no GPU's kernels and no file: a packed
matrix is the same on disk, on a CPU and on a GPU.
"""

from llama.quantization.linear import QuantizedEmbedding, QuantizedLinear
from llama.quantization.recipe import (
    NAMES,
    Recipe,
    check_ranks,
    described,
    formats_of,
    parse_recipe,
    recipes_for,
)
from llama.quantization.rounding import quantize

__all__ = [
    "NAMES",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Recipe",
    "check_ranks",
    "described",
    "formats_of",
    "parse_recipe",
    "quantize",
    "recipes_for",
]
