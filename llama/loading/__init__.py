"""One way in for weights: `prepare` says what will be run, `load` puts it in memory.

Opening, adapters, limits, dtype, formats, ranks and the memory plan are done here, once, for
whoever wants a model. The surprising thing: whatever is wrong is said before anything is allocated,
and what goes wrong on one rank only is said by all of them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama.args import RopeScaling
from llama.checkpoint import Checkpoint, merge_adapter, open_checkpoint
from llama.checkpoint.hf.adapter import Merged
from llama.checkpoint.quantized.read import PackedTensor
from llama.loading.memory import free_memory
from llama.loading.place import Copier, Place
from llama.loading.plan import Plan, check, check_memory, is_mapped, make_plan
from llama.loading.settings import as_dtype, check_vocabulary, with_limits
from llama.loading.staging import Stager
from llama.model import Transformer
from llama.names import groups
from llama.parallel import Ranks, join, local_device
from llama.quantization.packed import Format
from llama.quantization.recipe import Recipe, check_ranks, formats_of
from llama.terminal.progress import progress
from llama.tokenizer.protocols import TextTokenizer

__all__ = [
    "Plan",
    "Prepared",
    "Recipe",
    "check",
    "check_memory",
    "free_memory",
    "load",
    "make_plan",
    "prepare",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checkpoint with all that was decided about running it, and none of its weights read.

    The checkpoint's args hold the limits of the run; `formats` are those of the matrices that will
    be packed, `dtype` that of all else, of activations and of the cache.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    formats: Mapping[str, Format]
    kernels: bool

    def open_tokenizer(self, path: str | Path | None = None) -> TextTokenizer:
        """The tokenizer at `path`, or the checkpoint's own, held to the model's vocabulary.

        Raises FileNotFoundError where there is none, ValueError where it belongs to another model.
        """
        checkpoint = self.checkpoint
        tokenizer = checkpoint.open_tokenizer(path)
        if tokenizer is None:
            raise FileNotFoundError(f"no tokenizer.model in {checkpoint.path}; give tokenizer_path")
        named = path or checkpoint.tokenizer_path or checkpoint.path
        check_vocabulary(tokenizer, checkpoint.args, named)
        tokenizer.limit(checkpoint.args.vocab_size)
        return tokenizer

    def plan(self, ranks: Ranks) -> Plan:
        """What one of `ranks` needs of its device. Raises ValueError where that is not free, or
        where the model cannot be cut so."""
        check_ranks(self.formats, self.checkpoint.args, ranks.size)
        return check_memory(
            self.checkpoint, ranks, self.device, self.dtype, self.formats, self.kernels
        )

    def load(
        self, model_parallel_size: int | None = None, *, show_progress: bool = True
    ) -> Transformer:
        """This rank's part of the model, once all ranks are there and have memory for theirs.

        model_parallel_size: how many share the model; None: all that torchrun started. The progress
        of the first is shown. Raises ValueError where the model cannot be cut so or memory does not
        suffice, on every rank, whichever of them found it.
        """
        ranks = join(model_parallel_size, self.device)
        problem = None
        try:
            self.plan(ranks)
            model = load(
                self.checkpoint,
                ranks=ranks,
                device=self.device,
                dtype=self.dtype,
                formats=self.formats,
                show_progress=show_progress and ranks.is_main,
            )
        except Exception as error:
            problem = error
        ranks.agree(problem, "loading the model")
        return model


def prepare(
    source: str | Path | Checkpoint,
    *,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    rope_scaling: float | RopeScaling | None = None,
    adapter: str | Path | None = None,
    quantize: Recipe | None = None,
    kernels: bool = True,
) -> Prepared:
    """Look at a checkpoint and decide how it will be run; arguments as of `Llama.build`.

    `source` may be a checkpoint that is open already, as it is. Reads no weights, allocates nothing
    and waits for nobody. Raises FileNotFoundError or ValueError in one sentence.
    """
    wanted = local_device(device)
    checkpoint = source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint, rope_scaling=rope_scaling)
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, adapter)
    args = with_limits(checkpoint.args, max_batch_size, max_seq_len)
    return Prepared(
        checkpoint=replace(checkpoint, args=args),
        device=wanted,
        dtype=as_dtype(dtype) or checkpoint.dtype,
        formats=checkpoint.formats if quantize is None else formats_of(quantize, args),
        kernels=kernels,
    )


def load(
    checkpoint: Checkpoint,
    *,
    ranks: Ranks,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    formats: Mapping[str, Format] | None = None,
    show_progress: bool = False,
) -> Transformer:
    """The model of this rank on `device`, its weights in `dtype` (None: the checkpoint's own).

    The matrices in `formats` are packed (None: those that are stored so). Never holds much more
    than the weights themselves: parts are copied from where they lie to where they stay, and of a
    matrix that is packed there is never more than a block unpacked. Raises ValueError where the
    model cannot be cut into `ranks`, or a group of int4 would become too small.
    """
    device = torch.device(device)
    formats = dict(checkpoint.formats if formats is None else formats)
    check_ranks(formats, checkpoint.args, ranks.size)
    if formats and ranks.size > 1 and ranks.is_main:
        logger.warning(
            "quantized weights on %d ranks run without kernels: every product unpacks them, which "
            "on a GPU moves about ten times the bytes of bfloat16; it is faster without "
            "quantization, or on one GPU",
            ranks.size,
        )
    wanted = _wanted_dtype(checkpoint, device, dtype)
    # beside packed weights, one norm that stays mapped would keep a whole file in memory
    keep_mapped = not formats or is_mapped(checkpoint, ranks, device, wanted, formats)
    with torch.device("meta"):
        model = Transformer(replace(checkpoint.args), ranks)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(checkpoint.tensors), names ^ set(checkpoint.tensors)
    total = sum(p.numel() for p in model.parameters()) * wanted.itemsize
    with (
        progress("loading weights", total, unit="B", enabled=show_progress) as advance,
        Stager(advance) if device.type == "cuda" else Copier(advance) as copier,
    ):
        place = Place(
            checkpoint=checkpoint,
            formats=formats,
            ranks=ranks,
            device=device,
            dtype=wanted,
            copier=copier,
        )
        for group in groups(checkpoint.args):
            held = [name for name in group if name in checkpoint.tensors]  # tied: no output
            if held:
                place.group(model, held, keep_mapped)
    if checkpoint.args.tied and model.output.weight.is_meta:
        model.output.weight = model.tok_embeddings.weight
    model.freqs = model.freqs.to(device)
    unplaced = [name for name, p in model.named_parameters() if p.is_meta]
    assert not unplaced, unplaced
    return model.eval()


def _wanted_dtype(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of all parameters; says so where that is not what a person would expect."""
    wanted = checkpoint.dtype if dtype is None else dtype
    if not (isinstance(wanted, torch.dtype) and wanted.is_floating_point and wanted.itemsize > 1):
        raise ValueError(f"dtype={dtype!r}: use torch.bfloat16, torch.float16 or torch.float32")
    stored = [t for t in checkpoint.tensors.values() if not isinstance(t, (Merged, PackedTensor))]
    others = sorted({str(t.dtype) for t in stored} - {str(checkpoint.dtype)})
    if dtype is None and others and not checkpoint.stored:  # a mixture is what GGUF is
        logger.warning(
            "some tensors are stored as %s and loaded as %s, like the rest",
            ", ".join(others),
            wanted,
        )
    if wanted == torch.bfloat16 and device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if not native:
            logger.warning(
                "%s has no bfloat16 arithmetic and will be slow; dtype=torch.float16 is faster, at "
                "other roundings",
                torch.cuda.get_device_name(device),
            )
    return wanted
