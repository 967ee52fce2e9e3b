"""Draws the figures, as PNG and PDF, from the CSV files of predict_test.py.

    python produce_figures.py --ray_results_dir=results --data_base_dir=data
    python produce_figures.py --figures before_after --experiment=esc50 --clip=12

Without --figures, those that cannot be drawn are skipped: dmel and before_after show a recording,
so they need it.
"""

import argparse
import ast
import contextlib
import io
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.artist import setp
from matplotlib.figure import Figure

import datasets
from config import InputError, complete, run
from results import Storage
from summary import CELL, Interval, fixed_runs, halves, read_all

WIDTH = 7.2  # inches: of a text page, and readable in a README
LOG_RANGE = 12  # of a log-Mel picture, down from its largest value


def main():
    parser = argparse.ArgumentParser(
        description="Draw the figures from the CSV files of predict_test.py."
    )
    parser.add_argument(
        "--ray_results_dir",
        default="ray_results",
        help="folder or URI of all results (ray_results)",
    )
    parser.add_argument(
        "--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)"
    )
    parser.add_argument("--output_dir", default="figures", help="folder to draw to (figures)")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, help="which ones (all that can be drawn)"
    )
    parser.add_argument(
        "--experiment", nargs="+", metavar="NAME", help="which to show (all; a clip: audio_mnist)"
    )
    parser.add_argument(
        "--clip", type=int, default=0, help="number of their clip in the test split (0)"
    )
    args = parser.parse_args()
    experiments = {
        name: r
        for name, r in read_all(Storage(args.ray_results_dir)).items()
        if r.trials["epochs"].any()
    }
    if unknown := [name for name in args.experiment or () if name not in experiments]:
        raise InputError(
            f"--experiment: there are no results of '{unknown[0]}', but of {', '.join(experiments)}."
        )
    experiments = {name: experiments[name] for name in args.experiment or experiments}
    output = Storage(args.output_dir)
    matplotlib.style.use(Path(__file__).with_name("figures.mplstyle"))
    for name in args.figures or FIGURES:
        try:
            figure = FIGURES[name](experiments, args)
        except InputError as reason:
            if args.figures:
                raise
            print(f"{name}: skipped: {reason}")
            continue
        for suffix in ("png", "pdf"):
            figure.savefig(content := io.BytesIO(), format=suffix, metadata={"CreationDate": None})
            output.write(f"{name}.{suffix}", content.getvalue())
        print(f"{name}: {output.address}/{name}.png and .pdf")


def dmel(experiments, args):
    """The overview: a waveform, and what the network sees of it at the shortest, the trained and
    the longest window.
    """
    results, clip = chosen_clip(experiments, args)
    best = (
        halves(results.trials)[0].sort_values("best_valid_acc").iloc[-1]
    )  # chosen without the test split
    trained = best["best_lambd_est"]
    lambds = sorted([trained, *results.trials["config/init_lambd"].iloc[[0, -1]]], key=abs)
    shown = [
        ("waveform", None),
        *((f"{best['unit'] * abs(lambd):.0f} ms", lambd) for lambd in lambds),
    ]
    figure, [axes] = pictures(config_of(best), [clip], [shown], 2.2)
    axis = axes[1 + lambds.index(trained)]
    axis.set_title(f"{axis.get_title()}, trained", color="C0", weight="bold")
    axis.spines[:].set(visible=True, color="C0", linewidth=2.5)
    return figure


def before_after(experiments, args):
    """What the network sees of a clip before and after training, for every initial window."""
    results, clip = chosen_clip(experiments, args)
    trials = halves(results.trials)[0].groupby(CELL).head(1)
    shown = []
    for when, columns in (
        ("before", ["init_window", "config/init_lambd"]),
        ("after", ["window", "best_lambd_est"]),
    ):
        shown.append(
            [
                (f"{when} training: {window:.0f} ms", lambd)
                for window, lambd in trials[columns].to_numpy()
            ]
        )
    return pictures(config_of(trials.iloc[0]), [clip, clip], shown, 3.8)[0]


def data_example(experiments, args):
    """The three classes of time_frequency, and what the network sees of them at λ = 0.2, 1 and 5
    sigma_ref.
    """
    if not (
        trials := [
            results.trials
            for results in experiments.values()
            if "config/sigma_ref" in results.trials
        ]
    ):
        raise InputError("there are no results of time_frequency.")
    config = config_of(trials[0].iloc[0]) | {"seed": 1, "noise_std": 0.1}
    data, sigma = datasets.load(config), config["sigma_ref"]
    clips = [data.clips[data.labels == label][0] for label in range(3)]
    shown = [
        ("waveform", None),
        *((rf"$\lambda$ = {n:g} $\sigma_{{ref}}$", n * sigma) for n in (0.2, 1.0, 5.0)),
    ]
    figure, axes = pictures(config, clips, [shown, *2 * [[("", lambd) for _, lambd in shown]]], 5.2)
    for axis, name in zip(
        axes[:, 0], ("one pulse", "two, apart in time", "two, apart in frequency"), strict=True
    ):
        axis.set_ylabel(f"{name}\namplitude")
    return figure


