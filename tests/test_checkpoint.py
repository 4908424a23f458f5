"""Laws of the way in: any shards on any ranks are the same tensors; strict; nothing held twice."""

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama.checkpoint import open_checkpoint, random_checkpoint, write_meta
from llama.checkpoint.meta.params import params_of
from llama.loading import load
from llama.loading.place import make_room
from llama.model import ModelArgs, RopeScaling
from llama.names import groups, local_shape, local_slice, shapes
from llama.parallel import ONE, Ranks

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=128, multiple_of=16,
                 hidden_dim=96)  # fmt: skip
COUNTS = (1, 2, 4, 8)


def write(path: Path, args: ModelArgs = ARGS, **options) -> dict[str, Tensor]:
    """A random checkpoint in Meta's files; returns its full tensors."""
    checkpoint = random_checkpoint(args)
    write_meta(checkpoint, path, **options)
    return {name: source.read() for name, source in checkpoint.tensors.items()}


def edit_params(path: Path, **changes) -> None:
    file = path / "params.json"
    params = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in params.items() if v != "absent"}))


def edit_shard(path: Path, change, number: int = 0) -> None:
    file = path / f"consolidated.{number:02}.pth"
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)


def loaded(path: Path, rank: int = 0, size: int = 1, **options) -> torch.nn.Module:
    checkpoint = open_checkpoint(path)
    return load(checkpoint, ranks=Ranks(rank=rank, size=size), device="cpu", **options)


