"""Random weights of any shape, for tests and for measuring models that are not on this disk.

Every value is a function of the seed, the tensor's name and where it lies, made when it is read, so
a 70B takes no memory until it is placed, and a rank can make its own rows. Knows no file. The
surprising thing: the values belong to the kind of device that makes them; a GPU draws others than a
CPU.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from llama.args import ModelArgs
from llama.checkpoint.source import Checkpoint, LazyTensor, Part
from llama.names import shapes

_BLOCK = 2**24  # numbers that are drawn at a time, each such block of rows by its own generator


class _Random(LazyTensor):
    """A tensor of normal numbers of standard deviation `std` around `mean`, drawn in float32."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        mean: float,
        std: float,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name, self.mean, self.std, self.seed = name, mean, std, seed
        self.shape, self.dtype, self.device = shape, dtype, device

    def parts(self, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Part]:
        stop = start + self.range_shape(dim, start, stop)[dim]
        rows = max(1, _BLOCK // math.prod(self.shape[1:]))
        for block, first in enumerate(range(0, self.shape[0], rows)):
            last = min(first + rows, self.shape[0])
            low, high = (max(first, start), min(last, stop)) if dim == 0 else (first, last)
            if low >= high:
                continue
            tensor = self._draw(block, last - first)[low - first : high - first]
            if dim == 0:
                yield Part(0, low - start, tensor)
            else:
                yield Part(0, first, tensor.narrow(dim, start, stop - start))

    def _draw(self, block: int, rows: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed} {self.name} {block}".encode()).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        numbers = torch.randn(rows, *self.shape[1:], generator=generator, device=self.device)
        return numbers.mul_(self.std).add_(self.mean).to(self.dtype)


def random_checkpoint(
    args: ModelArgs,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Random weights for `args`, made on `device`, such that states and logits have about unit
    scale.

    Standard deviations are 1 / sqrt(inputs); what is added to the residual stream also by 1 /
    sqrt(2 n_layers), so that depth does not matter. The same seed gives the same values on the same
    kind of device, in every dtype up to its rounding.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, shape in shapes(args).items():
        if name == "output.weight" and args.tied:
            continue
        mean, std = 0.0, 1 / math.sqrt(shape[-1])
        if len(shape) == 1:
            mean, std = 1.0, 0.1
        elif name == "tok_embeddings.weight":
            std = std if args.tied else 1.0
        elif name.endswith((".wo.weight", ".w2.weight")):
            std /= math.sqrt(2 * args.n_layers)
        tensors[name] = _Random(name, shape, mean, std, seed, dtype, torch.device(device))
    return Checkpoint(args=args, tensors=tensors, dtype=dtype)
