"""Prints the tables of the paper, in LaTeX and in Markdown, from the CSV files of predict_test.py.

    python produce_tables.py --ray_results_dir=ray_results

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it. Windows are
l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are mean ± standard deviation.
"""

import argparse
import io
import json
import os
import sys

import pandas as pd

from datasets import InputError
from dmel import WINDOW_SIGMAS
from results import Storage

EXPERIMENTS = ("esc50", "audio_mnist", "time_frequency")  # the paper's, in the order of its tables
MODEL_TITLES = {"panns_cnn6": "CNN6", "mel_linear_net": "LNet", "linear_net": "LinearNet"}
CELL = ["config/model_name", "cell"]
VARIED = {"config/trainable", "config/init_lambd", "config/model_name", "config/seed"}  # by the tables themselves


def main():
    parser = argparse.ArgumentParser(description="Print the tables of the paper from the CSV files of predict_test.py.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    storage = Storage(parser.parse_args().ray_results_dir)
    found = set(storage.list())
    if not found:
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")

    others = sorted(found - set(EXPERIMENTS), key=lambda name: (paper_order(name), name))
    for name in [*EXPERIMENTS, *others]:
        table = f"{name}/{name}.csv"
        text = storage.read(table)
        record = storage.read(f"{name}/experiment.json")
        if text is None:
            if name in EXPERIMENTS or record is not None:
                print(f"% {name}: no results yet\n")
            continue
        trials = read_trials(text, f"{storage.address}/{table}")
        rows, in_samples = table_rows(trials)
        started = sum(batch["n_trials"] for batch in json.loads(record)["batches"]) if record else len(trials)
        others = f", of {started}: the others failed or are not finished" if started > len(trials) else ""
        print(f"% {name}: {len(trials)} trials{others}")
        for note in notes(trials):
            print(f"% {note}")
        print(f"\n{latex(rows, in_samples)}\n\n{markdown(rows, in_samples)}\n")


def paper_order(name):
    """Position of the paper's experiment that an experiment's name contains."""
    return next((i for i, experiment in enumerate(EXPERIMENTS) if experiment in name), len(EXPERIMENTS))


def read_trials(text, path):
    """Trials of a CSV's text; column cell numbers the initial windows, equal ones to within 1e-6."""
    needed = ["config/init_lambd", "config/trainable", "config/model_name", "best_lambd_est", "test_accuracy"]
    try:
        trials = pd.read_csv(io.StringIO(text), index_col=0)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): make it again with predict_test.py.") from None
    missing = [column for column in needed if column not in trials]
    if missing or trials.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "has no trial"
        raise InputError(f"{path} {what}: make it again with predict_test.py.")
    trials = trials.sort_values("config/init_lambd")
    init = trials["config/init_lambd"]
    trials["cell"] = ((init - init.shift()) > 1e-6 * init).cumsum()
    return trials


def notes(trials):
    """One line for each further key of the config that varies within a cell and so is averaged over."""
    for column in trials.filter(like="config/").columns:
        if column not in VARIED and (trials.groupby([*CELL, "config/trainable"])[column].nunique() > 1).any():
            yield f"averaged over {column.removeprefix('config/')}: {sorted(trials[column].unique().tolist())}"


def table_rows(trials):
    """Dicts with cell, model, init, est, method, accuracy, deviation, n; and whether λ is told in samples."""
    in_samples = "config/resample_rate" not in trials or trials["config/resample_rate"].isna().all()
    rows = []
    for (model, cell), cell_trials in trials.groupby(CELL):
        for trainable, runs in sorted(cell_trials.groupby("config/trainable"), reverse=True):
            estimates = sorted(window(lambd, runs, in_samples) for lambd in runs["best_lambd_est"].abs())
            low, high = (number(value, in_samples) for value in (estimates[0], estimates[-1]))
            init = number(window(runs["config/init_lambd"].iloc[0], runs, in_samples), in_samples)
            unit = "" if in_samples else " ms"
            rows.append(
                {
                    "cell": (model, cell),
                    "model": MODEL_TITLES.get(model, model),
                    "init": init + unit,
                    "est": f"({low}, {high}){unit}" if trainable else init + unit,
                    "method": ("DSPEC" if in_samples else "DMEL") if trainable else "baseline",
                    "accuracy": 100 * runs["test_accuracy"].mean(),
                    "deviation": 100 * runs["test_accuracy"].std(),  # n - 1
                    "n": len(runs),
                }
            )
    return rows, in_samples


def window(lambd, runs, in_samples):
    """λ itself, in samples, or the window length 6λ / sample rate, in milliseconds."""
    return lambd if in_samples else 1000 * WINDOW_SIGMAS * lambd / runs["config/resample_rate"].iloc[0]


def number(value, in_samples):
    """One decimal for samples, cut to whole numbers for milliseconds (35 ms may be 34.99999 in a file)."""
    return f"{value:.1f}" if in_samples else f"{int(value + 1e-6)}"


def latex(rows, in_samples):
    symbol = r"\lambda_{%s}" if in_samples else r"l_{\lambda_{%s}}"
    lines = [rf"Model & ${symbol % 'init'}$ & ${symbol % 'est'}$ & Method & Accuracy \\", r"\hline \hline"]
    for i, row in enumerate(rows):
        deviation = "" if row["n"] == 1 else rf" \pm {row['deviation']:.1f}"
        accuracy = f"${row['accuracy']:.1f}{deviation}$"
        lines.append(rf"{row['model']} & {row['init']} & {row['est']} & {row['method']} & {accuracy} \\")
        if i + 1 == len(rows) or rows[i + 1]["cell"] != row["cell"]:
            lines.append(r"\hline")
    return "\n".join(lines)


def markdown(rows, in_samples):
    symbol = "λ {}, samples" if in_samples else "window {}"
    lines = [
        f"| Model | {symbol.format('init')} | {symbol.format('est')} | Method | Accuracy, % | n |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        deviation = "" if row["n"] == 1 else f" ± {row['deviation']:.1f}"
        cells = (row["model"], row["init"], row["est"], row["method"], f"{row['accuracy']:.1f}{deviation}", row["n"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"produce_tables.py: {error}")
    except BrokenPipeError:  # produce_tables.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
