"""`perplexity`: how well a model expects a text, in a few numbers."""

from llama.commands.common import say
from llama.commands.compare import show_table
from llama.commands.scoring import score, task
from llama.terminal.arguments import SEVERAL


def perplexity(
    ckpt_dir: str,
    text_file: str,
    *,
    tokenizer_path: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: SEVERAL = (),
    against: str | None = None,
    plot: str | None = None,
) -> None:
    """Say how well a model expects a text.

    Moves a window over the text, and prints the mean with its standard error, the perplexity and
    the bits per byte.

        python -m llama perplexity llama/demo README.md --window 512 --stride 256

    Args:
        quantize: with this, against or plot, the table of `compare` is printed.
        against: the same: as in compare.
        plot: the same: as in compare.
    """
    work = task(
        ckpt_dir,
        text_file,
        tokenizer_path=tokenizer_path,
        window=window,
        stride=stride,
        device=device,
        dtype=dtype,
        against=against,
    )
    if quantize or against is not None or plot is not None:
        show_table(work, ckpt_dir, quantize, against, plot)
        return
    llama = work.build(ckpt_dir)
    result = score(
        llama, work.text, window=work.window, stride=work.stride, show_progress=llama.is_main
    )
    if llama.is_main:
        say(result.words())
