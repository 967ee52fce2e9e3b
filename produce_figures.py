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
import os
from collections import Counter
from pathlib import Path

import machine

os.environ.update(machine.matplotlib_settings())  # before it is imported

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

import datasets
from config import Config, InputError, parse, run
from results import Storage, predictions_version
from summary import SEARCHED_WINDOWS, Interval, cells, read_all, read_costs, read_predictions

WIDTH = 7.2  # inches: of a text page, and readable in a README
LOG_RANGE = 12  # of a log-Mel picture, down from its largest value
MEL_TICKS = (500, 1000, 2000, 4000, 8000)  # Hz
FEW_CLASSES = 12  # up to so many, a confusion matrix has its numbers in it
PULSES = ("one pulse", "two, apart in time", "two, apart in frequency")  # classes, by label


def main():
    parser = argparse.ArgumentParser(
        description="Draw the figures from the CSV files of predict_test.py."
    )
    parser.add_argument(
        "--ray_results_dir", default="ray_results", help="folder or URI of results (ray_results)"
    )
    parser.add_argument(
        "--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)"
    )
    parser.add_argument("--output_dir", default="figures", help="folder to draw to (figures)")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, help="which ones (all that can be drawn)"
    )
    parser.add_argument("--experiment", nargs="+", metavar="NAME", help="which to show (all)")
    parser.add_argument(
        "--clip", type=int, default=0, help="number of the clip shown, in the test split (0)"
    )
    args = parser.parse_args()

    experiments = chosen_experiments(args)
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
            content = io.BytesIO()
            figure.savefig(content, format=suffix, metadata={"CreationDate": None})
            output.write(f"{name}.{suffix}", content.getvalue())
        print(f"{name}: {output.address}/{name}.png and .pdf")


def chosen_experiments(args):
    """Results by name, of the experiments to show; raises InputError where one has none."""
    experiments = {}
    storage = Storage(args.ray_results_dir)
    named = args.experiment or ()
    for name, results in read_all(storage, named, others_too=not named).items():
        if results.trials["epochs"].any():
            experiments[name] = results
        if results.n_untested:
            print(f"{name}: {results.n_untested} trials are not tested: run predict_test.py")

    for name in args.experiment or ():
        if name not in experiments:
            raise InputError(
                f"--experiment: there are no results of '{name}', but of "
                f"{', '.join(experiments) or 'none'}."
            )
    return {name: experiments[name] for name in args.experiment or experiments}


# What the network sees


def dmel(experiments, args):
    """The overview: a waveform, and its log-Mel at the shortest, the trained and a long window."""
    results, clip = chosen_clip(experiments, args)
    trained = results.trials[results.trials["config/trainable"]]
    best = trained.sort_values("best_valid_acc").iloc[-1]  # chosen without the test split
    initial = results.trials["config/init_lambd"]
    lambds = sorted([abs(best["best_lambd_est"]), initial.min(), initial.max()])

    shown = [("waveform", None)]
    for lambd in lambds:
        shown.append((f"{best['unit'] * lambd:.0f} ms", lambd))
    figure, [axes] = pictures(config_of(best), [clip], [shown], 2.2)

    axis = axes[1 + lambds.index(abs(best["best_lambd_est"]))]
    axis.set_title(f"{axis.get_title()}, trained", color="C0", weight="bold")
    axis.spines[:].set(visible=True, color="C0", linewidth=2.5)
    return figure


def before_after(experiments, args):
    """What the network sees of a clip before and after training, for every initial window.

    Where more than that varies, it is the network of the first cell.
    """
    results, clip = chosen_clip(experiments, args)
    trained = [cell for cell in cells(results.trials) if len(cell.trained)]
    config = config_of(trained[0].trained.iloc[0])
    before = []
    after = []
    for cell in trained:
        if cell.model == trained[0].model:
            trial = cell.trained.iloc[0]
            title = f"before training: {cell.init_window:.0f} ms"
            before.append((title, trial["config/init_lambd"]))
            after.append((f"after training: {trial['window']:.0f} ms", trial["best_lambd_est"]))
    figure, _ = pictures(config, [clip, clip], [before, after], 3.8)
    return figure