def assemble(name: str, args: ModelArgs, parts: list[Tensor]) -> Tensor:
    """What the ranks' parameters say the full tensor is, by the definition of each cut."""
    size = len(parts)
    if name.endswith("norm.weight"):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    if name.endswith((".wk.weight", ".wv.weight")) and size > args.n_kv_heads:
        copies = size // args.n_kv_heads  # neighbours hold the same head
        for rank, part in enumerate(parts):
            assert torch.equal(part, parts[rank // copies * copies])
        parts = parts[::copies]
    whole = torch.cat(parts, 1 if name.endswith((".wo.weight", ".w2.weight")) else 0)
    if name in ("tok_embeddings.weight", "output.weight"):
        assert not whole[args.vocab_size :].any(), "padding is zeros"
        whole = whole[: args.vocab_size]
    return whole


# --- same tensors


@pytest.mark.parametrize("shards", COUNTS)
def test_any_shards_on_any_ranks_are_the_same_tensors(tmp_path, shards):
    truth = write(tmp_path, shards=shards)
    for size in COUNTS:
        models = [loaded(tmp_path, rank, size) for rank in range(size)]
        for name, tensor in truth.items():
            parts = [model.get_parameter(name).detach() for model in models]
            assert all(part.shape == local_shape(name, ARGS, size) for part in parts)
            assert torch.equal(assemble(name, ARGS, parts), tensor), (name, size)


@pytest.mark.parametrize("shards", COUNTS)
def test_every_range_of_a_lazy_tensor_is_that_range(tmp_path, shards):
    truth = write(tmp_path, shards=shards)
    for checkpoint in (open_checkpoint(tmp_path), random_checkpoint(ARGS)):
        for name, tensor in truth.items():
            source = checkpoint.tensors[name]
            assert (source.shape, source.dtype) == (tensor.shape, tensor.dtype)
            for dim, size in enumerate(source.shape):
                for start, stop in ((0, size), (0, 1), (size // 3, size // 2 + 1), (5, 5)):
                    expected = tensor.narrow(dim, start, stop - start)
                    assert torch.equal(source.read(dim, start, stop), expected), (name, dim)


def test_embeddings_cut_along_the_other_dimension_are_told_by_their_shape(tmp_path):
    truth = write(tmp_path, shards=2)
    for number, half in enumerate(truth["tok_embeddings.weight"].chunk(2, dim=1)):
        change = {"tok_embeddings.weight": half.clone()}
        edit_shard(tmp_path, lambda tensors, change=change: tensors.update(change), number)
    for rank in range(4):
        part = loaded(tmp_path, rank, 4).tok_embeddings.weight
        assert torch.equal(part, truth["tok_embeddings.weight"][rank * 32 : rank * 32 + 32])


def test_an_odd_vocabulary_is_padded_with_zeros(tmp_path):
    args = dataclasses.replace(ARGS, vocab_size=125, hidden_dim=96)
    truth = write(tmp_path, args)
    for size in (4, 8):
        models = [loaded(tmp_path, rank, size) for rank in range(size)]
        for name in ("tok_embeddings.weight", "output.weight"):
            parts = [model.get_parameter(name).detach() for model in models]
            assert len({part.shape for part in parts}) == 1
            assert torch.equal(assemble(name, args, parts), truth[name])


def test_the_last_ranks_of_a_tiny_vocabulary_hold_only_padding():
    args = dataclasses.replace(ARGS, vocab_size=9)
    assert local_slice("output.weight", args, 7, 8) == (0, 9, 9)
    model = load(random_checkpoint(args), ranks=Ranks(rank=7, size=8), device="cpu")
    assert model.output.weight.shape == (2, 64)
    assert not model.output.weight.any()


def test_key_heads_are_replicated_per_head_not_tiled():
    rows = [local_slice("layers.0.attention.wk.weight", ARGS, rank, 8) for rank in range(8)]
    assert rows == [(0, 0, 8)] * 4 + [(0, 8, 16)] * 4


@pytest.mark.parametrize("size", COUNTS)
def test_each_rank_holds_its_share_of_the_bytes(tmp_path, size):
    args = dataclasses.replace(ARGS, n_kv_heads=8)
    truth = write(tmp_path, args, shards=4)
    whole = sum(t.nbytes for name, t in truth.items() if "norm" in name)
    cut = sum(t.nbytes for name, t in truth.items() if "norm" not in name)
    for rank in range(size):
        parameters = list(loaded(tmp_path, rank, size, dtype=torch.bfloat16).parameters())
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in parameters}
        held = sum(storage.nbytes() for storage in storages.values())
        assert held == sum(p.nbytes for p in parameters) == whole + cut // size


def test_a_dtype_is_cast_and_frequencies_stay_float32(tmp_path):
    truth = write(tmp_path)
    model = loaded(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.equal(model.norm.weight, truth["norm.weight"].half())
    assert (model.freqs.dtype, model.freqs.device.type) == (torch.float32, "cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_tensors_of_another_dtype_than_the_rest_are_cast_with_a_word(tmp_path, caplog):
    write(tmp_path)
    edit_shard(tmp_path, lambda t: t.update({"norm.weight": t["norm.weight"].float()}))
    assert loaded(tmp_path).norm.weight.dtype == torch.bfloat16
    assert "torch.float32" in caplog.text


def test_loading_changes_nothing_global(tmp_path):
    write(tmp_path)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device()
    loaded(tmp_path, 1, 2)
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- random weights


def test_random_weights_depend_on_seed_and_name_alone(monkeypatch):
    deep = dataclasses.replace(ARGS, n_layers=3)
    one, other = random_checkpoint(ARGS).tensors, random_checkpoint(deep).tensors
    name = "layers.1.attention.wq.weight"
    assert torch.equal(one[name].read(), other[name].read())
    assert not torch.equal(one[name].read(), one["layers.0.attention.wq.weight"].read())
    assert not torch.equal(one[name].read(), random_checkpoint(ARGS, seed=1).tensors[name].read())


def test_random_weights_are_drawn_in_blocks(monkeypatch):
    monkeypatch.setattr("llama.checkpoint.random._BLOCK", 5 * 64)
    source = random_checkpoint(ARGS).tensors["layers.0.attention.wq.weight"]
    whole = source.read()
    assert len(list(source.parts())) == 13
    assert torch.equal(source.read(0, 3, 21), whole[3:21])
    assert torch.equal(source.read(1, 3, 21), whole[:, 3:21])
    assert 0.9 < whole.float().std() * 8 < 1.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dim", "n_layers"), [(64, 2), (64, 24), (256, 4)])
def test_random_models_have_states_and_logits_of_unit_scale(dim, n_layers, tied):
    args = ModelArgs(dim=dim, n_layers=n_layers, n_heads=4, n_kv_heads=2, vocab_size=512, tied=tied)
    checkpoint = random_checkpoint(args, dtype=torch.float32)
    model = load(checkpoint, ranks=ONE, device="cpu")
    logits = model(torch.arange(64)[None])
    assert 0.6 < logits.std() < 1.6


# --- tied


def test_tied_matrices_are_held_once(tmp_path):
    args = dataclasses.replace(ARGS, tied=True)
    for shards in (1, 2):
        path = tmp_path / str(shards)
        truth = write(path, args, shards=shards)
        assert "output.weight" in torch.load(path / "consolidated.00.pth")
        assert (path / "consolidated.00.pth").stat().st_size < sum(
            t.nbytes for t in truth.values()
        ) / shards + 20_000
        checkpoint = open_checkpoint(path)
        assert checkpoint.args.tied
        assert set(checkpoint.skipped) == {"output.weight"}
        for size in (1, 4):
            model = load(checkpoint, ranks=Ranks(rank=size - 1, size=size), device="cpu")
            assert model.output.weight is model.tok_embeddings.weight


def test_an_absent_output_needs_params_that_say_tied(tmp_path):
    write(tmp_path)
    edit_shard(tmp_path, lambda tensors: tensors.pop("output.weight"))
    with pytest.raises(ValueError, match=r"lacks output\.weight"):
        open_checkpoint(tmp_path)
    edit_params(tmp_path, tied=True)
    model = loaded(tmp_path)
    assert model.output.weight is model.tok_embeddings.weight


# --- memory


def mapped_ranges(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if str(path) in line]
    return [(int(low, 16), int(high, 16)) for low, high in ends]


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize("size", [1, 2])
def test_on_a_cpu_parameters_are_the_mapped_file(tmp_path, size):
    write(tmp_path, shards=size)
    model = loaded(tmp_path, size - 1, size)
    ranges = mapped_ranges(tmp_path)
    for name, p in model.named_parameters():
        address = p.data_ptr()
        assert any(low <= address and address + p.nbytes <= high for low, high in ranges), name


@linux
def test_without_aliasing_fused_weights_are_views_of_one_storage(tmp_path):
    write(tmp_path, shards=2)
    layer = loaded(tmp_path, 1, 4).layers[1]
    for fused in (
        [layer.attention.wq, layer.attention.wk, layer.attention.wv],
        [layer.feed_forward.w1, layer.feed_forward.w3],
    ):
        first = fused[0].weight
        storage = first.untyped_storage()
        assert storage.nbytes() == sum(linear.weight.nbytes for linear in fused)
        address = first.data_ptr()
        assert address == storage.data_ptr()
        for linear in fused:
            assert linear.weight.data_ptr() == address
            address += linear.weight.nbytes
    assert not any(
        low <= p.data_ptr() < high
        for low, high in mapped_ranges(tmp_path)
        for p in layer.parameters()
        if p.dim() > 1
    )


def test_groups_name_every_tensor_once():
    names = [name for group in groups(ARGS) for name in group]
    assert sorted(names) == sorted(shapes(ARGS))
    assert len(set(map(len, groups(ARGS)))) == 3


MEASURE = """
import sys, threading, torch
from llama.checkpoint import open_checkpoint
from llama.loading import load
from llama.parallel import Ranks

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

class Watch(threading.Thread):
    def run(self):
        self.peak, self.done = 0, threading.Event()
        while not self.done.wait(0.001):
            self.peak = max(self.peak, anonymous())

for dtype, rank, size in (torch.bfloat16, 0, 1), (torch.float32, 0, 1), (torch.bfloat16, 1, 2):
    torch.ones(1).to(dtype)
    start, watch = anonymous(), Watch(daemon=True)
    watch.start()
    checkpoint = open_checkpoint(sys.argv[1])
    model = load(checkpoint, ranks=Ranks(rank=rank, size=size), device="cpu", dtype=dtype)
    watch.done.set(); watch.join()
    held = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    print(str(dtype), rank, size, held, watch.peak - start)
    del model, checkpoint
assert "torch._dynamo" not in sys.modules, "a second and 67 MB for nothing"
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """308 MiB in two shards, a third of it in the tensor that is placed last."""
    path = tmp_path_factory.mktemp("large")
    args = ModelArgs(dim=1024, n_layers=4, n_heads=16, n_kv_heads=4, vocab_size=49152,
                     hidden_dim=4096)  # fmt: skip
    zeros = random_checkpoint(args)
    for name, source in zeros.tensors.items():
        zeros.tensors[name] = Zeros(source.shape)
    write_meta(zeros, path, shards=2)
    return path


class Zeros:
    def __init__(self, shape):
        self.shape, self.dtype = shape, torch.bfloat16

    def read(self, dim=0, start=0, stop=None):
        return torch.zeros(self.shape, dtype=self.dtype).narrow(
            dim, start, (self.shape[dim] if stop is None else stop) - start
        )


@linux
def test_loading_holds_little_beyond_the_weights(large, record_property):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        dtype, rank, size, held, grown = line.split()
        record_property(
            "measured",
            f"{dtype}, rank {rank} of {size}: {int(held) >> 20} MiB of weights from 2 shards, "
            f"anonymous memory grew by {int(grown) >> 20} MiB",
        )
        assert int(held) > 100 << 20
        own = 0 if size == "2" else int(held)  # as many ranks as shards: the mapped file itself
        assert int(grown) - own < 32 << 20
    assert len(done.stdout.splitlines()) == 3


BUILD = """
import sys, torch
from llama.checkpoint import random_checkpoint
from llama.model import ModelArgs, Transformer
from llama.parallel import Ranks
import resource
args = ModelArgs(dim=8192, n_layers=8, n_heads=64, n_kv_heads=8, vocab_size=128256,
                 multiple_of=4096, ffn_dim_multiplier=1.3)
with torch.device("meta"):
    torch.nn.Linear(2, 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.device("meta"):
    model = Transformer(args, Ranks(rank=3, size=8))
random_checkpoint(args)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before, sum(p.numel() for p in model.parameters()))
"""


@linux
def test_building_a_rank_of_a_large_shape_takes_next_to_no_memory(record_property):
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    grown, numbers = map(int, done.stdout.split())
    record_property("measured", f"{numbers * 2 >> 20} MiB of bf16 on meta: {grown} KiB in memory")
    assert grown < 16 << 10
    assert numbers > 10**9


# --- in and out again


SHAPES = [
    ARGS,
    dataclasses.replace(ARGS, tied=True),
    ModelArgs(dim=48, n_layers=1, n_heads=4, vocab_size=40, multiple_of=8, ffn_dim_multiplier=1.3,
              norm_eps=1e-6, rope_theta=10000.0),
    ModelArgs(dim=48, n_layers=1, n_heads=4, vocab_size=40, use_scaled_rope=True, head_dim=16),
    ModelArgs(dim=48, n_layers=1, n_heads=4, vocab_size=40, use_scaled_rope=True,
              rope_scaling=RopeScaling(factor=3.5, original_context=64), context_length=512),
]  # fmt: skip


@pytest.mark.parametrize("args", SHAPES)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_writing_and_reading_is_the_identity(tmp_path, args, shards):
    truth = write(tmp_path, args, shards=shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.args == args
    assert checkpoint.shards == shards
    assert checkpoint.path == tmp_path
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.parameters == sum(t.numel() for t in truth.values())
    assert set(checkpoint.tensors) == set(truth)
    for name, tensor in truth.items():
        assert torch.equal(checkpoint.tensors[name].read(), tensor)
    write_meta(checkpoint, tmp_path / "again", shards=1)
    again = open_checkpoint(tmp_path / "again")
    assert again.args == args
    assert all(torch.equal(again.tensors[name].read(), t) for name, t in truth.items())
    assert not list(tmp_path.rglob("*.part"))


def test_params_are_those_of_the_released_files():
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256,
                     multiple_of=1024, ffn_dim_multiplier=1.3)  # fmt: skip
    assert params_of(args) == {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
        "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    assert sum(torch.Size(s).numel() for s in shapes(args).values()) == 8_030_261_248


def test_writing_takes_another_dtype(tmp_path):
    truth = write(tmp_path, dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.float32
    assert torch.equal(checkpoint.tensors["norm.weight"].read(), truth["norm.weight"].float())


def test_writing_refuses_what_it_cannot_do_whole(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"shards=3.*1, 2, 4, 8, 16"):
        write(tmp_path / "a", shards=3)
    write(tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"consolidated\.00\.pth is there already"):
        write(tmp_path / "b")

    def fail(file, *rest):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llama.checkpoint.meta.write.write_pth", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_folder_with_original_inside_is_found(tmp_path):
    write(tmp_path / "original")
    (tmp_path / "original/tokenizer.model").write_text("")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.path == tmp_path / "original"
    assert checkpoint.tokenizer_path == tmp_path / "original/tokenizer.model"


def test_families_are_told_by_shape():
    released = ModelArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256,
                         ffn_dim_multiplier=1.5, use_scaled_rope=True, tied=True)  # fmt: skip
    checkpoint = random_checkpoint(released)
    assert checkpoint.family == "Llama 3.2 1B"
    assert checkpoint.parameters == 1_235_814_400
    assert released.rope_scaling == RopeScaling(factor=32.0)
    assert random_checkpoint(ARGS).family == "a Llama of its own shape"


def test_rope_scaling_overrides_params(tmp_path):
    write(tmp_path, dataclasses.replace(ARGS, use_scaled_rope=True, context_length=0))
    assert open_checkpoint(tmp_path).args.rope_scaling == RopeScaling(factor=8.0)
    assert open_checkpoint(tmp_path, rope_scaling=32).args.rope_scaling == RopeScaling(factor=32.0)
    own = RopeScaling(factor=2.0, original_context=4096)
    assert open_checkpoint(tmp_path, rope_scaling=own).args.rope_scaling == own
    none = open_checkpoint(tmp_path, rope_scaling=1).args
    assert none.rope_scaling is None
    assert not none.use_scaled_rope
    for wrong in (0.5, True, float("nan"), float("inf"), "8", (8,)):
        with pytest.raises(ValueError, match="rope_scaling="):
            open_checkpoint(tmp_path, rope_scaling=wrong)


@pytest.mark.parametrize("wrong", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_a_wrong_dtype_is_refused(wrong):
    with pytest.raises(ValueError, match=r"dtype=.*use torch\.bfloat16"):
        load(random_checkpoint(ARGS), ranks=ONE, device="cpu", dtype=wrong)


def test_a_rank_count_that_does_not_work_is_refused():
    with pytest.raises(ValueError, match=r"into 3 ranks.*\[1, 2, 4, 8\]"):
        load(random_checkpoint(ARGS), ranks=Ranks(rank=0, size=3), device="cpu")


# --- strict


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


WRONG_TENSORS = {
    "missing": (drop("layers.1.ffn_norm.weight"), r"lacks layers\.1\.ffn_norm\.weight$"),
    "unknown": (put("extra.weight", torch.ones(2)), r"does not have: extra\.weight$"),
    "shape": (put("layers.0.attention.wo.weight", torch.ones(64, 60).bfloat16()),
              r"layers\.0\.attention\.wo\.weight should be \(64, 64\).*\(64, 60\)"),
    "norm shape": (put("norm.weight", torch.ones(32).bfloat16()), r"norm\.weight should be "),
    "dtype": (put("norm.weight", torch.ones(64, dtype=torch.int8)), r"norm\.weight is torch\.int8"),
    "float8": (put("norm.weight", torch.ones(64).to(torch.float8_e5m2)), "float8_e5m2; these"),
    "float64": (put("norm.weight", torch.ones(64).double()), "is torch.float64; these are read"),
    "sparse": (put("norm.weight", torch.ones(64).to_sparse()), "other than plain tensors"),
    "strides": (put("norm.weight", torch.ones(1).expand(64)), "not stored as a plain"),
    "no tensor": (put("norm.weight", 3), "norm.weight is no tensor but int"),
    "no names": (put(5, torch.ones(2)), "holds no tensors by name"),
    "nothing": (lambda tensors: tensors.clear(), "holds 0 layers"),
    "more layers": (put("layers.2.ffn_norm.weight", torch.ones(64)), "3 layers.*n_layers 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_every_tensor_is_accounted_for(tmp_path, case):
    change, message = WRONG_TENSORS[case]
    write(tmp_path)
    edit_shard(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_every_shard_is_held_to_the_same(tmp_path):
    other = dataclasses.replace(ARGS, hidden_dim=80)
    for message, change in {
        r"consolidated\.01\.pth: lacks norm\.weight": drop("norm.weight"),
        "differ in whether they hold rope.freqs": put("rope.freqs", torch.ones(4)),
        "another dtype in some shards": put("norm.weight", torch.ones(64)),
        r"output\.weight should be \(128, 64\) in 2 equal parts.*\(64, 64\), \(32, 64\)": put(
            "output.weight", torch.ones(32, 64).bfloat16()
        ),
    }.items():
        path = tmp_path / message[:12]
        write(path, shards=2)
        edit_shard(path, change, 1)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(path)
    write(tmp_path / "two", shards=2)
    write(tmp_path / "other", other, shards=2)
    os.replace(tmp_path / "other/consolidated.01.pth", tmp_path / "two/consolidated.01.pth")
    with pytest.raises(ValueError, match=r"feed_forward\.w1\.weight should be"):
        open_checkpoint(tmp_path / "two")


def test_shards_that_disagree_on_a_norm_are_mentioned(tmp_path, caplog):
    write(tmp_path, shards=2)
    name = "layers.1.ffn_norm.weight"
    norm = torch.load(tmp_path / "consolidated.00.pth")[name]
    edit_shard(tmp_path, put(name, norm * (1 + 2**-7)), 1)
    open_checkpoint(tmp_path)
    assert "differ in their norms" in caplog.text
    edit_shard(tmp_path, put(name, norm * 1.1), 1)
    with pytest.raises(ValueError, match=r"01\.pth is of another model than consolidated\.00"):
        open_checkpoint(tmp_path)


def test_derived_tensors_are_skipped_by_name(tmp_path, caplog):
    write(tmp_path)
    edit_shard(tmp_path, put("rope.freqs", torch.ones(4)))
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.skipped == {"rope.freqs": "derived from rope_theta"}
    assert not caplog.records


def test_params_that_contradict_the_files_are_refused(tmp_path):
    write(tmp_path)
    edit_params(tmp_path, tied=True)
    with pytest.raises(ValueError, match=r"says tied, but output\.weight is a tensor of its own"):
        open_checkpoint(tmp_path)


WRONG_PARAMS = {
    "unknown": ({"rope_type": "yarn", "zeta": 1}, "unknown keys rope_type, zeta; known are dim,"),
    "quantized": ({"quantization_args": {"scheme": "int4"}}, "quantization_args marks quantized"),
    "adapter": ({"lora_args": {"rank": 16}}, "lora_args marks weights with adapters"),
    "vision": ({"vision_chunk_size": 448}, "vision_chunk_size marks a vision model"),
    "vocabulary": ({"vocab_size": -2}, "vocab_size needs to be a whole number above 0"),
    "no theta": ({"vocab_size": "absent", "rope_theta": "absent"}, "params.json: lacks rope_theta"),
    "missing": ({"dim": "absent", "rope_theta": "absent"}, "lacks dim, rope_theta"),
    "text": ({"dim": "64"}, "dim needs to be a whole number, is '64'"),
    "float": ({"n_layers": 2.0}, "n_layers needs to be a whole number"),
    "bool": ({"n_heads": True}, "n_heads needs to be a whole number, is True"),
    "null": ({"n_heads": None}, "n_heads needs to be a whole number, is None"),
    "no number": ({"norm_eps": "tiny"}, "norm_eps needs to be a number"),
    "nan": ({"norm_eps": float("nan")}, "norm_eps needs to be a number above 0"),
    "negative": ({"dim": -64}, "dim needs to be a whole number above 0 .*, is -64"),
    "zero": ({"rope_theta": 0}, "rope_theta needs to be a number above 0"),
    "huge": ({"n_layers": 10**12}, "n_layers needs to be .* below 2147483648"),
    "large": ({"n_layers": 10**9}, "holds 2 layers, and params.json says n_layers 1000000000"),
    "heads": ({"n_kv_heads": 3}, "params.json: n_heads=8 is no multiple of n_kv_heads=3"),
    "shape": ({"hidden_dim": 100}, r"w1\.weight should be \(100, 64\)"),
    "flag": ({"use_scaled_rope": 1}, "use_scaled_rope needs to be true or false"),
    "scaling": (
        {"rope_scaling": {"factor": 8, "type": "x"}},
        "rope_scaling needs to be an object of f",
    ),
    "scales": ({"rope_scaling": {"factor": True}}, "rope_scaling needs to be made of positive"),
    "factor": ({"rope_scaling": {"factor": 0.5}}, "params.json: RopeScaling"),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_params_are_read_to_the_letter(tmp_path, case):
    changes, message = WRONG_PARAMS[case]
    write(tmp_path)
    edit_params(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"dim": 64, "dim": 64}', "<html>", "\x00", "[" * 10**5, '{"dim": 1e}',
     '{"dim": ' + "9" * 10**4 + "}", " " * 2**21],
)  # fmt: skip
def test_params_that_are_no_json_are_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ValueError, match=r"params\.json: ") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 400


def test_known_keys_that_say_nothing_about_the_model_pass(tmp_path):
    write(tmp_path)
    edit_params(tmp_path, max_batch_size=4, max_seq_len=99, ffn_dim_multiplier=None)
    assert open_checkpoint(tmp_path).args == ARGS


# --- folders and files that are something else


def test_folders_that_are_something_else(tmp_path):
    def refused(error, message):
        with pytest.raises(error, match=message) as caught:
            open_checkpoint(tmp_path / "here")
        assert "\n" not in str(caught.value)

    here = tmp_path / "here"
    refused(FileNotFoundError, "there is no such folder")
    here.mkdir()
    refused(FileNotFoundError, r"neither params\.json nor consolidated\.00\.pth")
    (here / "model.safetensors").touch()
    refused(FileNotFoundError, r"config\.json is missing; it belongs beside the weights")
    (here / "model.safetensors").rename(here / "model-q4.gguf")
    refused(ValueError, r"model-q4\.gguf: is empty")
    (here / "params.json").touch()
    refused(FileNotFoundError, r"consolidated\.00\.pth is missing")
    (here / "params.json").rename(here / "consolidated.00.pth")
    refused(FileNotFoundError, r"params\.json is missing")
    with pytest.raises(ValueError, match=r"is a file; needed is a \.gguf file, or the folder"):
        open_checkpoint(here / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"model-q4\.gguf: is empty"):
        open_checkpoint(here / "model-q4.gguf")


def test_shards_are_numbered_without_gaps(tmp_path):
    write(tmp_path, shards=4)
    (tmp_path / "consolidated.02.pth").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"consolidated\.02\.pth is missing, of 4"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.2.pth").mkdir()
    with pytest.raises(ValueError, match=r"consolidated\.2\.pth is not a file but a folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.2.pth").rmdir()
    (tmp_path / "kept").rename(tmp_path / "consolidated.02.pth")
    (tmp_path / "consolidated.1.pth").touch()
    with pytest.raises(ValueError, match="are both shard 1"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.1.pth").rename(tmp_path / "consolidated.xx.pth")
    with pytest.raises(ValueError, match=r"xx\.pth: shards are named"):
        open_checkpoint(tmp_path)


class Exploit:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_would_execute_does_not(tmp_path):
    write(tmp_path)
    shard, effect = tmp_path / "consolidated.00.pth", tmp_path / "effect"
    tensors = torch.load(shard) | {"norm.weight": Exploit(effect)}
    torch.save(tensors, shard)
    torch.load(shard, weights_only=False)
    assert effect.exists()
    effect.unlink()
    with pytest.raises(ValueError, match=r"00\.pth: holds something other than plain tensors"):
        open_checkpoint(tmp_path)
    assert not effect.exists()
    shard.write_bytes(pickle.dumps(Exploit(effect)))
    with pytest.raises(ValueError, match=r"is no file that torch\.save writes"):
        open_checkpoint(tmp_path)
    assert not effect.exists()


def rezip(shard: Path, compression: int, change=lambda data: data) -> None:
    other = shard.with_suffix(".other")
    with zipfile.ZipFile(shard) as old, zipfile.ZipFile(other, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if "data.pkl" in entry.filename else data)
    other.replace(shard)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    def enlarge(pickled: bytes) -> bytes:
        shape = b"K\x80K\x40\x86"  # (128, 64)
        assert pickled.count(shape) == 1
        return pickled.replace(shape, b"J" + (2**24).to_bytes(4, "little") + shape[2:])

    args = dataclasses.replace(ARGS, tied=True)
    write(tmp_path, args)
    edit_shard(tmp_path, lambda tensors: tensors.pop("output.weight"))
    edit_params(tmp_path, tied=True)
    rezip(tmp_path / "consolidated.00.pth", zipfile.ZIP_STORED)
    assert open_checkpoint(tmp_path).args == args
    rezip(tmp_path / "consolidated.00.pth", zipfile.ZIP_STORED, enlarge)
    edit_params(tmp_path, vocab_size=2**24)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: is cut short or broken"):
        open_checkpoint(tmp_path)


def test_a_compressed_shard_is_not_mapped_as_if_it_were_weights(tmp_path):
    write(tmp_path)
    rezip(tmp_path / "consolidated.00.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed, which cannot be mapped"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_shard_cut_short_is_refused_and_leaves_nothing_open(tmp_path, keep):
    write(tmp_path, shards=2)
    shard = tmp_path / "consolidated.01.pth"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth: is ") as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    del caught
    if Path("/proc/self/fd").exists():
        held = [os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()]
        assert not [f for f in held if str(tmp_path) in f]
        assert not mapped_ranges(tmp_path)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "\n <?xml version='1.0'?><Error>"])
def test_a_web_page_is_not_taken_for_a_shard(tmp_path, text):
    write(tmp_path)
    (tmp_path / "consolidated.00.pth").write_text(text)
    with pytest.raises(ValueError, match="is a web page or XML, no weights; download it again"):
        open_checkpoint(tmp_path)


def test_memory_for_weights_is_not_cut_from_what_temporaries_left(monkeypatch):
    """torch would keep the rest of a larger block for as long as the weight lives."""
    given_back = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    for left, times in ((2**20, 0), (2**26, 1)):
        monkeypatch.setattr(
            torch.cuda, "memory_reserved", lambda device, left=left: 5 * 2**20 + left
        )
        make_room(torch.device("cuda"))
        make_room(torch.device("cpu"))
        assert len(given_back) == times
