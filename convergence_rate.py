"""The paper's table 5: in how many steps a window that is too short, or too long, becomes right.

    python convergence_rate.py
    python convergence_rate.py --rates 30 --rates_not_normalized 0.1 --n_signals 5

A signal is one Gaussian pulse of width σ = 6.38 samples, its target the spectrogram with λ = σ.
λ alone is learnt, from 0.2 σ or 5 σ, by gradient descent on the mean squared error, until it is
within 0.1 of σ. The paper does not name its learning rate, nor whether the window was divided by
the root of its energy, so there are several of the one and both of the other. Error and gradient
grow with the fourth power of a pulse's amplitude, which is 1 here: a rate means nothing without it.
docs/convergence_rate.md has the results. Source: Martinsson and Sandsten, ICASSP 2024, table 5.
"""

import argparse
import io
import math
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import machine

os.environ.update(machine.matplotlib_settings())  # before it is imported

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import pad

from config import InputError, run
from dmel import gaussian_window
from results import Storage
from summary import markdown_table

N_POINTS = 128  # samples in a signal
SIGMA = 6.38  # width of a pulse, and the λ of the target, in samples
SHORT, LONG = 0.2 * SIGMA, 5 * SIGMA  # λ to start from, in samples
TOLERANCE = 0.1  # λ has arrived where it is nearer to σ than this
AMPLITUDE = 1.0  # of a pulse
PULSES = ("centred", "displaced")

HEADINGS = (
    "normalize_window",
    "pulses",
    f"rate at amplitude {AMPLITUDE:g}",
    "first error",
    f"iterations from {SHORT:.1f}",
    f"iterations from {LONG:.1f}",
    "ratio",
    "signals",
)
TABLE = "iterations.csv"  # NAME/NAME.csv would be taken for trials by produce_tables.py
PAPER_TABLE = Path(__file__).with_name("results") / "paper.csv"


class Descents(NamedTuple):
    """What became of the λ of several signals that start from the same value."""

    normalize_window: bool  # whether the window is divided by the root of its energy
    pulses: str  # one of PULSES
    rate: float  # learning rate
    init: float  # λ to start from, in samples
    first_errors: np.ndarray  # mean squared error before the first step, shape = (signals,)
    lambds: np.ndarray  # λ after each step, the start first, shape = (steps + 1, signals)
    iterations: np.ndarray  # steps until λ had arrived, NaN where it did not, shape = (signals,)


def main():
    args = parse_arguments()
    paper = read_paper()
    output = Storage(args.output_dir)
    torch.set_num_threads(1)  # the arrays are small

    try:
        descents = descend_all(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command begins anew") from None

    table = pd.DataFrame([summary_of(some, args.max_iterations) for some in descents])
    print_tables(table, paper)
    output.write(TABLE, table.to_csv(index=False))

    panels = [(True, rate) for rate in args.rates[:1]]
    panels += [(False, rate) for rate in args.rates_not_normalized[:1]]
    figure = draw_figure(descents, panels, paper)
    for suffix in ("png", "pdf"):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata={"CreationDate": None})
        output.write(f"convergence_rate.{suffix}", content.getvalue())
    print(f"{output.address}: {TABLE}, convergence_rate.png and .pdf", file=sys.stderr)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Count the steps in which λ of one pulse becomes right, as the paper's table 5."
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        default=[30, 100, 300],
        help="learning rates of λ with normalize_window=True (30 100 300); the first is drawn",
    )
    parser.add_argument(
        "--rates_not_normalized",
        type=float,
        nargs="*",
        default=[0.1, 0.3, 1.0],
        help="the same with normalize_window=False (0.1 0.3 1)",
    )
    parser.add_argument(
        "--n_signals", type=int, default=50, help="signals of each kind, 1 to 1000 (50)"
    )
    parser.add_argument(
        "--max_iterations",
        type=int,
        default=10000,
        help="steps after which λ counts as not arrived (10000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which pulses are drawn (0)")
    parser.add_argument(
        "--output_dir",
        default="ray_results/convergence_rate",
        help="folder or URI to write CSV and figure to (ray_results/convergence_rate)",
    )
    args = parser.parse_args()

    if not args.rates and not args.rates_not_normalized:
        raise InputError("--rates and --rates_not_normalized are both empty: give one of them.")
    for flag in ("rates", "rates_not_normalized"):
        for rate in getattr(args, flag):
            if not 0 < rate < math.inf:
                raise InputError(f"--{flag}: {rate:g} is no learning rate: give one above 0.")
    if not 1 <= args.n_signals <= 1000:
        raise InputError(f"--n_signals={args.n_signals} must be from 1 to 1000.")
    if args.max_iterations < 1:
        raise InputError(f"--max_iterations={args.max_iterations} must be 1 or more.")
    if args.seed < 0:
        raise InputError(f"--seed={args.seed} must be 0 or more.")
    return args


# Signals


