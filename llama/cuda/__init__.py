"""Everything that needs an NVIDIA GPU: Triton kernels, and the captured step that decodes.

The only room that imports triton; loading opens it where the model lies on a GPU that it knows.
Each kernel has a plain counterpart, in model.py or sampling.py, that it must agree with. The
surprising thing: the kernels of a step are launched before their predecessors are done, so that
their weights are under way while they wait; see `launch`.
"""

import importlib.util

import torch

from llama.args import ModelArgs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(
    args: ModelArgs, dtype: torch.dtype, device: torch.device, fp8: bool = False
) -> str | None:
    """Why the kernels cannot run this model in `dtype` on `device`, as a part of a sentence; None
    where they can. One rank is meant; `fp8` says whether some of its weights are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device} is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    if fp8 and capability < (8, 9):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}; fp8 needs 8.9"
    if dtype not in DTYPES:
        return f"the weights are {dtype}, not bfloat16, float16 or float32"
    size = args.head_dim
    if not 16 <= size <= 256:
        return f"the head size is {size}, not between 16 and 256"
    if args.rope_scaling is not None and args.rope_scaling.attention_factor != 1:
        return f"its rotary scaling has attention_factor {args.rope_scaling.attention_factor:g}"
    return None
