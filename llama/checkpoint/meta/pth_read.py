"""One file of torch.save to its tensors by name: mapped, and nothing that it says is executed.

Knows what such a file is made of; refuses to know which tensors a model has. The surprising thing:
`weights_only` alone would not do. What it allows can still fill the memory, warn, or hide a method
of a tensor behind a value, so the instructions are looked through before they are followed.
"""

import pickle
import pickletools
import re
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from llama.files.plain import check_file

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_PICKLE = 2**24  # bytes of instructions; a shard of the 405B has about 200,000
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, which begins such a file
# All that a dict of plain tensors is made of: storages, dtypes (in lower case), and these functions
_PLAIN = (
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter)"
    r"|torch (\w+Storage|[a-z]\w*)|torch\.storage UntypedStorage"
)


def map_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, as views of its mapping; ValueError for anything else."""
    check_file(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{file}: is empty; download it again")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{file}: is a web page or XML, no weights; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: is a git-lfs pointer; fetch what it stands for (git lfs pull)")
    if head.startswith(_LEGACY):
        raise ValueError(
            f"{file}: is in the format that torch.save wrote before torch 1.6, which cannot be "
            "mapped; torch.load it with weights_only=True and torch.save it again"
        )
    if not head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{file}: is no file that torch.save writes (a zip archive)")
    try:
        size = _check_archive(file)
        shard = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: holds something other than plain tensors, or is broken; nothing in it was run"
        ) from error
    except Exception as error:  # what broken instructions raise may be of any kind
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: is cut short or broken ({why:.120})") from error
    if not isinstance(shard, dict):
        raise ValueError(f"{file}: holds no tensors by name")
    tensors = dict(dict.items(shard))  # an OrderedDict may bring an `items` of its own
    if not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file}: holds no tensors by name")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, file)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
    if sum(storage.nbytes() for storage in storages.values()) > size:
        raise ValueError(f"{file}: is broken: its tensors claim more bytes than it has for them")
    return tensors


def _check_archive(file: Path) -> int:
    """How many bytes all tensors have; raises where the archive holds more than plain tensors."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which cannot be mapped")
        twice = Counter(entry.filename.lower() for entry in entries).most_common(1)
        if twice and twice[0][1] > 1:
            raise ValueError(f"it holds {twice[0][0]!r:.60} twice")
        if any(entry.filename.lower().endswith("/constants.pkl") for entry in entries):
            raise ValueError("it is a program compiled with TorchScript")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                if entry.file_size > _LARGEST_PICKLE:
                    raise ValueError(f"{entry.filename!r:.60} has {entry.file_size} bytes")
                _check_pickle(archive.read(entry))
        return sum(entry.file_size for entry in entries if "/data/" in entry.filename)


def _check_pickle(instructions: bytes) -> None:
    """Raise where instructions that make tensors name anything else."""
    for operation, argument, _ in pickletools.genops(instructions):
        name = operation.name
        if name == "PROTO" and argument != 2:  # torch.save's, and the one that torch.load reads
            raise ValueError(f"it is written in pickle protocol {argument}, and not 2")
        if name in ("GLOBAL", "INST") and not re.fullmatch(_PLAIN, str(argument)):
            raise pickle.UnpicklingError(argument)


def _check_tensor(name: str, tensor: object, file: Path) -> None:
    name = name if len(name) <= 80 else f"{name[:80]}..."
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{file}: {name} is no tensor but {type(tensor).__name__}")
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.__dict__
    if (
        not plain
        or tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or not tensor.is_contiguous()
    ):
        raise ValueError(f"{file}: {name} is not stored as a plain, contiguous tensor")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{file}: {name} is {tensor.dtype}; these are read: {', '.join(map(str, _DTYPES))}"
        )
