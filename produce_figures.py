"""Draws the figures, as PNG and PDF, from the CSV files of predict_test.py.

    python produce_figures.py --ray_results_dir=results --data_base_dir=data
    python produce_figures.py --figures accuracy convergence --ray_results_dir=ray_results
    python produce_figures.py --figures before_after --experiment=esc50 --clip=12

Without --figures, those that cannot be drawn are skipped: dmel and before_after show a recording, so they need it.
"""

import argparse
import ast
import contextlib
import io
from itertools import chain

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.figure import Figure

from config import InputError, complete, plain, run
from results import Storage
from summary import fixed_runs, interval, read_all

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito's, for all kinds of eyes
LOOKS = cycler(color=COLORS, linestyle=2 * ["-", "--", ":"])
STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "axes.prop_cycle": LOOKS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.aspect": "auto",
    "image.cmap": "cividis",
    "image.origin": "lower",
}
WIDTH = 7.2  # inches: of a text page, and readable in a README
LOG_RANGE = 12  # of a log-Mel picture, down from its largest value


def main():
    parser = argparse.ArgumentParser(description="Draw the figures from the CSV files of predict_test.py.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--output_dir", default="figures", help="folder to draw to (figures)")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, help="which ones (all that can be drawn)")
    parser.add_argument("--experiment", default="audio_mnist", help="of dmel and before_after (audio_mnist)")
    parser.add_argument("--clip", type=int, default=0, help="number of their clip in the test split (0)")
    args = parser.parse_args()
    experiments = read_all(Storage(args.ray_results_dir))
    experiments = {name: results for name, results in experiments.items() if len(results.epochs)}
    output = Storage(args.output_dir)
    matplotlib.rcParams.update(STYLE)
    for name in args.figures or FIGURES:
        try:
            figure = FIGURES[name](experiments, args)
        except InputError as reason:
            if args.figures:
                raise
            print(f"{name}: skipped: {reason}")
            continue
        for suffix, metadata in (("png", None), ("pdf", {"CreationDate": None})):
            figure.savefig(content := io.BytesIO(), format=suffix, metadata=metadata)
            output.write(f"{name}.{suffix}", content.getvalue())
        print(f"{name}: {output.address}/{name}.png and .pdf")


def dmel(experiments, args):
    """The overview: a waveform, and what the network sees of it at the shortest, the trained and the longest window."""
    results, clip = chosen_clip(experiments, args)
    trials = results.trials
    best = trials[trials["config/trainable"]].sort_values("best_valid_acc").iloc[-1]  # chosen without the test split
    trained = abs(best["best_lambd_est"])
    lambds = sorted([trained, *trials["config/init_lambd"].agg(["min", "max"])])
    shown = [("waveform", None), *((f"{results.unit * lambd:.0f} ms", lambd) for lambd in lambds)]
    figure, [axes] = pictures(config_of(best), [clip], [shown], 2.2)
    axis = axes[1 + lambds.index(trained)]
    axis.set_title(f"{axis.get_title()}, trained", color="C0", weight="bold")
    for spine in axis.spines.values():
        spine.set(visible=True, color="C0", linewidth=2.5)
    return figure


def before_after(experiments, args):
    """What the network sees of a clip before and after training, for every initial window."""
    results, clip = chosen_clip(experiments, args)
    trials = pd.DataFrame(cell.trained.iloc[0] for cell in results.cells() if len(cell.trained))
    states = {"before": trials["config/init_lambd"], "after": trials["best_lambd_est"].abs()}
    shown = [
        [(f"{state} training: {results.unit * lambd:.0f} ms", lambd) for lambd in lambds]
        for state, lambds in states.items()
    ]
    return pictures(config_of(trials.iloc[0]), [clip, clip], shown, 3.8)[0]


def data_example(experiments, args):
    """The three classes of time_frequency, and what the network sees of them at λ = 0.2, 1 and 5 sigma_ref."""
    import datasets

    trials = [results.trials for results in experiments.values() if "config/sigma_ref" in results.trials]
    if not trials:
        raise InputError("there are no results of time_frequency.")
    config = config_of(trials[0].iloc[0]) | {"seed": 1, "noise_std": 0.1}
    data, sigma = datasets.load(config), config["sigma_ref"]
    clips = [data.clips[(data.labels == label).nonzero()[0, 0]] for label in range(3)]
    shown = [("waveform", None), *((rf"$\lambda$ = {n:g} $\sigma_{{ref}}$", n * sigma) for n in (0.2, 1.0, 5.0))]
    figure, axes = pictures(config, clips, [shown, *2 * [[("", lambd) for _, lambd in shown]]], 5.2)
    for axis, name in zip(axes[:, 0], ("one pulse", "two, apart in time", "two, apart in frequency"), strict=True):
        axis.set_ylabel(f"{name}\namplitude")
    return figure