def chosen_clip(experiments, args):
    """Results of --experiment, and clip number --clip of its test split, shape = (n_points,), a
    float32 tensor.
    """
    results = experiments.get(args.experiment[0] if args.experiment else "audio_mnist")
    if results is None or results.in_samples or not results.trials["config/trainable"].any():
        raise InputError(
            "audio_mnist, or the first --experiment, has no results with a window trained on recordings."
        )
    config = config_of(results.trials.iloc[0])
    data = datasets.load(config, datasets.recordings_of(config, args.data_base_dir))
    clips = data.clips[data.splits["test"]]
    if not 0 <= args.clip < len(clips):
        raise InputError(f"--clip={args.clip}: the test split has clips 0 to {len(clips) - 1}.")
    return results, clips[args.clip]


def config_of(trial):
    """The config of a trial, a row of the table; what the table leaves empty is left out."""
    config = {
        key.removeprefix("config/"): value
        for key, value in trial.filter(like="config/").dropna().items()
    }
    with contextlib.suppress(
        KeyError, TypeError, ValueError, SyntaxError
    ):  # no split, or a name: check knows them
        config["split"] = ast.literal_eval(config["split"])
    config = complete(config | {"pretrained": False})
    datasets.check(config)
    return config


def pictures(config, clips, rows, height):
    """A figure, height in inches, and its panels: a row for each clip, a tensor (n_points,), of
    (title, λ in samples).

    A panel shows what the config's network sees of the clip at that λ; at None, as the first may
    be, the clip itself.
    """
    from models import build  # here, as other figures do without torch

    layer = build(config)[0].spectrogram_layer.requires_grad_(False)
    is_mel, is_recording, rate = (
        hasattr(layer, "n_mels"),
        bool(config["resample_rate"]),
        config["resample_rate"] or 1,
    )
    bands = "mel band" if is_mel else "frequency, Hz" if is_recording else "cycles per sample"
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True)
    for clip, row, shown in zip(clips, axes, rows, strict=True):
        for axis, (title, lambd) in zip(row, shown, strict=True):
            axis.set(title=title, ylabel="amplitude" if lambd is None else bands)
            if lambd is None:
                axis.plot(np.arange(len(clip)) / rate, clip / clip.abs().max(), "k", linewidth=0.6)
                continue
            layer.lambd.fill_(lambd)
            features = layer(clip).numpy()  # (bands, frames)
            extent = (0, len(clip) / rate, 0, layer.n_mels if is_mel else rate / 2)
            axis.imshow(
                features,
                extent=extent,
                vmin=features.max() - LOG_RANGE if is_mel and layer.log else None,
            )
    setp(axes[-1], xlabel="time, s" if is_recording else "time, samples")
    setp(
        axes[:, 1 + (rows[0][0][1] is None) :], ylabel="", yticklabels=[]
    )  # which have the scale of their left
    return figure, axes


def curves(shown, height, axis_name, kind=""):
    """A figure with a panel for each of some Results, whose initial windows stand along its "x" or
    "y" axis.
    """
    if not shown:
        raise InputError("there are no results.")
    figure = Figure(figsize=(max(WIDTH * len(shown) / 3, 3.6), height))
    one_unit = len({results.in_samples for results in shown}) == 1
    [axes] = figure.subplots(1, len(shown), squeeze=False, sharey=axis_name == "y" and one_unit)
    for axis, results in zip(axes, shown, strict=True):
        windows, unit = (
            results.trials["init_window"].unique(),
            "λ, samples" if results.in_samples else "window 6λ, ms",
        )
        about = {
            "label": kind + unit,
            "scale": "log",
            "ticks": windows,
            "ticklabels": [f"{w:.3g}" for w in windows],
        }
        n_epochs = results.trials["epochs"]
        epochs = (
            f"\n{n_epochs.max():.0f} epochs"
            if (n_epochs >= results.trials["config/max_epochs"]).all()
            else ""
        )
        axis.set(
            title=results.name + epochs, **{axis_name + key: value for key, value in about.items()}
        )
        axis.minorticks_off()
    return figure, axes


