"""LoRA adapters: what is added is scale * B A, the same on every rank; all else is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_args, write_adapter
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama import Llama
from llama.checkpoint import (
    convert,
    merge_adapter,
    open_checkpoint,
    random_checkpoint,
    write_hf,
    write_meta,
)
from llama.checkpoint.hf.adapter import Merged
from llama.checkpoint.hf.read import hf_name
from llama.loading import load
from llama.names import local_slice
from llama.parallel import ONE, Ranks

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ARGS = dict(hidden_dim=96, max_seq_len=512)


@pytest.fixture
def folders(tmp_path):
    source = random_checkpoint(tiny_args(**ARGS), dtype=torch.float32)
    write_meta(source, tmp_path / "meta")
    write_hf(source, tmp_path / "hf")
    return tmp_path


def merged_by_hand(folder, pairs, scale):
    """transformers' model of a folder with W + scale * B A put into it by their names."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            model.get_parameter(hf_name(name)).add_(scale * (b @ a))
    return model


@pytest.mark.parametrize("base", ["meta", "hf"])
@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        (dict(), 2.0),
        (dict(r=9, lora_alpha=3), 1 / 3),
        (dict(use_rslora=True, lora_alpha=3), 1.5),
        (dict(target_modules="all-linear"), 2.0),
    ],
)
def test_logits_equal_those_of_the_sum(folders, base, changes, scale):
    pairs = write_adapter(folders / "adapter", tiny_args(**ARGS), MODULES, **changes)
    assert len(pairs) == 7 * 2 + 1
    checkpoint = merge_adapter(open_checkpoint(folders / base), folders / "adapter")
    ids = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = merged_by_hand(folders / "hf", pairs, scale)(ids).logits
        plain = load(open_checkpoint(folders / base), ranks=ONE, device="cpu")(ids, 0)
        got = load(checkpoint, ranks=ONE, device="cpu")(ids, 0)
    assert (plain - expected).abs().max() > 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["meta", "hf", "meta in shards"])
