"""The demo's pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .extras import extra
from .gradients import ClippingRun
from .storage import write_whole

with extra():
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

# Told apart in grey and by colour-blind readers too (Okabe & Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", "-", ":")


def _write(figure: Figure, path: Path) -> None:
    # Figure draws without pyplot: no window system, no global state.
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def attention_map(weights: Tensor, source: Sequence[str], target: Sequence[str], path: Path) -> None:
    """Which source symbols the decoder looked at for each target symbol.

    Args:
        weights: [T, S].
        source: the S symbols read.
        target: the T symbols written.
        path: the PNG file.
    """
    figure = Figure(figsize=(1.8 + 0.42 * len(source), 1.4 + 0.36 * len(target)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weights.detach().cpu().numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(source)), source)
    axes.set_yticks(range(len(target)), target)
    axes.xaxis.tick_top()
    axes.set_xlabel("letters read")
    axes.xaxis.set_label_position("top")
    axes.set_ylabel("phones written, from top to bottom")
    axes.set_xticks([column + 0.5 for column in range(len(source) - 1)], minor=True)
    axes.set_yticks([row + 0.5 for row in range(len(target) - 1)], minor=True)
    axes.grid(which="minor", color="0.88", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, label="attention weight", pad=0.02)
    _write(figure, path)


def learning_curve(
    steps: Sequence[int], losses: Sequence[float], passes: Sequence[tuple[int, float]], test: float | None, path: Path
) -> None:
    """Training loss, and word error rate after each pass.

    Args:
        steps: after which update each loss was taken.
        losses: mean cross-entropy of a symbol, in nats.
        passes: after which update, and word error rate on the dev words as a fraction.
        test: word error rate on the test words at the end.
        path: the PNG file.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    (loss_line,) = axes.plot(steps, losses, color=COLOURS[0], linewidth=1.2, label="training loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("updates of the weights")
    axes.set_ylabel("cross-entropy per phone (nats, log scale)", color=COLOURS[0])
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    errors = axes.twinx()
    updates, rates = [update for update, _ in passes], [100 * rate for _, rate in passes]
    (dev_line,) = errors.plot(updates, rates, "o-", color=COLOURS[1], label="word error rate, dev words")
    for update, rate in zip(updates, rates, strict=True):
        errors.annotate(f"{rate:.1f} %", (update, rate), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    lines = [loss_line, dev_line]
    if test is not None:
        lines.append(
            errors.axhline(100 * test, color=COLOURS[2], linestyle="--", label=f"test words: {100 * test:.1f} %")
        )
    errors.set_ylim(0, 100)
    errors.set_ylabel("words with any wrong phone (%)", color=COLOURS[1])
    axes.legend(handles=lines, loc="upper right")
    axes.set_title("Learning to pronounce English")
    _write(figure, path)


def vanishing_gradients(norms: Mapping[str, Sequence[float]], path: Path) -> None:
    """‖∂L/∂h_t‖ against the distance to the loss, a curve for each recurrence."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), colour, style in zip(norms.items(), COLOURS, STYLES, strict=False):
        back = range(len(values))
        axes.plot(back, values[::-1], color=colour, linestyle=style, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xlabel("steps back from the loss, T - t")
    axes.set_ylabel(r"$\Vert \partial L / \partial h_t \Vert_2$  (log scale)")
    axes.set_title("Vanishing and exploding gradients, measured by autograd on pyrnnfast's layers")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(loc="best")
    _write(figure, path)


def clipping(runs: Mapping[str, ClippingRun], threshold: float, path: Path) -> None:
    """Loss and gradient norm over training, a curve for each run."""
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True)
    for (name, run), colour in zip(runs.items(), (COLOURS[1], COLOURS[0]), strict=True):
        loss_axes.plot(run.losses, color=colour, linewidth=1.0)
        norm_axes.plot(run.norms, color=colour, linewidth=1.0, label=name)
    norm_axes.axhline(threshold, color="0.3", linestyle="--", linewidth=1.0, label=f"clipped above {threshold:g}")
    for axes, label in ((loss_axes, "mean squared error"), (norm_axes, "norm of all gradients, before clipping")):
        axes.set_yscale("log")
        axes.set_ylabel(f"{label}\n(log scale)")
        axes.grid(alpha=0.3, linewidth=0.5)
    figure.legend(*norm_axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    norm_axes.set_xlabel("updates of the weights")
    loss_axes.set_title("An expanding RNN learns to recall its first input, with and without clipping")
    _write(figure, path)
