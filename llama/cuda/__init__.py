"""Everything that needs an NVIDIA GPU: Triton kernels, and the captured step that decodes.

The only room that imports triton; the engine opens it where the model lies on a GPU that it knows.
Each kernel has a plain counterpart, in model.py or sampling.py, that it must agree with. The
surprising thing: the kernels of a step are launched before their predecessors are done, so that
their weights are under way while they wait; see `launch`.
"""
