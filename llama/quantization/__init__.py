"""int8, int4 and fp8 weights: made, run plainly, written and loaded.

Knows linear layers and tables, not the Transformer, and no GPU's kernels. The surprising thing: it
reads no files. What packed bytes mean is checkpoint/packed.py's, as for any format on disk; here
they are made, and put to work.
"""

from llama.quantization.folder import write_quantized
from llama.quantization.formats import quantize
from llama.quantization.linear import QuantizedEmbedding, QuantizedLinear
from llama.quantization.placing import load
from llama.quantization.recipe import (
    NAMES,
    Recipe,
    check_ranks,
    described,
    formats_of,
    parse_recipe,
    recipes_for,
)

__all__ = [
    "NAMES",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Recipe",
    "check_ranks",
    "described",
    "formats_of",
    "load",
    "parse_recipe",
    "quantize",
    "recipes_for",
    "write_quantized",
]