def test_every_range_and_every_rank_gets_the_same_sums(folders, base, monkeypatch):
    monkeypatch.setattr("llama.checkpoint.hf.adapter._TILE", 24)
    monkeypatch.setattr("llama.checkpoint.hf.adapter._BLOCK", 640)
    args = tiny_args(**ARGS)
    write_adapter(folders / "adapter", args, MODULES)
    if base == "meta in shards":
        write_meta(open_checkpoint(folders / "hf"), folders / base, shards=4)
    checkpoint = merge_adapter(open_checkpoint(folders / base), folders / "adapter")
    whole = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in checkpoint.tensors.items():
        assert isinstance(tensor, Merged) == (len(tensor.shape) == 2 and "tok" not in name)
        for dim, size in enumerate(tensor.shape):
            for start, stop in ((0, 1), (size // 3, size // 2 + 1), (5, 5), (7, size)):
                part = tensor.read(dim, start, stop)
                assert torch.equal(part, whole[name].narrow(dim, start, stop - start)), name
    for size in (1, 2, 4, 8):
        for rank in range(size):
            model = load(checkpoint, ranks=Ranks(rank, size), device="cpu")
            for name, tensor in whole.items():
                cut = local_slice(name, args, rank, size)
                part = tensor.narrow(cut[0], cut[1], cut[2] - cut[1]) if cut else tensor
                assert torch.equal(model.get_parameter(name), part), (name, rank, size)


def test_sums_are_in_float32_and_rounded_once(tmp_path, caplog):
    args = tiny_args(**ARGS)
    write_hf(random_checkpoint(args), tmp_path / "hf")
    pairs = write_adapter(tmp_path / "adapter", args, ["v_proj"])
    base = open_checkpoint(tmp_path / "hf")
    checkpoint = merge_adapter(base, tmp_path / "adapter")
    assert (base.dtype, checkpoint.dtype) == (torch.bfloat16, torch.bfloat16)
    name = "layers.1.attention.wv.weight"
    a, b = pairs[name]
    expected = base.tensors[name].read().float() + 2 * (b @ a)
    torch.testing.assert_close(checkpoint.tensors[name].read(), expected, rtol=0, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        model = load(checkpoint, ranks=ONE, device="cpu", dtype=dtype)
        assert torch.equal(model.get_parameter(name), checkpoint.tensors[name].read().to(dtype))
    assert not caplog.records
    write_hf(checkpoint, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16


def change(path, tensors=None, **config):
    file = path / "adapter_config.json"
    said = json.loads(file.read_text()) | config
    file.write_text(json.dumps(said))
    if tensors is not None:
        held = load_file(path / "adapter_model.safetensors")
        tensors(held)
        save_file(held, path / "adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
MOVED = {f"{Q0}.lora_C.weight": torch.ones(4, 64)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "peft_type 'IA3'; LORA is read"),
        (dict(task_type="SEQ_CLS"), "for the task 'SEQ_CLS'"),
        (dict(use_dora=True), "use_dora True: DoRA"),
        (dict(modules_to_save=["embed_tokens"]), "modules_to_save .*whole modules .*holds none"),
        (dict(modules_to_save="embed_tokens"), "modules_to_save is 'embed_tokens', no list"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out True: transposed"),
        (dict(bias="all"), "bias 'all'"),
        (dict(rank_pattern={"q_proj": 8}), r"is \(4, 64\), and .* r 8 it should be \(8, 64\)"),
        (dict(rank_pattern={"q_proj": "8"}), "rank_pattern q_proj needs to be a whole number"),
        (dict(rank_pattern=["q_proj"]), "no object of patterns"),
        (dict(alpha_pattern={"q_proj": True}), "alpha_pattern q_proj needs to be a number"),
        (dict(alpha_pattern={"(.+)+x": 8}), r"alpha_pattern has the pattern '\(\.\+\)\+x'"),
        (dict(alpha_pattern={"(": 8}), "which is not read"),
        (dict(alpha_pattern={"a" * 501: 8}), "which is not read"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
        (dict(alora_invocation_tokens=[1, 2]), "depend on the text"),
        (dict(something_new=[1]), r"something_new \[1\]; it cannot be merged"),
        (dict(init_lora_weights="pissa"), "'pissa', which changes the base's weights"),
        (dict(target_modules=["q_proj", "wte"]), "changes 'wte'"),
        (dict(r=8), r"is \(4, 64\), and for this model and r 8 it should be \(8, 64\)"),
        (dict(r=0), "r needs to be a whole number"),
        (dict(lora_alpha="16"), "lora_alpha needs to be a number"),
        (dict(use_rslora=1), "use_rslora is 1"),
        (dict(tensors=lambda t: t.pop(f"{Q0}.lora_B.weight")), "only lora_A for model.layers.0"),
        (dict(tensors=lambda t: t.update(MOVED)), "lora_C.weight is nothing that can be merged"),
        (dict(tensors=lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(32, 4)})),
         r"lora_B.weight is \(32, 4\), and .* \(64, 4\)"),
        (dict(tensors=lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(64, 4).long()})),
         "lora_B.weight is I64"),
        (dict(tensors=lambda t: t.clear()), "holds no tensors"),
        (dict(tensors=lambda t: t.update({Q0.replace("0", "7") + ".lora_A.weight":
                                          torch.ones(4, 64)})), "layers.7.self_attn"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(folders, changes, message):
    write_adapter(folders / "adapter", tiny_args(**ARGS))
    change(folders / "adapter", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        merge_adapter(open_checkpoint(folders / "hf"), folders / "adapter")
    assert str(caught.value).startswith(str(folders / "adapter"))
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_adapters(folders):
    base = open_checkpoint(folders / "hf")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        merge_adapter(base, folders / "hf")
    write_adapter(folders / "adapter", base.args)
    (folders / "adapter/adapter_model.safetensors").rename(folders / "adapter/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"is missing; adapter_model\.bin is a pickle"):
        merge_adapter(base, folders / "adapter")
    with pytest.raises(ValueError, match="is an adapter; give it as adapter="):
        open_checkpoint(folders / "adapter")


PEFT_CASES = {
    "lm_head": dict(target_modules=["q_proj", "lm_head"]),
    "embed_tokens": dict(target_modules=["embed_tokens", "k_proj"]),
    "both": dict(target_modules=["embed_tokens", "lm_head"], use_rslora=True),
    "both whole": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "embed_tokens whole": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "lm_head whole": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "norms whole": dict(target_modules=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "k_proj whole": dict(target_modules=["q_proj"], modules_to_save=["k_proj"]),
    "patterns": dict(
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern={"q_proj": 6, r"layers\.1\.self_attn\.k_proj": 2},
        alpha_pattern={"^model.layers.0.*q_proj": 3, "v_proj": 5},
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_logits_are_pefts(tmp_path, case, tied):
    peft = pytest.importorskip("peft")
    args = tiny_args(**ARGS, tied=tied)
    write_hf(random_checkpoint(args, dtype=torch.float32), tmp_path / "hf")

    def made():
        return LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **PEFT_CASES[case])
    tuned = peft.get_peft_model(made(), config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(made(), tmp_path / "adapter").eval()
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    base = open_checkpoint(tmp_path / "hf")
    merged = merge_adapter(base, tmp_path / "adapter")
    with torch.inference_mode():
        expected = theirs(ids).logits
        plain = load(base, ranks=ONE, device="cpu")(ids, 0)
        got = load(merged, ranks=ONE, device="cpu")(ids, 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert (plain - expected).abs().max() > 0.05
        write_hf(merged, tmp_path / "out")  # where the two have become two, config.json says so
        again = load(open_checkpoint(tmp_path / "out"), ranks=ONE, device="cpu")(ids, 0)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-4)


def test_ties_that_an_adapter_is_to_keep_are_refused(tmp_path):
    args = tiny_args(**ARGS, tied=True)
    write_adapter(tmp_path / "adapter", args, ["lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="ensure_weight_tying True and changes embeddings"):
        merge_adapter(random_checkpoint(args), tmp_path / "adapter")


def test_build_takes_an_adapter_and_writes_none_into_the_base(folders, byte_tokenizer):
    from conftest import BYTES_VOCAB

    args = tiny_args(**ARGS, vocab_size=BYTES_VOCAB)
    write_hf(random_checkpoint(args), folders / "b", tokenizer=byte_tokenizer)
    write_adapter(folders / "adapter", args, MODULES)
    before = (folders / "b/model.safetensors").read_bytes()
    plain = Llama.build(folders / "b", max_seq_len=64)
    merged = Llama.build(folders / "b", max_seq_len=64, adapter=folders / "adapter")
    texts = [each.text_completion(["Hello"], 0, max_gen_len=20) for each in (plain, merged)]
    assert texts[0] != texts[1]
    assert (folders / "b/model.safetensors").read_bytes() == before


@pytest.mark.peer
def test_peft_merges_to_the_same_logits(folders):
    peft = pytest.importorskip("peft")
    base = LlamaForCausalLM.from_pretrained(folders / "hf", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
                             init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(folders / "peft")
    ids = torch.randint(0, 96, (2, 100))
    for name in ("meta", "hf"):
        checkpoint = merge_adapter(open_checkpoint(folders / name), folders / "peft")
        with torch.inference_mode():
            got = load(checkpoint, ranks=ONE, device="cpu")(ids, 0)
            torch.testing.assert_close(got, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.peer
def test_an_adapter_trained_on_the_exported_demo_is_the_same_here(tmp_path):
    peft = pytest.importorskip("peft")
    demo = Path(__file__).parent.parent / "llama" / "demo"
    convert(open_checkpoint(demo), tmp_path / "hf", "hf", dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "down_proj"])
    theirs = peft.get_peft_model(base, config)
    ids = torch.randint(0, 1000, (2, 64))
    steps = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        theirs(ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()
    theirs.save_pretrained(tmp_path / "adapter")
    llama = Llama.build(demo, max_batch_size=2, max_seq_len=64, device="cpu", dtype="float32",
                        adapter=tmp_path / "adapter")  # fmt: skip
    plain = Llama.build(demo, max_batch_size=2, max_seq_len=64, device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = theirs.eval()(ids).logits
        torch.testing.assert_close(llama.model(ids, 0), expected, rtol=0, atol=1e-4)
        assert (plain.model(ids, 0) - expected).abs().max() > 0.1