def draw_signals(n_signals, pulses, seed):
    """Draws signals of one Gaussian pulse of width σ and random phase, without noise.

    Those of kind "centred" lie in the middle of time and frequency, "displaced" ones up to N/5
    samples and 0.1 cycles per sample from it. They are drawn and scaled as those of time_frequency
    in datasets.py. Returns a float32 tensor, shape = (n_signals, N_POINTS).
    """
    random = np.random.default_rng(seed)
    shape = (n_signals, 1)
    phase = random.uniform(0, 2 * np.pi, shape)
    time = np.full(shape, N_POINTS / 2)  # samples
    frequency = np.full(shape, 0.25)  # cycles per sample
    if pulses == "displaced":
        time += random.uniform(-N_POINTS / 5, N_POINTS / 5, shape)
        frequency += random.uniform(-0.1, 0.1, shape)

    n = np.arange(N_POINTS)
    envelope = np.exp(-0.5 * ((n - time) / SIGMA) ** 2)
    carrier = np.sin(2 * np.pi * frequency * n + phase)
    envelope /= envelope.max(axis=1, keepdims=True)
    carrier /= carrier.max(axis=1, keepdims=True)
    signals = AMPLITUDE * envelope * carrier
    signals -= signals.mean(axis=1, keepdims=True)
    return torch.from_numpy(signals.astype(np.float32))


# Descent