def chosen_clip(experiments, args):
    """Results of --experiment, and clip number --clip of its test split, shape = (n_points,) float32."""
    import datasets

    results = experiments.get(args.experiment)
    if results is None or results.in_samples or not results.trials["config/trainable"].any():
        raise InputError(f"--experiment={args.experiment}: there are no results with a window trained on recordings.")
    config = config_of(results.trials.iloc[0])
    data = datasets.load(config, datasets.recordings_of(config, args.data_base_dir))
    clips = data.clips[data.splits["test"]]
    if not 0 <= args.clip < len(clips):
        raise InputError(f"--clip={args.clip}: the test split has clips 0 to {len(clips) - 1}.")
    return results, clips[args.clip]


def config_of(trial):
    """The config of a trial, a row of the table; what the table leaves empty is left out."""
    columns = plain(trial.filter(like="config/").dropna().to_dict())
    config = {column.removeprefix("config/"): value for column, value in columns.items()}
    with contextlib.suppress(KeyError, SyntaxError, ValueError):  # without a split, or with the name of one
        config["split"] = ast.literal_eval(config["split"])
    return complete(config | {"pretrained": False})


def pictures(config, clips, rows, height):
    """A figure, height in inches, and its panels: a row for each clip, shape = (n_points,), of (title, λ in samples).

    A panel shows what the config's network sees of the clip at that λ; at None, the clip itself.
    """
    import torch

    from models import build

    layer, is_recording = build(config)[0].spectrogram_layer, config["resample_rate"] is not None
    is_mel, rate = hasattr(layer, "n_mels"), config["resample_rate"] or 1
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True)
    panels = zip(axes.flat, np.repeat(clips, len(rows[0]), axis=0), chain(*rows), strict=True)
    for axis, clip, (title, lambd) in panels:
        axis.set(title=title, ylabel="amplitude")
        if lambd is None:
            axis.plot(np.arange(len(clip)) / rate, clip / np.abs(clip).max(), "k", linewidth=0.6)
            continue
        with torch.no_grad():
            layer.lambd.fill_(lambd)
            features = layer(torch.from_numpy(clip)).numpy()  # (bands, frames)
        limits = {"vmin": features.max() - LOG_RANGE, "vmax": features.max()} if is_mel and layer.log else {}
        axis.imshow(features, extent=(0, len(clip) / rate, 0, layer.n_mels if is_mel else rate / 2), **limits)
        axis.set_ylabel("mel band" if is_mel else "frequency, Hz" if is_recording else "cycles per sample")
    for axis in axes[-1]:
        axis.set_xlabel("time, s" if is_recording else "time, samples")
    n_waveforms = sum(lambd is None for _, lambd in rows[0])
    for axis in axes[:, n_waveforms + 1 :].flat:  # which have the scale of the panel to the left
        axis.set(ylabel="", yticklabels=[])
    return figure, axes


def accuracy(experiments, args):
    """Test accuracy against the initial window, means with their 95 % intervals, where both halves were trained."""
    shown = [results for results in experiments.values() if results.trials["config/trainable"].nunique() == 2]
    figure, axes = curves(shown, 2.8, "x", "initial ")
    for axis, results in zip(axes, shown, strict=True):
        cells = list(results.cells())
        for half, label, marker, shift in (("trained", "DMEL", "o", 1.04), ("fixed", "baseline", "s", 1 / 1.04)):
            windows = [cell.init_window * shift for cell in cells]  # a little apart
            values = [interval(getattr(cell, half)["accuracy"]) for cell in cells]
            means, highs = np.array([(value.mean, value.high) for value in values]).T
            axis.errorbar(windows, means, np.nan_to_num(highs - means), label=label, marker=marker, capsize=3)
        n = max(len(half) for cell in cells for half in (cell.trained, cell.fixed))
        axis.set(ylabel="test accuracy, %", title=f"{axis.get_title()}, n = {n}")
    axes[0].legend(fontsize=9)
    return figure


