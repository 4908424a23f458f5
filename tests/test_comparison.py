"""Two models on one text: sums equal to their formulas, few logits at a time, and the commands."""

import math
import re
import sys

import pytest
import torch
from conftest import BYTES_VOCAB, tiny_args, write_tokenizer

from llama import Llama
from llama.checkpoint import open_checkpoint, random_checkpoint, write_meta, write_quantized
from llama.commands.compare import (
    Difference,
    compare_all,
    compare_two,
    decode_speed,
    table,
    weight_bytes,
)
from llama.commands.scoring import score

TEXT = "".join(chr(97 + i * i % 23) for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    args = tiny_args(vocab_size=BYTES_VOCAB, context_length=512)
    write_meta(random_checkpoint(args, dtype=torch.float32), path)
    write_tokenizer(path / "tokenizer.model")
    return path


def same_files(one, other):
    """Whether two folders hold the same files, byte for byte."""
    names = [sorted(file.name for file in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[0]
    )


def built(folder, **options):
    return Llama.build(folder, max_seq_len=512, device="cpu", **options)


def test_a_difference_is_what_its_formulas_say_however_it_was_added():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (2 * torch.randn(60, 30, generator=generator) for _ in range(2))
    theirs = ours + theirs / 4
    targets = torch.randint(30, (60,), generator=generator)
    found = Difference()
    for rows in torch.arange(60).split(13):
        found.add(ours[rows], theirs[rows], targets[rows])
    p, q = (each.double().softmax(-1) for each in (theirs, ours))
    more = (p / q).log()[torch.arange(60), targets]
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found.same_top == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.largest == pytest.approx(float((ours - theirs).abs().max()))
    assert found.ratio == pytest.approx(math.exp(more.mean()), rel=1e-6)
    error = float(more.std()) / 60**0.5
    assert found.ratio_error == pytest.approx(found.ratio * error, rel=1e-5)
    assert (
        error < 0.5 * float(q.log()[torch.arange(60), targets].std()) / 60**0.5
    )  # for it is paired


def test_both_scores_are_those_of_each_model_alone(folder):
    llama, other = built(folder, quantize="int4"), built(folder)
    for window, stride in ((64, 16), (300, None)):
        limits = {"window": window, "stride": stride}
        found, ours, theirs = compare_two(llama, other, TEXT, **limits)
        for each, result in ((llama, ours), (other, theirs)):
            alone = score(each, TEXT, **limits)
            assert result.tokens == alone.tokens == found.tokens == len(TEXT)
            assert result.mean == pytest.approx(alone.mean, abs=1e-5)
            assert result.error == pytest.approx(alone.error, abs=1e-5)
            assert (result.size, result.window, result.stride) == (
                alone.size, alone.window, alone.stride)  # fmt: skip
        assert found.ratio == pytest.approx(ours.perplexity / theirs.perplexity, rel=1e-6)
        assert 0 < found.kl < 0.1
        assert 0.5 < found.same_top < 1
    same = compare_two(other, built(folder), TEXT, window=64)[0]
    assert (same.kl, same.same_top, same.largest, same.ratio) == (0, 1, 0, 1)


def test_few_logits_exist_at_one_time(folder, monkeypatch):
    llama, other = built(folder, quantize="int8"), built(folder)
    rows = []
    for each in (llama, other):
        plain = each.model.logits
        monkeypatch.setattr(
            each.model, "logits", lambda h, plain=plain: rows.append(len(h)) or plain(h)
        )
    compare_two(llama, other, TEXT, window=512)
    assert max(rows) == 256
    assert sum(rows) == 2 * len(TEXT)


def test_models_that_cannot_be_compared_are_refused(folder, tmp_path):
    write_meta(random_checkpoint(tiny_args(vocab_size=515, context_length=512)), tmp_path)
    write_tokenizer(tmp_path / "tokenizer.model", ["ab"])
    with pytest.raises(ValueError, match="different tokenizers, so they cannot be compared"):
        compare_two(built(folder), built(tmp_path), TEXT, window=64)
    with pytest.raises(ValueError, match="the text is empty"):
        compare_two(built(folder), built(folder), "", window=64)
    with pytest.raises(ValueError, match="window is 1"):
        compare_two(built(folder), built(folder), TEXT, window=1)


def test_bytes_and_speed_are_those_of_the_model(folder):
    llama = built(folder)
    assert weight_bytes(llama) == 4 * open_checkpoint(folder).parameters
    assert weight_bytes(built(folder, quantize="int8")) < weight_bytes(llama) / 2
    assert 0 < decode_speed(llama) < math.inf
    assert math.isnan(decode_speed(Llama.build(folder, max_seq_len=3, device="cpu")))


def test_a_table_has_a_row_for_each_model_and_the_other_first(folder):
    makers = {name: lambda name=name: built(folder, quantize=name) for name in ("int8", "int4")}
    rows, is_main = compare_all(makers, "base", lambda: built(folder), TEXT, window=64)
    assert is_main
    assert [row.name for row in rows] == ["base", "int8", "int4"]
    assert rows[0].difference is None
    assert rows[1].difference.kl < rows[2].difference.kl
    lines = table(rows)
    assert len({len(line) for line in lines}) == 1
    assert "KL divergence" in lines[0]
    alone, _ = compare_all(makers, None, None, TEXT, window=64)
    assert [row.difference for row in alone] == [None, None]
    assert "KL divergence" not in table(alone)[0]
    assert alone[0].score.mean == pytest.approx(rows[1].score.mean, abs=1e-5)


def test_the_command_prints_several_recipes_beside_what_they_are_compared_with(
    shell, folder, tmp_path
):
    file = tmp_path / "text"
    file.write_text(TEXT)
    recipe = '{"layers": "fp8"}'
    given = ("perplexity", folder, file, "--window", 64, "--device", "cpu")
    status, out, error = shell(*given, "--quantize", "int8", f"--quantize={recipe}",
                               "--against", folder)  # fmt: skip
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["weights", str(folder), "int8", recipe]
    assert re.search(r"[+-]\d+\.\d{3} \+- \d\.\d{3} %  +\d\.\d\de-\d\d  +\d+\.\d\d %", lines[2])
    status, out, _ = shell(*given, "--quantize", "int4")
    assert [line.split()[0] for line in out.splitlines()] == ["weights", "int4"]
    packed = write_quantized(open_checkpoint(folder), tmp_path / "packed", "int4")
    status, out, _ = shell("perplexity", packed, file, "--window", 64, "--against", folder)
    assert len(out.splitlines()) == 3
    status, _, error = shell(*given, "--quantize", "int8", "--quantize", "int5")
    assert status == 1
    assert error.startswith("quantize='int5': use one of")


def test_perplexity_prints_the_table_of_compare_as_before(shell, folder, tmp_path):
    file = tmp_path / "text"
    file.write_text(TEXT)

    def columns(name, *flags):
        """The table without the speeds, which differ from run to run."""
        given = (folder, file, "--window", 64, "--device", "cpu")
        status, out, error = shell(name, *given, *flags)
        assert (status, error) == (0, "")
        return [re.sub(r"\s+\S+$", "", line) for line in out.splitlines()]

    for flags in (
        ("--quantize", "int8", "--quantize", "int4", "--against", folder),
        ("--quantize", "int8"),
        ("--against", folder),
    ):
        assert columns("compare", *flags) == columns("perplexity", *flags)
    error = shell("compare", folder, file)[2]
    assert error == "there is nothing to compare: give --quantize, or --against, or both\n"


def test_the_page_of_compare_explains_each_column(shell, folder):
    page = shell("compare", "--help")[1]
    rows, _ = compare_all({"x": lambda: built(folder)}, "base", lambda: built(folder), TEXT,
                          window=64)  # fmt: skip
    titles = re.split(r"  +", table(rows)[0])
    assert len(titles) == 8
    for title in titles:
        assert re.search(rf"^    {re.escape(title)}  ", page, re.M), title


def test_the_commands_take_a_quantized_folder_and_make_one(shell, folder, tmp_path):
    packed = tmp_path / "packed"
    status, out, error = shell("quantize", folder, packed, "--quantize", "mixed", "--device", "cpu")
    assert (status, error) == (0, "")
    assert out.startswith(f"{packed}: ")
    out = shell("info", packed)[1]
    assert re.search(r"^on disk .*int8 \(15\), float32 \(6\), recipe mixed$", out, re.M)
    assert re.search(r"on a CPU .*weights \(mapped\)", out)
    assert "int4-64, int8, float32," in shell("info", folder, "--quantize", "int4")[1]
    assert shell("verify", packed)[0] == 0
    said = [shell("complete", "abc", "--ckpt_dir", path, "--temperature", 0, *flags)[1]
            for path, flags in ((packed, ()), (folder, ("--quantize", "mixed")))]  # fmt: skip
    assert said[0] == said[1]
    again = tmp_path / "again"
    assert shell("convert", folder, again, "--to", "meta", "--quantize", "mixed", "--device", "cpu")
    assert same_files(again, packed)
    status, out, _ = shell("convert", packed, tmp_path / "meta", "--format", "meta")
    assert status == 0
    assert open_checkpoint(tmp_path / "meta").dtype == torch.float32
    status, _, error = shell("quantize", folder, packed, "--quantize", "int8")
    assert (status, error) == (1, f"{packed} is not empty; give a new or empty folder\n")


def test_a_plot_says_what_it_needs_before_anything_is_done(shell, folder, tmp_path, monkeypatch):
    file = tmp_path / "text"
    file.write_text(TEXT)
    given = ("perplexity", folder, file, "--window", 64, "--quantize", "int8", "--plot")
    assert shell(*given, tmp_path / "x.txt")[2].endswith("is written as .png, .pdf or .svg\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, error = shell(*given, tmp_path / "x.png")
    assert (status, out) == (1, "")
    assert error == "a plot needs a package that is not installed: pip install -e '.[plot]'\n"


def test_a_plot_is_written(shell, folder, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "text"
    file.write_text(TEXT)
    status, _, error = shell("perplexity", folder, file, "--window", 64, "--quantize", "int8",
                             "--against", folder, "--plot", tmp_path / "x.svg")  # fmt: skip
    assert (status, error) == (0, "")
    assert "int8" in (tmp_path / "x.svg").read_text() or (tmp_path / "x.svg").stat().st_size > 2000
