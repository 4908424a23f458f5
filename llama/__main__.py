"""`python -m llama COMMAND ...`: one function a command, through fire.

Refuses to know how anything is done: a command asks the rooms below and prints what they say. The
surprising thing: its options, and what `--help` says of them, are the functions' own signatures and
docstrings.
"""

import json as json_format
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path

from llama.terminal.lines import ctrl_c_ends

with ctrl_c_ends(__name__ == "__main__"):  # also while torch is imported: that takes seconds
    from llama.checkpoint import convert as write_format
    from llama.checkpoint import merge_adapter, open_checkpoint, write_quantized
    from llama.checkpoint import reshard as write_shards
    from llama.commands import bench as benching
    from llama.commands import chat as talking
    from llama.commands.compare import check_plot, compare_all, table
    from llama.commands.compare import plot as draw
    from llama.commands.info import inspect, tokenizer_alone
    from llama.commands.perplexity import check_window, default_window, score
    from llama.files.checklist import verify as find_problems
    from llama.generation import Llama
    from llama.loading.settings import CHUNK_ROWS, as_dtype, dtype_name
    from llama.parallel import is_first_process, local_device
    from llama.quantization import formats_of
    from llama.sampling import SamplingParams
    from llama.terminal import arguments as cli

DEMO = str(Path(__file__).parent / "demo")


def info(
    ckpt_dir: str,
    *,
    max_batch_size: int = 1,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    model_parallel_size: int = 1,
    quantize: str | None = None,
) -> None:
    """Say what lies in a folder of weights, and what running it would take.

    Ends with status 1 where main memory does not suffice for that.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's, or a .gguf file.
        max_batch_size: sequences that run at one time.
        max_seq_len: tokens of a sequence, prompt and answer; what Llama.build takes by default.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        model_parallel_size: processes that share the model.
        quantize: int8, fp8, int4, mixed, or formats by part of the model; as stored by default.
    """
    report = inspect(ckpt_dir, max_batch_size, max_seq_len, dtype, model_parallel_size, quantize)
    _say(report.rows)
    if not report.fits:
        sys.exit(1)


def chat(
    ckpt_dir: str = DEMO,
    *,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_gen_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    system: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> None:
    """Talk with a model in the terminal, or line by line through a pipe.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's; the demo by default.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        max_seq_len: tokens of the conversation that the model sees; what Llama.build takes.
        max_gen_len: tokens of an answer at most; by default all that there is room for.
        temperature: 0 takes the most probable token, more is more varied.
        top_p: the share of probability that tokens are sampled from.
        seed: another number gives other answers.
        system: the system prompt.
        device: cuda, cuda:N, mps or cpu; by default the first of them there is.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        quantize: int8, fp8, int4, mixed, or formats by part of the model; as stored by default.
    """
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=_positive(max_gen_len, "max_gen_len")
    )
    cli.as_typed(system or "", "--system")
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
    )
    about = "The demo, which knows a very small world. " if ckpt_dir == DEMO else ""
    room = llama.engine.max_seq_len
    hello = f"{about}{room} tokens of context. /help lists what else can be done."
    if not talking.chat(llama, params, system, hello):
        sys.exit(1)  # stderr has the sentences