def accuracy(experiments, args):
    """Test accuracy against the initial window, means with their 95 % intervals, where both halves
    were trained.
    """
    shown = [
        results
        for results in experiments.values()
        if results.trials["config/trainable"].nunique() == 2
    ]
    figure, axes = curves(shown, 2.8, "x", "initial ")
    for axis, results in zip(axes, shown, strict=True):
        looks = (
            ("o", 1.04),
            ("s", 1 / 1.04),
        )  # marker, and shift of the windows so that both can be seen
        for (method, trials), (marker, shift) in zip(
            results.trials.groupby("method"), looks, strict=True
        ):
            windows = trials.groupby(CELL)["init_window"].first() * shift
            values = [Interval(accuracies) for _, accuracies in trials.groupby(CELL)["accuracy"]]
            means, highs = np.array([(value.mean, value.high) for value in values]).T
            axis.errorbar(
                windows, means, np.nan_to_num(highs - means), label=method, marker=marker, capsize=3
            )
        n = results.trials.groupby([*CELL, "method"]).size().max()
        axis.set(ylabel="test accuracy, %", title=f"{axis.get_title()}, n = {n}")
    axes[0].legend(fontsize=9)
    return figure


def convergence(experiments, args):
    """λ over the epochs of every trained run, and the median epoch from which it stays within 10 %
    of where it ends.
    """
    shown = [
        results for results in experiments.values() if results.trials["config/trainable"].any()
    ]
    figure, axes = curves(shown, 3.6, "y")
    for axis, results in zip(axes, shown, strict=True):
        trained = halves(results.trials)[0].groupby(CELL)
        for ((*_, init_window, _), trials), look in zip(
            trained, matplotlib.rcParams["axes.prop_cycle"], strict=False
        ):
            for unit, lambds in zip(trials["unit"], trials["lambds"], strict=True):
                axis.plot([init_window, *(unit * np.abs(lambds))], linewidth=0.8, **look)
            settled = trials["settled"].fillna(np.inf).median()
            end = f"settled by epoch {settled:.0f}" if np.isfinite(settled) else "still moving"
            axis.plot([], [], **look, label=f"from {init_window:.3g}: {end}")
        if "config/sigma_ref" in results.trials:
            sigma = results.trials["config/sigma_ref"].iloc[0]
            axis.axhline(sigma, color="black", linewidth=1, linestyle="-.", label=r"$\sigma_{ref}$")
        axis.set(xscale="symlog", xlabel="epoch", xlim=(0, None))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def time_complexity(experiments, args):
    """What a DMEL run costs, in fixed windows: the paper's cost model, and seconds measured here."""
    figure = Figure(figsize=(WIDTH, 2.8))
    axes, counts = figure.subplots(1, 3), np.arange(1, 60)
    for axis, c1 in zip(axes, (0.0001, 0.9999), strict=False):
        for seconds in (0.020, 0.300):
            axis.plot(
                counts,
                [cost_ratio(seconds, n, c1) for n in counts],
                label=f"from {1000 * seconds:.0f} ms",
            )
    for results in experiments.values():
        if (ratio := fixed_runs(results.trials)).n:
            axes[2].plot(counts, ratio.mean / counts, label=results.name)
    for axis, title in zip(
        axes, ("model, $C_1$ = 0.0001", "model, $C_1$ = 0.9999", "measured"), strict=True
    ):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(
            title=title,
            yscale="log",
            xlabel="number D of fixed windows",
            ylabel="cost of DMEL / of D windows",
        )
        if axis.lines[1:]:
            axis.legend()
    return figure


def cost_ratio(init_seconds, n_windows, c1):
    """The paper's cost model: a DMEL run from a window of init_seconds, divided by a search over
    n_windows fixed ones.

    c1 weighs the spectrogram, 1 - c1 the network behind it; both costs are those of one step and
    one sample of a clip. λ moves by 1 ms a step to 35 ms; the fixed windows lie evenly from two
    hops to 0.3 s.
    """
    sample_rate, n_mels, hop = 8000, 128, 80  # Hz, and samples
    walked = sample_rate * np.linspace(init_seconds, 0.035, int(abs(init_seconds - 0.035) / 0.001))
    fixed = np.linspace(2 * hop, 0.3 * sample_rate, n_windows)
    search = c1 * np.log(fixed).sum() + (1 - c1) * (2 * n_mels / fixed).sum()
    return (c1 * (walked * np.log(walked)).mean() + (1 - c1) * n_mels) / hop / search


FIGURES = {
    draw.__name__: draw
    for draw in (dmel, data_example, accuracy, convergence, time_complexity, before_after)
}

if __name__ == "__main__":
    run(main)