def data_example(experiments, args):
    """The three classes of time_frequency, and what the network sees of them at three λ."""
    drawn = [
        results.trials for results in experiments.values() if "config/sigma_ref" in results.trials
    ]
    if not drawn:
        raise InputError("there are no results of time_frequency.")
    config = config_of(drawn[0].iloc[0]).model_copy(update={"seed": 1, "noise_std": 0.1})
    data = datasets.load(config)
    clips = [data.clips[data.labels == label][0] for label in range(len(PULSES))]

    shown = [("waveform", None)]
    for factor in (0.2, 1.0, 5.0):
        shown.append((rf"$\lambda$ = {factor:g} $\sigma_{{ref}}$", factor * config.sigma_ref))
    untitled = [("", lambd) for _, lambd in shown]
    figure, axes = pictures(config, clips, [shown, untitled, untitled], 5.2)
    for axis, name in zip(axes[:, 0], PULSES, strict=True):
        axis.set_ylabel(f"{name}\namplitude")
    return figure


def chosen_clip(experiments, args):
    """The first Results with a window trained on recordings, and clip number --clip of its test.

    The clip is a float32 tensor, shape = (n_points,).
    """
    for results in experiments.values():
        if not results.in_samples and results.trials["config/trainable"].any():
            break
    else:
        raise InputError("no experiment shown here has a window trained on recordings.")

    config = config_of(results.trials.iloc[0])
    data = datasets.load(config, datasets.recordings_of(config, args.data_base_dir))
    clips = data.clips[data.splits["test"]]
    if not 0 <= args.clip < len(clips):
        raise InputError(f"--clip={args.clip}: the test split has clips 0 to {len(clips) - 1}.")
    return results, clips[args.clip]


def config_of(trial):
    """The Config of a trial, a row of the table; what the table leaves empty is at its default."""
    config = {}
    for key in Config.model_fields:
        value = trial.get(f"config/{key}")
        if value is None or value != value:  # nan
            continue
        if isinstance(value, float) and value.is_integer():  # beside empty cells pandas has no int
            value = int(value)
        config[key] = value
    with contextlib.suppress(KeyError, TypeError, ValueError, SyntaxError):
        config["split"] = ast.literal_eval(config["split"])  # groups; a name stays as it is
    config = parse(config | {"pretrained": False})
    datasets.check(config)
    return config


def pictures(config, clips, rows, height):
    """A figure, height in inches, and its panels: a row of (title, λ in samples) for each clip.

    A clip is a tensor, shape = (n_points,). A panel shows what the config's network sees of it at
    that λ, or at None the clip itself, which only the first of a row may be.
    """
    from models import build  # here, as other figures do without torch

    net, _ = build(config)
    layer = net.spectrogram_layer.requires_grad_(False)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True)
    for clip, row, shown in zip(clips, axes, rows, strict=True):
        for axis, (title, lambd) in zip(row, shown, strict=True):
            axis.set_title(title)
            if lambd is None:
                draw_waveform(axis, clip, config)
            else:
                layer.lambd.fill_(lambd)
                draw_features(axis, layer(clip).numpy(), config, hasattr(layer, "n_mels"))

    has_waveform = rows[0][0][1] is None
    first_picture = 1 if has_waveform else 0
    for axis in axes[:, first_picture + 1 :].flat:  # these have the scale of the first picture
        axis.set(ylabel="", yticklabels=[])
    for axis in axes[-1]:
        axis.set_xlabel("time, s" if config.resample_rate else "time, samples")
    return figure, axes