def convergence(experiments, args):
    """λ over the epochs of every trained run, and the median epoch from which it stays within 10 % of where it ends."""
    shown = [results for results in experiments.values() if results.trials["config/trainable"].any()]
    figure, axes = curves(shown, 3.6, "y")
    for axis, results in zip(axes, shown, strict=True):
        lambds = results.epochs.groupby("trial")["lambd"]
        cells = [cell for cell in results.cells() if len(cell.trained)]
        for cell, look in zip(cells, LOOKS(), strict=False):
            for trial in cell.trained.index:
                windows = [cell.init_window, *(lambds.get_group(trial).abs() * results.unit)]
                axis.plot(windows, linewidth=0.8, **look)
            settled = cell.trained["settled"].fillna(np.inf).median()
            end = f"settled by epoch {settled:.0f}" if np.isfinite(settled) else "still moving"
            axis.plot([], [], **look, label=f"from {cell.init_window:.3g}: {end}")
        if "config/sigma_ref" in results.trials:
            sigma = results.trials["config/sigma_ref"].iloc[0]
            axis.axhline(sigma, color="black", linewidth=1, linestyle="-.", label=r"$\sigma_{ref}$")
        axis.set(xscale="symlog", xlabel="epoch", xlim=(0, None))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def zero_floor(experiments, args):
    """The same for audio_mnist, beside it with the option zero_floor."""
    pair = {name: experiments[name] for name in ("audio_mnist", "audio_mnist_zero_floor") if name in experiments}
    return convergence(pair if len(pair) == 2 else {}, args)


def curves(shown, height, axis_name, kind=""):
    """A figure with a panel for each of some Results, whose initial windows stand along its "x" or "y" axis."""
    if not shown:
        raise InputError("there are no results.")
    figure = Figure(figsize=(max(WIDTH * len(shown) / 3, 3.6), height))
    [axes] = figure.subplots(1, len(shown), squeeze=False)
    for axis, results in zip(axes, shown, strict=True):
        windows = {cell.init_window: f"{cell.init_window:.3g}" for cell in results.cells()}
        label = f"{kind}λ, samples" if results.in_samples else f"{kind}window 6λ, ms"
        epochs = f", {results.trials['epochs'].max():.0f} epochs" if results.trials["cut"].all() else ""
        axis.set(title=results.name + epochs, **{f"{axis_name}label": label, f"{axis_name}scale": "log"})
        ticks = getattr(axis, f"{axis_name}axis")
        ticks.set_ticks(list(windows), windows.values())
        ticks.set_ticks([], minor=True)
    return figure, axes


def time_complexity(experiments, args):
    """What a DMEL run costs, in fixed windows: the paper's cost model, and seconds measured here."""
    figure = Figure(figsize=(WIDTH, 2.8))
    axes, counts = figure.subplots(1, 3), np.arange(1, 60)
    for axis, c1 in zip(axes, (0.0001, 0.9999), strict=False):
        axis.set_title(f"model, $C_1$ = {c1:g}")
        for seconds in (0.020, 0.300):
            ratios = [cost_ratio(seconds, n, c1) for n in counts]
            axis.plot(counts, ratios, label=f"from {1000 * seconds:.0f} ms")
    axes[2].set_title("measured")
    for results in experiments.values():
        if (ratio := fixed_runs(results.trials)).n:
            axes[2].plot(counts, ratio.mean / counts, label=results.name)
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", xlabel="number D of fixed windows", ylabel="cost of DMEL / of D windows")
        if axis.lines[1:]:
            axis.legend()
    return figure


def cost_ratio(init_seconds, n_windows, c1):
    """The paper's cost model: a DMEL run from a window of init_seconds, divided by a search over n_windows fixed ones.

    c1 weighs the spectrogram, 1 - c1 the network behind it. λ moves by 1 ms a step to 35 ms; the fixed windows lie
    evenly from two hops to 0.3 s.
    """
    sample_rate, n_mels = 8000, 128  # Hz
    n_points, hop = 5 * sample_rate, 0.010 * sample_rate  # of a clip, in samples
    n_steps = int(abs(init_seconds - 0.035) / 0.001)
    walked = np.linspace(init_seconds, 0.035, n_steps) * sample_rate
    fixed = np.linspace(2 * hop, 0.3 * sample_rate, n_windows)
    c2 = 1 - c1
    search = n_steps * (c1 * (n_points * np.log(fixed)).sum() + c2 * (2 * n_mels * n_points / fixed).sum())
    return (c1 * n_points / hop * (walked * np.log(walked)).sum() + n_steps * c2 * n_mels * n_points / hop) / search


DRAWN = (dmel, data_example, accuracy, convergence, zero_floor, time_complexity, before_after)
FIGURES = {draw.__name__: draw for draw in DRAWN}

if __name__ == "__main__":
    run(main)
