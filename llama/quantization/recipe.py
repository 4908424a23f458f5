"""Recipes: which matrix of a model is packed how, from a name or from parts of the model.

Knows names of tensors and shapes; touches no number. The surprising thing: "int4" keeps the output
matrix and the embeddings in int8. On the demo int4 in the output adds 70 % to what int4 in all
layers together costs, and in an 8B it would save 4 % of the bytes. With "int8" and "fp8" embeddings
stay as they are unless asked for: a token reads one row.

A recipe is one of NAMES; or an object of parts and formats:

    {"layers.0-7,24-31": "int8", "layers.8-23": "int4", "output": "int8", "embedding": "int8"}

Parts are "layers" (all of them), "layers." with numbers and ranges, "output" and "embedding". What
no part names stays unquantized, as norms always do. Formats are int8, fp8, int4 (in groups of 64),
int4-32 and int4-128. Where output and embedding are one matrix (tied), "output" speaks of it.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping

from llama.args import ModelArgs
from llama.files.strict_json import parse_object
from llama.names import shapes
from llama.quantization.packed import Format, local_format

Recipe = str | Mapping[str, str]

FORMATS = {
    "int8": Format("int8"),
    "fp8": Format("fp8"),
    "int4": Format("int4", 64),
    "int4-32": Format("int4", 32),
    "int4-128": Format("int4", 128),
}
NAMES = (*FORMATS, "mixed")
_EXAMPLE = '{"layers.0-7": "int8", "output": "int8"}'
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_MATRIX = re.compile(r"layers\.(\d+)\.(attention|feed_forward)\.w\w\.weight")


def parse_recipe(recipe: Recipe) -> str | dict[str, str]:
    """Take a recipe as it was given, or from JSON; ValueError for anything else.

    Whether its layers are those of a model is not asked.
    """
    given: object = recipe
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = parse_object(given)
        except ValueError as error:
            raise ValueError(
                f"quantize={given!r:.80}: is not the JSON it should be: {error}"
            ) from None
    if isinstance(given, str) and given in NAMES:
        return given
    if isinstance(given, str) or not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"quantize={given!r:.80}: use one of {', '.join(NAMES)}, or parts as in {_EXAMPLE}"
        )
    for part, format in given.items():
        if not isinstance(format, str) or format not in FORMATS:
            raise ValueError(
                f"quantize: {part!r:.40} is to be {format!r:.40}; use one of {', '.join(FORMATS)}"
            )
        if not isinstance(part, str) or not re.fullmatch(_PART, part):
            raise ValueError(
                f"quantize: {part!r:.80} is no part of a model; parts are layers, "
                "layers.0-7,24-31, output and embedding"
            )
    return dict(given)


_PART = r"output|embedding|layers(\.\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?"


def formats_of(recipe: Recipe, args: ModelArgs) -> dict[str, Format]:
    """The format of each matrix that `recipe` quantizes, by its name.

    ValueError where a recipe does not fit the model. Groups of int4 that do not divide the inputs
    of a matrix are the largest smaller ones that do.
    """
    parts = parse_recipe(recipe)
    if isinstance(parts, str):
        parts = _named(parts, args.n_layers)
    layers: dict[int, str] = {}
    for part, format in parts.items():
        if part.startswith("layers"):
            for layer in _layers(part, args.n_layers):
                if layer in layers:
                    raise ValueError(f"quantize: layer {layer} stands in several parts")
                layers[layer] = format
    if args.tied and parts.get("embedding", parts.get("output")) != parts.get("output"):
        raise ValueError(
            "quantize: in this model output and embedding are one matrix; leave embedding out"
        )
    whole = {_EMBEDDING: parts.get("output" if args.tied else "embedding"),
             _OUTPUT: None if args.tied else parts.get("output")}  # fmt: skip
    formats = {}
    for name, shape in shapes(args).items():
        match = _MATRIX.fullmatch(name)
        chosen = layers.get(int(match[1])) if match else whole.get(name)
        if chosen is not None:
            formats[name] = _fitted(name, FORMATS[chosen], shape[-1])
    return formats


def _named(name: str, n_layers: int) -> dict[str, str]:
    """The parts of the recipe that a name stands for."""
    if name != "mixed":
        if name.startswith("int4"):
            return {"layers": name, "output": "int8", "embedding": "int8"}
        return {"layers": name, "output": name}
    quarter = max(1, n_layers // 4)
    finer = sorted({*range(quarter), *range(n_layers - quarter, n_layers)})
    rest = [str(layer) for layer in range(n_layers) if layer not in finer]
    parts = {"layers." + ",".join(map(str, finer)): "int8", "output": "int8"}
    return parts | ({"layers." + ",".join(rest): "int4"} if rest else {})


def _layers(part: str, n_layers: int) -> Iterator[int]:
    if part == "layers":
        yield from range(n_layers)
        return
    for piece in part.removeprefix("layers.").split(","):
        first, _, last = piece.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= n_layers:
            raise ValueError(
                f"quantize: {part!r:.80} has {piece!r}; this model's layers are 0-{n_layers - 1}"
            )
        yield from numbers


def _fitted(name: str, format: Format, columns: int) -> Format:
    fitted = format.fitted(columns)
    if fitted is None:
        raise ValueError(
            f"quantize: {name} has {columns} inputs, which are no multiple of 16, so it cannot be "
            f"{format}; use int8 or fp8"
        )
    return fitted


def check_ranks(formats: Mapping[str, Format], args: ModelArgs, size: int) -> None:
    """ValueError, naming numbers that work, where `size` ranks would cut a group too small."""

    def odd(size: int) -> str | None:
        return next((name for name, format in formats.items()
                     if local_format(name, format, args, size) is None), None)  # fmt: skip

    name = odd(size)
    if name is not None:
        works = [n for n in args.rank_counts() if odd(n) is None]
        raise ValueError(
            f"{size} ranks would cut the groups of {name} ({formats[name]}) below 16 inputs; these "
            f"numbers of ranks work: {works}"
        )


def described(recipe: Recipe) -> str:
    """A recipe as it is typed on a command line."""
    parsed = parse_recipe(recipe)
    return parsed if isinstance(parsed, str) else json.dumps(parsed)


def recipes_for(args: ModelArgs) -> dict[str, dict[str, Format]]:
    """The formats of the recipes that may be proposed for a model, the finest first."""
    found = {}
    for name in ("int8", "int4"):
        with contextlib.suppress(ValueError):  # inputs that no group divides
            found[name] = formats_of(name, args)
    return found