def draw_waveform(axis, clip, config):
    """Draws a clip against time, with its largest amplitude at 1."""
    seconds = np.arange(len(clip)) / (config.resample_rate or 1)
    axis.plot(seconds, clip / clip.abs().max(), "k", linewidth=0.6)
    axis.set_ylabel("amplitude")


def draw_features(axis, features, config, is_mel):
    """Draws features, shape = (bands, frames), with frequencies in Hz or in cycles per sample."""
    rate = config.resample_rate or 1
    duration = config.n_points / rate
    if not is_mel:
        axis.imshow(features, extent=(0, duration, 0, rate / 2))
        axis.set_ylabel("frequency, Hz" if config.resample_rate else "frequency, cycles/sample")
        return

    n_mels = len(features)
    lowest = features.max() - LOG_RANGE if config.energy_normalize else None
    axis.imshow(features, extent=(0, duration, 0, n_mels), vmin=lowest)

    # Filter k has its centre at (k + 1) / (n_mels + 1) of the mel scale, and lies at k + 1/2 here.
    ticks = np.array([tick for tick in MEL_TICKS if tick <= rate // 2])
    share = np.log(1 + ticks / 700) / np.log(1 + rate // 2 / 700)
    axis.set_yticks((n_mels + 1) * share - 0.5, [str(tick) for tick in ticks])
    axis.set_ylim(0, n_mels)
    axis.set_ylabel("frequency, Hz")


# Curves


def panels(shown, height, sharey):
    """A figure, height in inches, with a panel for each of some Results."""
    if not shown:
        raise InputError("there are no results.")
    figure = Figure(figsize=(max(WIDTH * len(shown) / 3, 3.6), height))
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=sharey)
    for axis, results in zip(axes[0], shown, strict=True):
        title = results.name
        if (results.trials["epochs"] >= results.trials["config/max_epochs"]).all():
            title += f"\n{results.trials['epochs'].max():.0f} epochs"
        axis.set_title(title)
    return figure, axes[0]


def window_label(results):
    return "λ, samples" if results.in_samples else "window 6λ, ms"


def accuracy(experiments, args):
    """Test accuracy against the initial window, where both halves were trained.

    Points are means over runs, bars their 95 % intervals.
    """
    shown = []
    for results in experiments.values():
        if results.trials["config/trainable"].nunique() == 2:
            shown.append(results)

    figure, axes = panels(shown, 2.8, sharey=False)
    looks = {True: ("o", 1.04), False: ("s", 1 / 1.04)}  # marker, and shift, so both can be seen
    for axis, results in zip(axes, shown, strict=True):
        models = list(dict.fromkeys(results.trials["model"]))
        most_runs = 0
        for model in models:
            for is_trained, (marker, shift) in looks.items():
                trials = results.trials[results.trials["model"] == model]
                trials = trials[trials["config/trainable"] == is_trained]
                if trials.empty:  # such as where they failed
                    continue
                by_window = trials.groupby("init_window")["accuracy"]
                values = [Interval(runs).within(0, 100) for _, runs in by_window]
                most_runs = max(most_runs, by_window.size().max())

                means = np.array([value.mean for value in values])
                lows = np.nan_to_num(means - [value.low for value in values])
                highs = np.nan_to_num([value.high for value in values] - means)
                method = trials["method"].iloc[0]
                axis.errorbar(
                    np.array(list(by_window.groups)) * shift,
                    means,
                    [lows, highs],
                    label=method if len(models) == 1 else f"{model}, {method}",
                    marker=marker,
                    capsize=3,
                )
        windows = sorted(set(results.trials["init_window"]))
        axis.set(
            title=f"{axis.get_title()}, n = {most_runs}",
            xscale="log",
            xlabel=f"initial {window_label(results)}",
            ylabel="test accuracy, %",
        )
        axis.set_xticks(windows, [f"{window:.3g}" for window in windows])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    return figure


def convergence(experiments, args):
    """λ over the epochs of every trained run; the legend has the median at the best epoch."""
    shown = []
    for results in experiments.values():
        if results.trials["config/trainable"].any():
            shown.append(results)

    looks = list(matplotlib.rcParams["axes.prop_cycle"])
    one_unit = len({results.in_samples for results in shown}) == 1
    figure, axes = panels(shown, 3.6, sharey=one_unit)
    for axis, results in zip(axes, shown, strict=True):
        unit = "samples" if results.in_samples else "ms"
        for number, cell in enumerate(cells(results.trials)):
            look = looks[number % len(looks)]
            for _, trial in cell.trained.iterrows():
                windows = trial["unit"] * np.abs(trial["lambds"])
                axis.plot([cell.init_window, *windows], linewidth=0.8, **look)
            if len(cell.trained):
                best = cell.trained["window"].median()
                label = f"from {cell.init_window:.3g}: {best:.3g} {unit}"
                if results.trials["model"].nunique() > 1:
                    label = f"{cell.model}, {label}"
                axis.plot([], [], **look, label=label)
        if "config/sigma_ref" in results.trials:
            sigma = results.trials["config/sigma_ref"].iloc[0]
            label = rf"$\sigma_{{ref}}$ = {sigma:g} samples"
            axis.axhline(sigma, color="black", linewidth=1, linestyle="-.", label=label)

        axis.set(xscale="symlog", xlabel="epoch", xlim=(0, None))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:g}"))
        axis.set(yscale="log", ylabel=window_label(results))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda window, _: f"{window:g}"))
        axis.yaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", linewidth=0.3)
        axis.legend(
            title="median at the best epoch", loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )
    return figure


