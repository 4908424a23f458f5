"""Processes, devices and the layers that are cut across them.

The only file that reads torchrun's environment and the only one that imports fairscale. It knows no
model: layers get the sizes of this rank's part. The surprising thing: with one rank nothing here
exists; the layers are plain torch ones, and no process group, port or variable is needed.
"""

import contextlib
import functools
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale_groups
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel import mappings
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from llama.meeting import PATIENCE, Place, RankError, Watch, lost, meet

FOREVER = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """The part of a model that this process holds, and its line to the processes with the others.

    `rank` of `size` model-parallel ranks; `is_main` on the one process that speaks to the user;
    `control` a CPU group of these ranks for small messages, None where there is only one rank.
    """

    rank: int = 0
    size: int = 1
    is_main: bool = True
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    watch: Watch | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where ranks need each other: RankError, or the end, when another one is gone."""
        try:
            if self.watch:
                self.watch.waiting_since = time.monotonic()
            yield
        except RuntimeError as error:
            gone = isinstance(error, dist.DistError) or "peer" in str(error)
            if self.size > 1 and gone:
                raise RankError(lost(self.rank, self.size, str(error))) from error
            raise
        finally:
            if self.watch:
                self.watch.waiting_since = None

    def fail(self) -> None:
        """Let the others know that this rank gave a step up, which they cannot end without it."""
        if self.watch:
            self.watch.failed = True

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's `values` (equally many on each), in order of rank: one small collective.

        Waits for the others as long as they live.
        """
        if self.control is None:
            return [list(values)]
        mine = torch.tensor(list(values), dtype=torch.int64)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together():
            dist.all_gather(theirs, mine, group=self.control)
        return [t.tolist() for t in theirs]

    def tell(self, message: bytes = b"") -> bytes:
        """Rank 0's message, on every rank; what the others pass is not looked at.

        Two collectives, which wait for rank 0 as long as it lives.
        """
        return self.spread(message, self.exchange([len(message)])[0][0])

    def spread(self, message: bytes, size: int) -> bytes:
        """Rank 0's message of so many bytes, on every rank: one collective, none for no bytes."""
        if self.control is None or not size:
            return message
        held = bytearray(message if self.rank == 0 else size)
        with self.together():
            dist.broadcast(
                torch.frombuffer(held, dtype=torch.uint8), group=self.control, group_src=0
            )
        return bytes(held)

    def agree(self, problem: Exception | None, doing: str) -> None:
        """Raise on every rank if any has a `problem`: nobody waits for one that gave up."""
        failed = [r for r, (bad,) in enumerate(self.exchange([problem is not None])) if bad]
        if problem is not None:
            raise problem
        if failed:
            raise RankError(f"{doing} failed on rank {failed[0]}, whose own output says why")


ONE = Ranks()


