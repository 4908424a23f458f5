"""The shape of a model: `ModelArgs`, the keys of params.json, and `RopeScaling`.

Knows numbers and what they must be; refuses to know tensors. The surprising thing: a shape that
cannot be run is refused here, in one sentence, before anything is read.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths, see `rope_frequencies`.

    `factors`, one for each pair, stand for all four constants where a file says it so.
    `attention_factor` multiplies rotated queries and keys alike, as yarn (arXiv 2309.00071) does.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"{self}: needs factor >= 1 and 0 < low_freq_factor < high_freq_factor"
            )
        numbers = (self.attention_factor, *(self.factors or ()))
        if not all(0 < each < math.inf for each in numbers):
            raise ValueError(f"factors={numbers!r:.200}: each must be a positive number")


@dataclass(kw_only=True)
class ModelArgs:
    """The shape of a model: the keys of Meta's params.json, and the same things as others state
    them.

    Zero means "derived": n_kv_heads as many as n_heads, hidden_dim from multiple_of and
    ffn_dim_multiplier, head_dim = dim / n_heads, context_length from the family. params.json only
    says `use_scaled_rope`; the factor is then 32 for the 1B and 3B shapes and 8 for all others.
    Not frozen, because scripts written for Meta's code set `vocab_size` after construction.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scaling: RopeScaling | None = None
    hidden_dim: int = 0
    head_dim: int = 0
    context_length: int = 0
    tied: bool = False
    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps",
                     "rope_theta", "max_batch_size", "max_seq_len"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be positive")
        for name in ("hidden_dim", "head_dim", "context_length"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be positive, or 0 for derived"
                )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is no multiple of n_kv_heads={self.n_kv_heads}"
            )
        if not self.head_dim and self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is no multiple of n_heads={self.n_heads}")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary pairs need an even head size")
        if not self.hidden_dim:
            hidden = int((self.ffn_dim_multiplier or 1) * int(2 * 4 * self.dim / 3))
            self.hidden_dim = -(-hidden // self.multiple_of) * self.multiple_of
        if self.use_scaled_rope and self.rope_scaling is None:
            small = (self.dim, self.n_layers) in ((2048, 16), (3072, 28))
            self.rope_scaling = RopeScaling(factor=32.0 if small else 8.0)
        factors = self.rope_scaling.factors if self.rope_scaling else None
        if factors is not None and len(factors) != self.head_dim // 2:
            raise ValueError(
                f"rope_scaling has {len(factors)} factors, and heads of {self.head_dim} have "
                f"{self.head_dim // 2} rotary pairs"
            )
        if not self.context_length:
            self.context_length = 131072 if self.rope_scaling else 8192

    def rank_counts(self) -> list[int]:
        """The numbers of model-parallel ranks that this shape can be cut into."""
        kv = self.n_kv_heads
        return [
            w
            for w in range(1, self.n_heads + 1)
            if not (self.n_heads % w or self.hidden_dim % w) and (kv % w == 0 or w % kv == 0)
        ]