# Confusions


def confusion(experiments, args):
    """What the clips of each class are taken for, by DMEL and by the baseline, over all trials.

    Of the first experiment shown that has predictions. A row, the clips of a class, is 100 %.
    """
    counts = {}
    for results in experiments.values():
        counts = count_predictions(results, Storage(args.ray_results_dir))
        if counts:
            break
    if not counts:
        raise InputError("no experiment shown here has predictions: run predict_test.py.")

    classes = classes_in(counts)
    side = 3.0  # inches
    if len(classes) > FEW_CLASSES:
        side = 0.13 * len(classes)
    figure = Figure(figsize=(side * len(counts) + 1.2, side + 0.8))
    axes = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axis, (method, (pairs, n_trials)) in zip(axes, counts.items(), strict=True):
        image = draw_shares(axis, shares_of(pairs, classes), classes)
        axis.set(title=f"{results.name}, {method}: {n_trials} trials", xlabel="taken for")
    axes[0].set_ylabel("class")
    figure.colorbar(image, ax=axes, label="% of the clips of a class", shrink=0.8)
    return figure


def classes_in(counts):
    """Names of all classes in what count_predictions gives, in order."""
    classes = set()
    for pairs, _ in counts.values():
        for label, guess in pairs:
            classes.add(label)
            classes.add(guess)
    return sorted(classes, key=place_of_class)


def place_of_class(name):
    """What orders classes: numbers by their value, then names by the alphabet."""
    if name.isdecimal():
        return 0, int(name), ""
    return 1, 0, name


def count_predictions(results, storage):
    """How often a class is taken for another in Results: a Counter and its trials, by method.

    A Counter's keys are (class, predicted class). It is of all trials, but for those whose
    predictions are not there.
    """
    counts = {}
    if "predictions" not in results.trials:
        return counts
    predictions = read_predictions(storage, results.name)
    for _, trial in results.trials.sort_values("config/trainable", ascending=False).iterrows():
        rows = predictions.get(trial["trial_id"])
        if rows and predictions_version(rows) == trial["predictions"]:
            pairs, n_trials = counts.get(trial["method"], (Counter(), 0))
            pairs.update((label, guess) for _, label, guess, _ in rows)
            counts[trial["method"]] = (pairs, n_trials + 1)
    return counts