def local_device(device: str | torch.device | None) -> torch.device:
    """The device of this process: as asked, else cuda, else mps, else cpu.

    A plain "cuda" means the GPU whose number is torchrun's LOCAL_RANK. Raises ValueError where
    there is no such GPU.
    """
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: use cuda, cuda:N, mps or cpu") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        number = _variable("LOCAL_RANK", 0) if device.index is None else None
        index = (number or 0) if device.index is None else device.index
        if index >= count:
            whose = "" if number is None else f" (LOCAL_RANK={number} stands in the environment)"
            raise ValueError(
                f"cuda:{index} is needed, and this machine shows {count} GPUs{whose}: start as "
                "many processes on it as it has GPUs, or use device='cpu'"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps': torch sees no Apple GPU here; use cpu")
    return device


def join(model_parallel_size: int | None, device: torch.device) -> Ranks:
    """Join the other processes of this run, if there are any, and say which part is ours.

    A process group that the caller made is used as it is. Raises ValueError, before any
    communication, where the number of processes does not fit `model_parallel_size` (None: all of
    them), or where torchrun's variables are left over in the environment, and RankError where the
    others do not come.
    """
    started = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if started else _variable("WORLD_SIZE", 1) or 1
    size = world if model_parallel_size is None else model_parallel_size
    if size < 1 or world % size:
        raise ValueError(
            f"model_parallel_size={size} with {world} process{'es' * (world > 1)}: start it with "
            f"`torchrun --nproc_per_node {max(size, 1)} your_script.py ...`, or leave "
            "model_parallel_size out to use all processes"
        )
    if world == 1:
        return ONE
    if not started:
        _meet(world, "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not fairscale_groups.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its plans
            fairscale_groups.initialize_model_parallel(size)
    current = fairscale_groups.get_model_parallel_world_size()
    if current != size:
        raise ValueError(
            f"model_parallel_size={size}: this process already runs a model cut into {current} "
            f"ranks, and one run has one cut; use {current}, or start another run"
        )
    return _lines(size, dist.group.WORLD)


def _variable(name: str, least: int) -> int | None:
    """The whole number in one of torchrun's variables, None without one."""
    text = os.environ.get(name, "")
    if not text.strip():
        return None
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(
            f"{name} is {text!r:.40} in the environment, and it must be a whole number from "
            f"{least} on: unset it, or start with torchrun, which sets it"
        )
    return number


def _meet(world: int, backend: str) -> None:
    """Make the process group of all ranks, where torchrun's variables say that they meet."""
    host = os.environ.get("MASTER_ADDR", "").strip()
    rank, port = _variable("RANK", 0), _variable("MASTER_PORT", 1)
    left = f"WORLD_SIZE={world} stands in the environment: unset it, or start with torchrun"
    if rank is None or port is None or not host:
        given = {"RANK": rank is not None, "MASTER_ADDR": host, "MASTER_PORT": port is not None}
        missing = [name for name, there in given.items() if not there]
        raise ValueError(f"{left}, which also sets {' and '.join(missing)}")
    if rank >= world or port > 65535:
        wrong = f"RANK={rank}" if rank >= world else f"MASTER_PORT={port}"
        raise ValueError(f"{left}; {wrong} cannot belong to it")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    hint = "all of them are started with the same command" if agent else left
    place = Place(rank, world, host, port, hint)
    store = PrefixStore("default_pg", meet(place, torchrun_listens=agent))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


@functools.lru_cache(maxsize=1)
def _lines(size: int, world: dist.ProcessGroup) -> Ranks:
    """The groups for control and watch, made once for a process group.

    Every process takes part in making every group, its own and the others'. A rank that waits for
    the next request may wait for days, so control does not time out.
    """
    control = beats = None
    for first in range(0, world.size(), size):
        members = range(first, first + size)
        groups = [
            dist.new_group(members, timeout=timeout, backend="gloo")
            for timeout in (FOREVER, PATIENCE)
        ]
        if world.rank() in members:
            control, beats = groups
    rank = fairscale_groups.get_model_parallel_rank()
    if size == 1:
        return Ranks(is_main=world.rank() == 0)
    watch = Watch(rank, size, beats)
    watch.start()
    return Ranks(rank, size, world.rank() == 0, control, watch)


class Linear(nn.Linear):
    """torch's layer without its random values: weights are loaded, or initialised by who trains."""

    def reset_parameters(self) -> None:
        pass


def float32_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K) in float32: (..., N), never rounded to their own dtypes.

    `out`: where it goes, without gradients. Also under autocast.
    """
    with _without_autocast(x.device.type):
        if x.dtype == weight.dtype == torch.float32:
            return F.linear(x, weight) if out is None else torch.mm(x, weight.t(), out=out)
        if x.dtype == weight.dtype == torch.float64:
            product = F.linear(x, weight).float()
            return product if out is None else out.copy_(product)
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            if out is None:
                out = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
            _product(x.flatten(0, -2), weight, out.view(-1, len(weight)))
            return out
        if x.dtype == weight.dtype:
            return _Product.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x.float(), weight.float())


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """torch.autocast set aside on devices of this type, where there is one that is on."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def float32_block(device: str) -> int:
    """How many numbers are made float32 at a time on a device of this type: on a CPU a product
    reads them out of a core's cache."""
    return 2**20 if device == "cpu" else 2**24


def _product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Into out (M, N) float32. NVIDIA's products of half precision can sum into it; elsewhere some
    rows of the weight at a time are made float32."""
    if x.is_cuda and torch.version.hip is None and x.dtype == weight.dtype:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
        return
    x = x.float()
    step = min(len(weight), max(1, float32_block(x.device.type) // weight.shape[1]))
    some = x.new_empty(step, weight.shape[1])
    for low in range(0, len(weight), step):
        part = weight[low : low + step]
        torch.mm(x, some[: len(part)].copy_(part).t(), out=out[:, low : low + len(part)])


class _Product(torch.autograd.Function):
    """`float32_product` of half precision, with the gradients of the product in that precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        return float32_product(x.detach(), weight.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


class OutputLinear(Linear):
    """The layer that makes logits, which are float32 from the product on."""

    def forward(self, x: Tensor) -> Tensor:
        return float32_product(x, self.weight)


class Embedding(nn.Embedding):
    """As above."""

    def reset_parameters(self) -> None:
        pass


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):  # type: ignore[misc]
    """fairscale's layer, told the size of this rank's part; its own constructor makes the full
    weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = None
        self.gather_output = False


class ColumnParallelOutput(ColumnParallelLinear):
    """`OutputLinear`, of whose rows each rank has a part: the logits of all, on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        return gathered(float32_product(mappings.copy_to_model_parallel_region(x), self.weight))


class RowParallelLinear(fairscale_layers.RowParallelLinear):  # type: ignore[misc]
    """As above: y = sum over ranks of W_r x_r."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = None
        self.input_is_parallel = True


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):  # type: ignore[misc]
    """As above: rank r holds rows r*n to (r+1)*n."""

    def __init__(self, rows: int, dim: int, rank: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.vocab_start_index, self.vocab_end_index = rank * rows, (rank + 1) * rows
        self.num_embeddings_per_partition = rows
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False


def column_linear(in_features: int, out_features: int, ranks: Ranks) -> nn.Module:
    """A linear layer whose rows are spread over the ranks, `out_features` of them here."""
    if ranks.size == 1:
        return Linear(in_features, out_features, bias=False)
    return ColumnParallelLinear(in_features, out_features)


def output_linear(in_features: int, out_features: int, ranks: Ranks) -> nn.Module:
    """The layer that makes logits; its rows are spread over the ranks, `out_features` of them
    here."""
    if ranks.size == 1:
        return OutputLinear(in_features, out_features, bias=False)
    return ColumnParallelOutput(in_features, out_features)


def row_linear(in_features: int, out_features: int, ranks: Ranks) -> nn.Module:
    """A linear layer whose columns are spread over the ranks, `in_features` of them here."""
    if ranks.size == 1:
        return Linear(in_features, out_features, bias=False)
    return RowParallelLinear(in_features, out_features)


def embedding(rows: int, dim: int, ranks: Ranks) -> nn.Module:
    """A table whose rows are spread over the ranks, `rows` of them here."""
    if ranks.size == 1:
        return Embedding(rows, dim)
    return VocabParallelEmbedding(rows, dim, ranks.rank)


def summed(parts: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank: what follows a layer cut by columns."""
    return mappings.reduce_from_model_parallel_region(parts)  # type: ignore[no-any-return]


def gathered(parts: Tensor) -> Tensor:
    """Every rank's tensor side by side, along the last dimension, on every rank."""
    return mappings.gather_from_model_parallel_region(parts)  # type: ignore[no-any-return]
