"""A captured step whose device is emulated in torch: CapturedStep's own load, launch, read and
drop, and in place of its kernels what they compute. Tests of the engine's host logic run on it."""

import pytest
import torch
from conftest import tiny_args, unit_scale

pytest.importorskip("triton", reason="triton is not installed")

from llama.cache import Batch
from llama.cuda.runner import CapturedRunner
from llama.cuda.step import FLIGHTS, CapturedStep
from llama.engine import Engine
from llama.engine.runner import PlainRunner
from llama.model import Transformer
from llama.sampling import RowParams, SamplingParams, finite_rows, logprobs_of, sample


def small(seed=0, **changes):
    """A model whose forward takes a fraction of a millisecond."""
    shape = dict(dim=32, n_layers=1, n_heads=4, n_kv_heads=1, head_dim=16, hidden_dim=48)
    return unit_scale(Transformer(tiny_args(**{**shape, **changes})), seed)


class Emulated(CapturedStep):
    """One row after the other by the plain model, with the state that kernels read and write."""

    @torch.no_grad()
    def _step(self, key):
        model, longest, state = self.forward.model, self.cache.max_seq_len, self.row_state
        logits = torch.zeros(key.rows, model.params.vocab_size)
        for row in range(key.rows):
            slot, position = int(state.slots[row]), int(state.positions[row])
            if slot >= 0:
                assert position < longest, (row, position)  # a kernel would read past the slot
                batch = Batch([1], [position + 1], [slot])
                where = torch.tensor([position])
                token = state.tokens[row : row + 1]
                logits[row] = model.forward_flat(token, where, batch, self.cache)[0]
        if key.top is None:
            self._choose(logits)
        else:
            self.shifts(
                logits, state.generated[: key.rows], state.slots[: key.rows], self.sampler, key.top
            )
        results = self.results[int(self.steps[0]) % FLIGHTS]
        for row in range(key.rows):
            token, slot = int(self.sampler.ids[row]), int(state.slots[row])
            results[row, 0], results[row, 1] = token, int(self.sampler.finite[row])
            results[row, 2] = self.sampler.logprob[row].view(torch.int32)
            if slot >= 0:
                position, index = int(state.positions[row]) + 1, int(state.generated[row]) + 1
                stopped = token in state.stops[:, row].tolist()
                ended = stopped or index >= int(state.limits[row]) or position >= longest
                state.tokens[row], state.positions[row], state.generated[row] = (
                    token,
                    position,
                    index,
                )
                state.slots[row] = -1 if ended else slot
                state.lengths[row] = 0 if ended else position + 1
        self.steps += 1

    def _choose(self, logits):
        for row in range(len(logits)):
            heat, share = float(self.sampler.temperature[row]), float(self.sampler.top_p[row])
            params = SamplingParams(temperature=heat, top_p=share / 2**24)
            seed = int(self.sampler.seed[row, 0]) | int(self.sampler.seed[row, 1]) << 32
            one, at = logits[row : row + 1], self.row_state.generated[row : row + 1]
            chosen = sample(one, RowParams.from_params([params], [seed], self.device), at,
                            words=self.shifts.n_words)  # fmt: skip
            self.sampler.ids[row] = chosen[0]
            self.sampler.logprob[row] = logprobs_of(one, chosen, 0)[0][0]
            self.sampler.finite[row] = int(finite_rows(one)[0])


class EmulatedRunner(CapturedRunner):
    """The runner of a GPU whose captured step is emulated; whatever is not captured is run by the
    plain model, since kernels are slow in the interpreter."""

    made: type[CapturedStep] = Emulated

    def capture(self):
        self.captured = self.made(self.model, self.cache, self.n_slots, self.n_words)


def engine_of(model, path="plain", slots=4, room=64, n_words=None, runner=None, **options):
    """An engine on the plain path or on the captured one, emulated."""
    made = runner or {"plain": PlainRunner, "captured": EmulatedRunner}[path]
    return Engine(made(model, model.new_cache(slots, room), n_words), seed=5, **options)