def complete(
    text: str | None = None,
    *,
    ckpt_dir: str = DEMO,
    tokenizer_path: str | None = None,
    file: str | None = None,
    max_gen_len: int | None = 128,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    stop: tuple[str, ...] = (),
    max_seq_len: int | None = None,
    json: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
) -> None:
    """Continue a text, which is given here, in a file, or on standard input.

    Args:
        text: the beginning, as it is; without it and --file, or as -, standard input is read.
        ckpt_dir: folder of weights, Meta's or Hugging Face's; the demo by default.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        file: read the beginning from here. One line end at its end is left out, as on standard
            input.
        max_gen_len: new tokens at most; None: all that there is room for.
        temperature: 0 takes the most probable token, more is more varied.
        top_p: the share of probability that tokens are sampled from.
        seed: another number gives another text.
        stop: end before this text; may be given several times.
        max_seq_len: tokens of beginning and continuation; what Llama.build takes by default.
        json: print one JSON object in place of the text.
        device: cuda, cuda:N, mps or cpu; by default the first of them there is.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        quantize: int8, fp8, int4, mixed, or formats by part of the model; as stored by default.
    """
    limit = _positive(max_gen_len, "max_gen_len")
    SamplingParams(temperature=temperature, top_p=top_p)  # says what is wrong before much is done
    for text_of_stop in stop:
        cli.as_typed(text_of_stop, "--stop")
    from_input = (text if file is None else file) in (None, "-")
    given = "" if from_input else _beginning(text, file)
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, device=device, dtype=dtype, quantize=quantize
    )
    if from_input:
        given = _told(llama, partial(_beginning, text, file))
    pieces = llama.stream_text_completion([given], temperature, top_p, limit, seed=seed, stop=stop)
    said, tokens, reason = "", 0, None
    for piece in pieces:
        said, tokens = said + piece.text, tokens + (piece.token is not None)
        reason = piece.finish_reason
        if llama.is_main and not json:
            print(piece.text, end="", flush=True)
    if llama.is_main and json:
        print(cli.as_json({"prompt": given, "generation": said, "finish_reason": reason,
                           "tokens": tokens}))  # fmt: skip
    elif llama.is_main:
        print()


def tokenize(
    text: str | None = None,
    *,
    ckpt_dir: str = DEMO,
    tokenizer_path: str | None = None,
    file: str | None = None,
    bos: bool = False,
    decode: str | None = None,
    json: bool = False,
) -> None:
    """Show the token ids of a text, or the text of token ids.

    Args:
        text: as it is; without it, --file and --decode, or as -, standard input is read, to its
            last byte.
        ckpt_dir: folder with tokenizer.model or tokenizer.json; the demo by default.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        file: read the text from here.
        bos: begin with the begin-of-text token.
        decode: ids, with blanks or commas between them, whose text is printed.
        json: print one JSON object.
    """
    tokenizer = tokenizer_alone(ckpt_dir, tokenizer_path)
    if decode is not None:
        if text is not None or file is not None:
            raise ValueError("give either a text or --decode")
        ids = _ids(decode)
        whole = tokenizer.decode(ids)
    else:
        whole = _given(text, file)
        ids = tokenizer.encode(whole, bos=bos, eos=False)
    special = {number: name for name, number in tokenizer.special_tokens.items()}
    pieces = [
        special.get(i) or tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids
    ]
    if json:
        found = {"text": whole, "count": len(ids), "ids": ids, "pieces": pieces}
        print(cli.as_json(found))
    elif decode is not None:
        print(whole)
    else:
        for number, piece in zip(ids, pieces, strict=True):
            print(f"{number:7}  {json_format.dumps(piece, ensure_ascii=False)}")


