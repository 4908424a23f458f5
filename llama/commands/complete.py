"""`complete`: one text continued, printed as it comes; for programs one JSON object."""

from collections.abc import Callable
from functools import partial

from llama.commands.common import DEMO, given_text, positive
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.terminal.arguments import as_json, as_typed


def complete(
    ckpt_dir: str = DEMO,
    text: str | None = None,
    *,
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

    One word by position is the text; of two, the first is the folder.

        python -m llama complete "The capital of Italy is" --max_gen_len 20 --stop .
        python -m llama complete Meta-Llama-3-8B "The capital of Italy is" --json
        python -m llama complete Meta-Llama-3-8B --file beginning.txt

    Args:
        text: the beginning, as it is; without it and --file, or as -, standard input is read.
        file: read the beginning from here. One line end at its end is left out, as on standard
            input.
        stop: end before this text; may be given several times.
        json: print one JSON object in place of the text.
    """
    limit = positive(max_gen_len, "max_gen_len")
    SamplingParams(temperature=temperature, top_p=top_p)  # says what is wrong before much is done
    for text_of_stop in stop:
        as_typed(text_of_stop, "--stop")
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
        print(as_json({"prompt": given, "generation": said, "finish_reason": reason,
                           "tokens": tokens}))  # fmt: skip
    elif llama.is_main:
        print()


def _beginning(text: str | None, file: str | None) -> str:
    """The same, without the line end that files have; ValueError where a file is empty."""
    given = given_text(text, file)
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