def power_and_derivative(signals, lambds, normalize_window):
    """Power spectrogram of each signal with a λ of its own, and its derivative in that λ.

    What DifferentiableSpectrogram(hop_length=1) computes, for many λ at once. Shapes: signals
    (signals, N_POINTS), their mean 0; lambds (signals,); results (signals, frames, bins).
    """
    frames = pad(signals, (N_POINTS // 2, N_POINTS // 2)).unfold(1, N_POINTS, 1)
    window_of = partial(gaussian_window, length=N_POINTS, normalize=normalize_window)
    window, window_derivative = torch.func.vmap(window_of)(lambds)  # (signals, N_POINTS) each

    n_fft = 2 * N_POINTS
    spectrum = torch.fft.rfft(frames * window.unsqueeze(1), n_fft)  # S
    spectrum_derivative = torch.fft.rfft(frames * window_derivative.unsqueeze(1), n_fft)  # dS/dλ

    # d|S|²/dλ = 2 Re(conj(S) · dS/dλ)
    real, imaginary = spectrum.real, spectrum.imag
    power = real.square() + imaginary.square()
    derivative = 2 * (real * spectrum_derivative.real + imaginary * spectrum_derivative.imag)
    return power, derivative


def error_and_gradient(signals, targets, lambds, normalize_window):
    """Mean squared error of each spectrogram to its target, and its derivative in λ: (signals,)."""
    power, derivative = power_and_derivative(signals, lambds, normalize_window)
    difference = power - targets
    error = difference.square().mean(dim=(1, 2))
    gradient = 2 * (difference * derivative).mean(dim=(1, 2))
    return error, gradient


def descend(signals, init, rate, normalize_window, max_iterations):
    """Gradient descent of each signal's λ from init, until it has arrived at σ.

    signals: of draw_signals. Returns the first errors, shape = (signals,), and λ after each step,
    shape = (steps + 1, signals), which stays as it is once it has arrived.
    """
    lambds = torch.full((len(signals),), init)
    targets, _ = power_and_derivative(signals, torch.full_like(lambds, SIGMA), normalize_window)
    first_errors, _ = error_and_gradient(signals, targets, lambds, normalize_window)

    steps = [lambds]
    moving = torch.arange(len(signals))  # those that have neither arrived nor left the numbers
    while len(moving) > 0 and len(steps) <= max_iterations:
        _, gradient = error_and_gradient(
            signals[moving], targets[moving], lambds[moving], normalize_window
        )
        lambds = lambds.clone()
        lambds[moving] -= rate * gradient
        steps.append(lambds)

        distance = (lambds[moving].abs() - SIGMA).abs()
        moving = moving[(distance >= TOLERANCE) & distance.isfinite()]
    return first_errors.numpy(), torch.stack(steps).abs().numpy()


def descend_all(args):
    """The Descents of both windows, at their rates, and says how long each rate took."""
    descents = []
    for normalize_window, rates in ((True, args.rates), (False, args.rates_not_normalized)):
        for rate in sorted(set(rates)):
            began = time.process_time()
            descents += descend_from_both(normalize_window, rate, args)
            seconds = time.process_time() - began
            message = (
                f"normalize_window={normalize_window}, rate {rate:g}: {seconds:.0f} s of a core"
            )
            print(message, file=sys.stderr)
    return descents


def descend_from_both(normalize_window, rate, args):
    """The Descents of both kinds of pulses from both starts, at one rate."""
    descents = []
    for pulses in PULSES:
        signals = draw_signals(args.n_signals, pulses, args.seed)
        for init in (SHORT, LONG):
            errors, lambds = descend(signals, init, rate, normalize_window, args.max_iterations)
            iterations = steps_to_arrive(lambds)
            descents.append(
                Descents(normalize_window, pulses, rate, init, errors, lambds, iterations)
            )
    return descents


def steps_to_arrive(lambds):
    """Steps until each λ had arrived, NaN where it did not; lambds: (steps + 1, signals)."""
    arrived = np.abs(lambds - SIGMA) < TOLERANCE
    return np.where(arrived.any(axis=0), arrived.argmax(axis=0), np.nan)


# Tables


def summary_of(descents, max_iterations):
    """A row of the CSV file. Means are over the signals that arrived; the others are counted."""
    iterations = pd.Series(descents.iterations)
    return {
        "normalize_window": descents.normalize_window,
        "pulses": descents.pulses,
        "amplitude": AMPLITUDE,
        "rate": descents.rate,
        "init": round(descents.init, 3),
        "first_error": f"{descents.first_errors.mean():.4g}",
        "iterations_mean": round(iterations.mean(), 2),
        "iterations_deviation": round(iterations.std(), 2),
        "n": len(iterations),
        "n_not_arrived": int(iterations.isna().sum()),
        "max_iterations": max_iterations,
    }


def read_paper():
    """The paper's table 5: its rows for the short and for the long start."""
    table = pd.read_csv(PAPER_TABLE)
    return table[table["experiment"] == "convergence_rate"].sort_values("init")


def print_tables(table, paper):
    """Prints the table in LaTeX and in Markdown, the paper's row first."""
    short, long = paper.to_dict("records")
    rows = [row_of(short, long, "not given", "one pulse", "not given", "equal")]
    settings = ["normalize_window", "pulses", "rate"]
    for (normalize_window, pulses, rate), pair in table.groupby(settings, sort=False):
        short, long = pair.to_dict("records")
        errors = f"{short['first_error']}, {long['first_error']}"
        rows.append(row_of(short, long, normalize_window, pulses, f"{rate:g}", errors))

    latex = [" & ".join(HEADINGS), *(" & ".join(row) for row in rows)]
    for number, line in enumerate(latex):
        line = line.replace("_", r"\_").replace("±", r"$\pm$")
        print(line + r" \\" + (r" \hline \hline" if number == 0 else ""))
    print(r"\hline")

    markdown = [("paper" if row is rows[0] else "here", *row) for row in rows]
    print(f"\n{markdown_table(('', *HEADINGS), markdown)}")


def row_of(short, long, normalize_window, pulses, rate, errors):
    """A row of the printed tables, as text. short, long: the rows of both starts, as dicts."""
    ratio = f"{long['iterations_mean'] / short['iterations_mean']:.1f}"
    if short.get("n_not_arrived") or long.get("n_not_arrived"):
        ratio = ""  # the means leave out the slowest signals
    return (
        str(normalize_window),
        pulses,
        rate,
        errors,
        iterations_text(short),
        iterations_text(long),
        ratio,
        str(short["n"]),
    )


def iterations_text(row):
    """Mean ± deviation of the iterations, and how many signals these leave out."""
    n_arrived = row["n"] - row.get("n_not_arrived", 0)
    texts = []
    if n_arrived:
        texts.append(f"{row['iterations_mean']:.1f}")
    if n_arrived > 1:
        texts.append(f"± {row['iterations_deviation']:.1f}")
    if n_arrived < row["n"]:
        missing = row["n"] - n_arrived
        texts.append(f"({missing} of {row['n']} not within {row['max_iterations']})")
    return " ".join(texts)


# Figure


def draw_figure(descents, panels, paper):
    """λ over the iterations, a panel for each (normalize_window, rate)."""
    matplotlib.style.use(Path(__file__).with_name("figures.mplstyle"))
    figure = Figure(figsize=(3.6 * len(panels), 3.4))
    [axes] = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (normalize_window, rate) in zip(axes, panels, strict=True):
        for some in descents:
            if some.normalize_window == normalize_window and some.rate == rate:
                draw_descents(axis, some)
        axis.errorbar(
            paper["iterations_mean"],
            [SIGMA, SIGMA],
            xerr=paper["iterations_deviation"],
            color="black",
            linestyle="none",
            marker="o",
            markersize=3,
            capsize=3,
            zorder=3,
            label="paper, both starts",
        )
        axis.set(
            title=f"normalize_window={normalize_window}, rate {rate:g}",
            xlabel="iteration",
            xlim=(0, None),
            yscale="log",
            ylim=(SHORT / 1.3, LONG * 1.3),
        )
        axis.legend(loc="lower right")
    ticks = (SHORT, SIGMA, LONG)
    axes[0].set(ylabel="λ, samples", yticks=ticks, yticklabels=[f"{tick:.1f}" for tick in ticks])
    axes[0].minorticks_off()
    return figure


def draw_descents(axis, descents):
    """The median λ of the signals, and shaded where all of them lie."""
    number = PULSES.index(descents.pulses)
    color = f"C{number}"
    label = f"{descents.pulses} pulses, median and range" if descents.init == SHORT else None
    iterations = np.arange(len(descents.lambds))
    low, high = descents.lambds.min(axis=1), descents.lambds.max(axis=1)
    axis.fill_between(iterations, low, high, color=color, alpha=0.2, linewidth=0)
    median = np.median(descents.lambds, axis=1)
    axis.plot(iterations, median, color=color, linestyle=("-", "--")[number], label=label)


if __name__ == "__main__":
    run(main)
