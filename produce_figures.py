"""Draws the figures, as PNG and PDF, from the CSV files of predict_test.py.

    python produce_figures.py --ray_results_dir=results --data_base_dir=data
    python produce_figures.py --figures accuracy convergence --ray_results_dir=ray_results
    python produce_figures.py --figures before_after --experiment=esc50 --clip=12

dmel and before_after show a recording: without the recordings they are skipped.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np
import torch

import datasets
from complexity import cost_ratio
from config import InputError, run
from dmel import DMEL, DifferentiableSpectrogram
from storage import Storage
from summary import (
    add_epochs,
    cells,
    experiment_names,
    fixed_runs,
    in_samples,
    interval,
    milliseconds,
    read_epochs,
    read_experiment,
    was_cut,
)

COLORS = {"DMEL": "#0072b2", "baseline": "#d55e00", "other": "#009e73"}  # Okabe and Ito's, for every kind of eyes
MARKERS = {"DMEL": "o", "baseline": "s"}
LINES = ("-", "--", ":")
CLASSES = ("one pulse", "two, apart in time", "two, apart in frequency")
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
WIDTH = 7.2  # inches: of a text page, and readable in a README


class Skipped(Exception):
    """A figure cannot be drawn from what there is; the message says why."""


def main():
    args = parse_args()
    storage = Storage(args.ray_results_dir)
    experiments = {}
    for name in experiment_names(storage):
        trials, _ = read_experiment(storage, name)
        epochs = None if trials is None else read_epochs(storage, name, trials)
        if epochs is not None:
            experiments[name] = (add_epochs(trials, epochs), epochs)
    for name in args.figures:
        with plt.rc_context(STYLE):
            try:
                figure = FIGURES[name](experiments, args)
            except Skipped as reason:
                print(f"{name}: skipped: {reason}")
                continue
            args.output_dir.mkdir(parents=True, exist_ok=True)
            for suffix in ("png", "pdf"):
                path = args.output_dir / f"{name}.{suffix}"
                temporary = path.with_suffix(f".tmp.{suffix}")
                figure.savefig(temporary, metadata={"CreationDate": None} if suffix == "pdf" else None)
                temporary.rename(path)
            plt.close(figure)
            print(f"{name}: {args.output_dir / name}.png and .pdf")


def parse_args():
    parser = argparse.ArgumentParser(description="Draw the figures from the CSV files of predict_test.py.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--output_dir", type=Path, default="figures", help="folder to draw to (figures)")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="which ones (all)")
    parser.add_argument("--experiment", default="audio_mnist", help="of dmel and before_after (audio_mnist)")
    parser.add_argument("--clip", type=int, default=0, help="number of their clip in the test split (0)")
    return parser.parse_args()


def dmel(experiments, args):
    """The overview: a waveform, its log-Mel spectrogram at the shortest, the trained and the longest window."""
    trials, clip = chosen_clip(experiments, args)
    rate = trials["config/resample_rate"].iloc[0]
    best = trials[trials["config/trainable"]].sort_values("best_valid_acc").iloc[-1]  # chosen without the test split
    trained = abs(best["best_lambd_est"])
    shortest, longest = (trials["config/init_lambd"].agg(way) for way in ("min", "max"))
    figure, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.2))
    axes[0].plot(np.arange(len(clip)) / rate, clip / np.abs(clip).max(), color="black", linewidth=0.4)
    axes[0].set(xlabel="time, s", ylabel="amplitude", title="waveform")
    for axis, lambd in zip(axes[1:], sorted([shortest, trained, longest]), strict=True):
        draw_log_mel(axis, trials, clip, lambd)
        axis.set_title(f"{milliseconds(lambd, rate):.0f} ms" + (", trained" if lambd == trained else ""))
        if lambd == trained:
            for spine in axis.spines.values():
                spine.set(visible=True, color=COLORS["DMEL"], linewidth=2.5)
            axis.title.set(color=COLORS["DMEL"], weight="bold")
    for axis in axes[2:]:
        axis.set(ylabel="", yticklabels=[])
    return figure


def before_after(experiments, args):
    """Log-Mel spectrogram of a clip before and after training, for every initial window."""
    trials, clip = chosen_clip(experiments, args)
    rate = trials["config/resample_rate"].iloc[0]
    rows = [group.iloc[0] for _, group, _ in cells(trials) if len(group)]
    figure, axes = plt.subplots(2, len(rows), figsize=(WIDTH, 3.8), sharex=True, sharey=True, squeeze=False)
    for i, row in enumerate(rows):
        for axis, lambd, state in zip(
            axes[:, i], row[["config/init_lambd", "best_lambd_est"]], ("before", "after"), strict=True
        ):
            draw_log_mel(axis, trials, clip, lambd)
            axis.set_title(f"{state} training: {milliseconds(abs(lambd), rate):.0f} ms")
            axis.label_outer()
    return figure


def chosen_clip(experiments, args):
    """Trials of --experiment, and clip number --clip of its test split, shape = (n_points,) float32."""
    if args.experiment not in experiments:
        raise Skipped(f"there are no results of {args.experiment}")
    trials, _ = experiments[args.experiment]
    if in_samples(trials):
        raise Skipped(f"{args.experiment} has no recordings")
    first = trials.iloc[0]
    space = {"dataset_name": first["config/dataset_name"]}
    space |= {key: int(first[f"config/{key}"]) for key in ("resample_rate", "n_points")}
    try:
        recordings = datasets.recordings_of(space, args.data_base_dir)
    except InputError as error:
        raise Skipped(str(error)) from None
    test = datasets.split_recordings(space["dataset_name"], recordings.groups)["test"]
    if not 0 <= args.clip < len(test):
        raise InputError(f"--clip={args.clip}: the test split has clips 0 to {len(test) - 1}.")
    return trials, np.array(recordings.clips[test[args.clip]])


def draw_log_mel(axis, trials, clip, lambd):
    """The log-Mel spectrogram of a clip at a λ in samples, with the settings of the trials."""
    keys = ("resample_rate", "n_mels", "hop_length")
    rate, n_mels, hop_length = (int(trials[f"config/{key}"].iloc[0]) for key in keys)
    with torch.no_grad():
        log_mel = DMEL(rate, n_mels=n_mels, hop_length=hop_length, init_lambd=lambd)(torch.from_numpy(clip))
    top = log_mel.max().item()
    axis.imshow(
        log_mel,
        origin="lower",
        aspect="auto",
        cmap="cividis",
        vmin=top - 12,
        vmax=top,
        extent=(0, len(clip) / rate, 0, n_mels),
    )
    axis.set(xlabel="time, s", ylabel="mel band")


def data_example(experiments, args):
    """The three classes of time_frequency and their spectrograms at λ = 0.2, 1 and 5 sigma_ref."""
    keys = ("dataset_name", "n_samples", "n_points", "sigma_ref", "center_offset")
    drawn = [trials for trials, _ in experiments.values() if "config/sigma_ref" in trials]
    if not drawn:
        raise Skipped("there are no results of time_frequency")
    config = {key: drawn[0][f"config/{key}"].iloc[0] for key in keys} | {"seed": 1, "noise_std": 0.1}
    data = datasets.load(config)
    factors = (0.2, 1.0, 5.0)
    figure, axes = plt.subplots(3, 4, figsize=(WIDTH, 5.2), sharex=True)
    for label, row in enumerate(axes):
        clip = data.clips[(data.labels == label).nonzero()[0, 0]]
        row[0].plot(clip, color="black", linewidth=0.8)
        row[0].set_ylabel(f"{CLASSES[label]}\namplitude")
        for axis, factor in zip(row[1:], factors, strict=True):
            with torch.no_grad():
                power = DifferentiableSpectrogram(hop_length=1, init_lambd=factor * config["sigma_ref"])(clip)
            axis.imshow(power, origin="lower", aspect="auto", cmap="cividis", extent=(0, len(clip), 0, 0.5))
            if label == 0:
                axis.set_title(rf"$\lambda$ = {factor:g} $\sigma_{{ref}}$")
            axis.set_ylabel("cycles per sample" if factor == factors[0] else "")
    axes[0, 0].set_title("waveform")
    for axis in axes[-1]:
        axis.set_xlabel("time, samples")
    return figure


def accuracy(experiments, args):
    """Test accuracy against the initial window, means with their 95 % intervals."""
    shown = {name: trials for name, (trials, _) in experiments.items() if "_continuous" not in name}
    if not shown:
        raise Skipped("there are no results")
    figure, axes = panels(len(shown), 2.8)
    for axis, (name, trials) in zip(axes, shown.items(), strict=True):
        for method, shift in (("DMEL", 1.04), ("baseline", 1 / 1.04)):
            runs = trials[trials["config/trainable"] == (method == "DMEL")]
            points = [(group["init_window"].iloc[0], interval(group["accuracy"])) for _, group in runs.groupby("cell")]
            windows, values = [window * shift for window, _ in points], [value for _, value in points]
            errors = np.nan_to_num([value.high - value.mean for value in values])
            axis.errorbar(
                windows,
                [value.mean for value in values],
                errors,
                label=method,
                color=COLORS[method],
                marker=MARKERS[method],
                linestyle="-" if method == "DMEL" else "--",
                capsize=3,
            )
        n = trials.groupby(["cell", "config/trainable"]).size().max()
        axis.set(
            xscale="log",
            xlabel=window_label(trials, "initial "),
            ylabel="test accuracy, %",
            title=f"{title(name, trials)}, n = {n}",
        )
        mark_windows(axis.xaxis, trials)
    axes[0].legend(frameon=False)
    return figure


def convergence(experiments, args):
    """λ over the epochs of every trained run, and the median epoch from which it stays within 10 % of where it ends."""
    trained = {name: tables for name, tables in experiments.items() if tables[0]["config/trainable"].any()}
    if not trained:
        raise Skipped("there are no results")
    figure, axes = panels(len(trained), 3.6)
    for axis, (name, (trials, epochs)) in zip(axes, trained.items(), strict=True):
        unit = (trials["init_window"] / trials["config/init_lambd"]).iloc[0]
        histories = dict(list(epochs.groupby("trial")))
        for (_, runs, _), color, style in zip(cells(trials), COLORS.values(), LINES, strict=False):
            if runs.empty:
                continue
            init = runs["init_window"].iloc[0]
            for trial in runs.index:
                windows = np.r_[init, histories[trial]["lambd"].abs() * unit]
                axis.plot(windows, color=color, linestyle=style, linewidth=0.8)
            settled = runs["settled"].fillna(np.inf).median()
            told = f"settled by epoch {settled:.0f}" if np.isfinite(settled) else "still moving"
            axis.plot([], [], color=color, linestyle=style, label=f"from {init:.3g}: {told}")
        if "config/sigma_ref" in trials:
            axis.axhline(
                trials["config/sigma_ref"].iloc[0], color="black", linewidth=1, linestyle="-.", label=r"$\sigma_{ref}$"
            )
        axis.set(
            xscale="symlog",
            yscale="log",
            xlabel="epoch",
            ylabel=window_label(trials),
            title=title(name, trials),
            xlim=(0, None),
        )
        mark_windows(axis.yaxis, trials)
        axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def time_complexity(experiments, args):
    """What a DMEL run costs, in fixed windows: the paper's cost model, and seconds measured here."""
    measured = {name: ratios for name, (trials, _) in experiments.items() if len(ratios := fixed_runs(trials))}
    figure, axes = panels(3, 2.8)
    counts = np.arange(1, 60)
    for axis, c1 in zip(axes, (0.0001, 0.9999), strict=False):
        for seconds, color, style in ((0.020, COLORS["DMEL"], "-"), (0.300, COLORS["baseline"], "--")):
            ratios = [cost_ratio(seconds, n, c1) for n in counts]
            axis.plot(counts, ratios, color=color, linestyle=style, label=f"from {1000 * seconds:.0f} ms")
        axis.set(title=f"model, $C_1$ = {c1:g}")
    for (name, ratios), color, style in zip(measured.items(), COLORS.values(), LINES, strict=False):
        axes[2].plot(counts, ratios.mean() / counts, color=color, linestyle=style, label=name)
    axes[2].set(title="measured")
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", xlabel="number D of fixed windows", ylabel="cost of DMEL / of D windows")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7)
    return figure


def panels(n, height):
    """A figure of n panels side by side, and the panels."""
    figure, axes = plt.subplots(1, n, figsize=(max(WIDTH * n / 3, 3.6), height), squeeze=False)
    return figure, axes[0]


def title(name, trials):
    """The experiment, and its epochs where they ended every trial."""
    return name + (f", {trials['epochs'].max()} epochs" if was_cut(trials).all() else "")


def window_label(trials, kind=""):
    return f"{kind}λ, samples" if in_samples(trials) else f"{kind}window 6λ, ms"


def mark_windows(axis, trials):
    """Ticks at the initial windows of an x or y axis."""
    windows = trials.groupby("cell")["init_window"].first()
    axis.set_ticks(windows, [f"{window:.3g}" for window in windows])
    axis.set_ticks([], minor=True)


FIGURES = {
    function.__name__: function
    for function in (dmel, data_example, accuracy, convergence, time_complexity, before_after)
}

if __name__ == "__main__":
    run(main)