def shares_of(pairs, classes):
    """Percentages of the clips of each class, shape = (classes, predicted classes).

    pairs: how often each (class, predicted class) is. A class without clips has zeros.
    """
    shares = np.zeros((len(classes), len(classes)))
    for row, label in enumerate(classes):
        for column, guess in enumerate(classes):
            shares[row, column] = pairs[label, guess]
    return 100 * shares / np.maximum(shares.sum(axis=1, keepdims=True), 1)


def draw_shares(axis, shares, classes):
    """A picture of percentages, see shares_of, with the names of the classes beside it."""
    image = axis.imshow(shares, vmin=0, vmax=100, origin="upper", aspect="equal")
    rotation = 90
    size = 6
    if len(classes) <= FEW_CLASSES:
        write_shares(axis, shares)
        size = 8
        if max(map(len, classes)) <= 2:  # such as digits
            rotation = 0
    axis.set_xticks(range(len(classes)), classes, fontsize=size, rotation=rotation)
    axis.set_yticks(range(len(classes)), classes, fontsize=size)
    return image


def write_shares(axis, shares):
    """Writes percentages, shape = (classes, predicted classes), into their fields; zeros are left.

    They are dark on light fields and light on dark ones.
    """
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            color = "black" if share > 50 else "white"
            axis.text(
                column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color
            )


# Cost


def time_complexity(experiments, args):
    """What a DMEL run costs beside a search: the paper's cost model, and epochs measured here.

    Measured are the costs in results/cost.json, of `python -m benchmarks cost`.
    """
    figure = Figure(figsize=(WIDTH, 2.8))
    axes = figure.subplots(1, 3, sharey=True)
    counts = np.arange(1, 61)
    for axis, c1 in zip(axes, (0.0001, 0.9999), strict=False):
        for seconds in (0.010, 0.020, 0.300):
            ratios = [cost_ratio(seconds, n, c1) for n in counts]
            axis.plot(counts, ratios, label=f"from {1000 * seconds:.0f} ms")
    for row in read_costs(Storage(args.ray_results_dir)):
        of_one = SEARCHED_WINDOWS * row["quotient"]
        axes[2].plot(counts, of_one / counts, label=row["experiment"])

    titles = (
        "model, $C_1$ = 0.0001:\nthe network dominates",
        "model, $C_1$ = 0.9999:\nthe spectrogram dominates",
        "measured,\nnothing cached",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=title, yscale="log", xlabel="number D of fixed windows")
        if len(axis.lines) > 1:
            axis.legend()
    axes[0].set_ylabel("cost of DMEL / of D windows")
    return figure


def cost_ratio(init_seconds, n_windows, c1):
    """The paper's cost model: a DMEL run from a window, divided by a search over n_windows others.

    c1 weighs the spectrogram, 1 - c1 the network behind it; both costs are those of one step and
    one sample of a clip. λ moves by 1 ms a step from init_seconds to 35 ms; the fixed windows lie
    evenly from two hops to 0.3 s.
    """
    sample_rate = 8000  # Hz
    n_mels = 128
    hop = 80  # samples
    n_steps = int(abs(init_seconds - 0.035) / 0.001)
    walked = sample_rate * np.linspace(init_seconds, 0.035, n_steps)
    fixed = np.linspace(2 * hop, 0.3 * sample_rate, n_windows)

    dmel_cost = (c1 * (walked * np.log(walked)).mean() + (1 - c1) * n_mels) / hop
    search_cost = c1 * np.log(fixed).sum() + (1 - c1) * (2 * n_mels / fixed).sum()
    return dmel_cost / search_cost


FIGURES = {
    "dmel": dmel,
    "data_example": data_example,
    "accuracy": accuracy,
    "convergence": convergence,
    "confusion": confusion,
    "time_complexity": time_complexity,
    "before_after": before_after,
}

if __name__ == "__main__":
    run(main)