def perplexity(
    ckpt_dir: str,
    text_file: str,
    *,
    tokenizer_path: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: cli.SEVERAL = (),
    against: str | None = None,
    plot: str | None = None,
) -> None:
    """Say how well a model expects a text.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's.
        text_file: the text, in UTF-8.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        window: tokens that the model sees at one time, begin-of-text among them; by default 2048,
            or the model's context where that is shorter.
        stride: tokens by which the window moves on; by default half a window. Each token is
            scored once, after at least window - 1 - stride others (but for the first window's).
        device: cuda, cuda:N, mps or cpu; by default the first of them there is.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
        quantize: as for chat; may be given several times, for a table with a row for each.
        against: folder of weights that each row is compared with: ckpt_dir itself, or another.
        plot: file to draw quality against size to, .png, .pdf or .svg.
    """
    text = cli.read_text(text_file)
    checkpoint = open_checkpoint(ckpt_dir)
    for recipe in quantize:
        formats_of(recipe, checkpoint.args)  # says what is wrong before much is done
    if plot is not None:
        check_plot(plot)
    context = checkpoint.args.context_length
    if against is not None:
        context = min(context, open_checkpoint(against).args.context_length)
    window = default_window(context) if window is None else window
    stride = check_window(window, stride)
    slots = max(1, CHUNK_ROWS // window)  # what fills a step

    def build(folder: str, recipe: str | None = None) -> Llama:
        return Llama.build(
            folder, tokenizer_path, window, slots, device=device, dtype=dtype, quantize=recipe
        )

    if quantize or against is not None or plot is not None:
        makers = {recipe: partial(build, ckpt_dir, recipe) for recipe in quantize}
        base = None if against is None else partial(build, against)
        makers = makers or {ckpt_dir: partial(build, ckpt_dir)}
        rows, is_main = compare_all(makers, against, base, text, window=window, stride=stride)
        if is_main:
            print("\n".join(table(rows)))
        if is_main and plot is not None:
            draw(rows, plot)
        return
    llama = build(ckpt_dir)
    result = score(llama, text, window=window, stride=stride, show_progress=llama.is_main)
    if llama.is_main:
        _say(result.words())


def bench(
    ckpt_dir: str | None = None,
    *,
    shape: str | None = None,
    rows: str | None = None,
    contexts: str | None = None,
    lengths: str | None = None,
    steps: int | None = None,
    json: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    kernels: bool = True,
) -> None:
    """Measure how fast a model runs here, as a share of what this machine can do.

    Args:
        ckpt_dir: folder of weights, Meta's or Hugging Face's, or a .gguf file.
        shape: 1B, 3B, 8B or 70B, in place of a folder: random weights, made on the device.
        rows: sequences that decode at one time, such as 1,8,32.
        contexts: tokens that each of them has before it decodes, such as 128,4096.
        lengths: tokens of the prompts whose prefill is measured, such as 512,2048.
        steps: steps of decode that are timed. What is not given suits the device.
        json: print one JSON object in place of the table.
        device: cuda, cuda:N, mps or cpu; by default the first of them there is.
        dtype: float32, bfloat16 or float16; by default the checkpoint's own, for a shape bfloat16.
        quantize: int8, fp8, int4 or mixed: quantize the weights as they are loaded.
        kernels: whether an NVIDIA GPU runs this library's kernels, or the plain model.
    """
    where = local_device(device)
    work = benching.work_for(where, rows, contexts, lengths, steps)
    name, checkpoint = benching.choose(ckpt_dir, shape, work, where, dtype)
    report = benching.measure(
        name,
        checkpoint,
        work,
        device=where,
        dtype=as_dtype(dtype),
        quantize=quantize,
        kernels=kernels,
        show_progress=True,
    )
    print(json_format.dumps(asdict(report)) if json else "\n".join(benching.lines(report)))


def reshard(src: str, dst: str, shards: int, *, dtype: str | None = None) -> None:
    """Write a model in another number of files, in Meta's format.

    Args:
        src: folder of weights, Meta's or Hugging Face's.
        dst: a new folder; nothing of that name stands there before everything is whole.
        shards: how many files.
        dtype: float32, bfloat16 or float16; the checkpoint's own by default.
    """
    checkpoint = open_checkpoint(src)
    folder = write_shards(checkpoint, dst, shards=shards, dtype=as_dtype(dtype), show_progress=True)
    size = sum(file.stat().st_size for file in folder.glob("consolidated.*.pth"))
    print(f"{folder}: {shards} shard{'s' * (shards > 1)}, {size:,} bytes")


def convert(
    src: str,
    dst: str,
    format: str,
    *,
    shards: int = 1,
    dtype: str | None = None,
    type: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write a model, and its tokenizer, in another format.

    Args:
        src: folder of weights, Meta's files or Hugging Face's, or a .gguf file.
        dst: a new folder; for gguf, a new file.
        format: meta (params.json and consolidated.NN.pth), hf (Hugging Face's) or gguf.
        shards: how many files, in Meta's format.
        dtype: bf16, f16 or f32; the checkpoint's own by default.
        type: q8_0 or q4_0, for gguf: quantizes the matrices.
        adapter: folder of a LoRA adapter, which is added to the weights.
    """
    kind = as_dtype(dtype)
    checkpoint = open_checkpoint(src)
    if adapter is not None:
        checkpoint = merge_adapter(checkpoint, adapter)
    write_format(checkpoint, dst, format, shards=shards, dtype=kind, type=type, show_progress=True)
    what = type or dtype_name(kind or checkpoint.dtype)
    print(f"{dst}: {checkpoint.parameters:,} parameters, {what}")


def quantize(src: str, dst: str, quantize: str, *, device: str | None = None) -> None:
    """Write a model with quantized weights, and its tokenizer, which then load as they are.

    Args:
        src: folder of weights, Meta's or Hugging Face's, or a .gguf file.
        dst: a new folder; nothing of that name stands there before everything is whole.
        quantize: int8, fp8, int4, mixed, or formats by part of the model.
        device: where it is computed: cuda, cuda:N, mps or cpu; the first of them there is.
    """
    checkpoint = open_checkpoint(src)
    where = local_device(device)
    folder = write_quantized(checkpoint, dst, quantize, device=where, show_progress=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {checkpoint.parameters:,} parameters, {size:,} bytes")


def _say(rows: Mapping[str, str]) -> None:
    for title, words in rows.items():
        print(f"{title:15}  {words}")


def _positive(number: int | None, name: str) -> int | None:
    """ValueError below 0; 0 means None, as in Meta's code."""
    if number is not None and number < 0:
        raise ValueError(f"--{name} is {number}; it must be a whole number above 0, or None")
    return number or None


def _given(text: str | None, file: str | None) -> str:
    """The text as it was typed, or that of the file, or of standard input."""
    if text is not None and file is not None:
        raise ValueError("give either a text or --file")
    if text is None or text == "-":
        return cli.read_text(file)
    return cli.as_typed(text, "the text")


def _beginning(text: str | None, file: str | None) -> str:
    """The same, without the line end that files have; ValueError where a file is empty."""
    given = _given(text, file)
    if text not in (None, "-"):
        return given
    given = given.removesuffix("\n").removesuffix("\r")
    if not given:
        where = "standard input" if file in (None, "-") else file
        raise ValueError(f'{where} is empty: give a text; "" stands for one that just begins')
    return given


def _told(llama: Llama, read: Callable[[], str]) -> str:
    """What one rank alone can read, on every rank; ends all of them where it cannot."""
    ranks, text, problem = llama.model.ranks, "", None
    try:
        text = read() if llama.is_main else ""
    except (ValueError, OSError) as error:
        problem = error
    ranks.agree(problem, "reading the text")
    return ranks.tell(text.encode()).decode()


def _ids(text: str) -> list[int]:
    words = re.findall(r"[^\s,\[\]]+", text)
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ValueError(f"--decode has {wrong[0]!r}; it must be token ids, as in 1,2 or 1 2")
    return [int(word) for word in words]


def verify(ckpt_dir: str = DEMO) -> None:
    """Compare the files of a folder with its checklist.chk, and name those that differ.

    Args:
        ckpt_dir: folder with checklist.chk and the files it lists; the demo by default.
    """
    problems = find_problems(ckpt_dir)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{ckpt_dir}: all files are what the checklist says")


def _once(command: cli.Command) -> cli.Command:
    """`command`, which several processes of torchrun do not share: the first does it for all."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        if is_first_process():
            command(*args, **kwargs)

    return run


COMMANDS: dict[str, cli.Command] = {
    "bench": bench,
    "chat": chat,
    "complete": complete,
    "convert": _once(convert),
    "info": _once(info),
    "perplexity": perplexity,
    "quantize": _once(quantize),
    "reshard": _once(reshard),
    "tokenize": _once(tokenize),
    "verify": _once(verify),
}


def main() -> None:
    cli.run(COMMANDS, "python -m llama")


if __name__ == "__main__":
    main()
