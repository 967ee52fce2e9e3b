"""Prints the tables of the paper, in LaTeX and in Markdown, and what they say about its claims.

    python produce_tables.py --ray_results_dir=ray_results --csv=tables.csv
    python produce_tables.py --compare audio_mnist audio_mnist_continuous

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it. Windows are
l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are mean ± standard deviation, with
the 95 % interval of the mean. Differences are taken within runs, whose two trials share seed, data and batches.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from config import InputError, run
from results import Storage
from summary import EXPERIMENTS, fixed_runs, interval, markdown_table, paired, read_all

VARIED = {"config/trainable", "config/init_lambd", "config/model_name", "config/seed"}  # by the tables themselves
MIN_RUNS = 5  # fewer do not decide a claim
ABOUT_THE_SAME = 2  # percentage points
NEAR = 1.5  # λ is near sigma_ref within this factor
A_FEW = 5  # fixed windows
SAME_WINDOW = 1e-3  # ms or samples, in two experiments


def main():
    parser = argparse.ArgumentParser(description="Print the tables of the paper from the CSV files of predict_test.py.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--csv", type=Path, help="file to write the rows of all tables to")
    pair = {"nargs": 2, "metavar": ("A", "B"), "action": "append", "default": []}
    parser.add_argument("--compare", **pair, help="print B − A of two experiments too; may be given several times")
    args = parser.parse_args()
    storage = Storage(args.ray_results_dir)
    if not storage.list():
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")
    experiments = read_all(storage)
    tested = {name: results for name, results in experiments.items() if len(results.trials)}
    if unknown := [name for names in args.compare for name in names if name not in tested]:
        raise InputError(f"--compare: there are no results of '{unknown[0]}', but of {', '.join(tested) or 'none'}.")

    rows = []
    for name, results in experiments.items():
        if name in tested:
            rows += print_tables(results)
        elif name in EXPERIMENTS or results.n_started:
            print(f"% {name}: no results yet\n")
    for first, second in args.compare:
        print(f"{second} − {first} (95 % interval):\n\n{markdown_table(comparison(tested[first], tested[second]))}\n")
    if verdicts := [claim for results in tested.values() for claim in claims(results)]:
        print(f"Claims of the paper:\n\n{markdown_table(verdicts)}\n")
    if args.csv:
        Storage(args.csv.parent).write(args.csv.name, pd.DataFrame(rows).to_csv(index=False))


def print_tables(results):
    """Prints what there is of an experiment; returns its table once more, as a dict of plain values for each row."""
    print_notes(results)
    init, est = ("λ init, samples", "λ est, samples") if results.in_samples else ("window init", "window est")
    symbol = r"$\lambda_{%s}$" if results.in_samples else r"$l_{\lambda_{%s}}$"
    latex = [rf"Model & {symbol % 'init'} & {symbol % 'est'} & Method & Accuracy \\", r"\hline \hline"]
    markdown, rows = [], []
    for cell in results.cells():
        start = as_text(results, cell.init_window)
        for method, trials in halves(results, cell):
            end = start if method == "baseline" else as_text(results, *trials["window"].agg(["min", "max"]))
            values = interval(trials["accuracy"])
            accuracy = f"{values.mean:.1f}" + (f" ± {values.deviation:.1f}" if values.n > 1 else "")
            row = {"Model": cell.model, init: start, est: end, "Method": method, "Accuracy, %": accuracy}
            markdown.append(row | {"n": values.n, "95 % interval": values.bounds()})
            latex.append(rf"{cell.model} & {start} & {end} & {method} & ${accuracy}$ \\".replace("±", r"\pm"))
            row = {"experiment": results.name, "cell": cell.number, "model": cell.model, "init": start, "est": end}
            rows.append(row | {"method": method} | values._asdict())
        latex.append(r"\hline")
    print("", *latex, "", markdown_table(markdown), "", sep="\n")
    differences = [
        {"Model": cell.model, "init": as_text(results, cell.init_window)}
        | {"DMEL − baseline, points": f"{values.mean:+z.1f}", "n": values.n, "95 % interval": values.bounds()}
        for cell, values in results.differences()
    ]
    if differences:
        print(f"{markdown_table(differences)}\n")
    return rows


def print_notes(results):
    """Prints how many trials there are, and in what they differ beside what the tables tell."""
    trials, n_started = results.trials, results.n_started
    unfinished = f", of {n_started}: the others failed or are not finished" if n_started > len(trials) else ""
    print(f"% {results.name}: {len(trials)} trials{unfinished}")
    if n_cut := trials["cut"].sum():
        limits = " or ".join(map(str, sorted(trials["config/max_epochs"].unique())))
        print(f"% {n_cut} of {len(trials)} trials ended at max_epochs = {limits}, before patience ran out")
    for column in trials.filter(like="config/").columns.difference(VARIED, sort=False):
        if (trials.groupby(["config/model_name", "cell", "config/trainable"])[column].nunique() > 1).any():
            print(f"% averaged over {column.removeprefix('config/')}: {sorted(trials[column].unique().tolist())}")
    versions = sorted(set(trials.get("scripts", pd.Series(dtype=str)).dropna().astype(str)))
    if len(versions) > 1 or "+" in "".join(versions):
        print(f"% trained by several versions of the scripts: {', '.join(versions)}")


def halves(results, cell):
    """(method, trials) of each half of a cell that has trials."""
    methods = {"DSPEC" if results.in_samples else "DMEL": cell.trained, "baseline": cell.fixed}
    return [(method, trials) for method, trials in methods.items() if len(trials)]


def as_text(results, *windows):
    """A window, or several in brackets: λ in samples with a decimal, or ms cut to whole ones (35 may be 34.999999)."""
    texts = [f"{window:.1f}" if results.in_samples else f"{int(window + 1e-6)}" for window in windows]
    return (texts[0] if len(texts) == 1 else f"({', '.join(texts)})") + ("" if results.in_samples else " ms")


def comparison(first, second):
    """second − first for each half of each cell of second, paired by run: accuracy, and the epoch λ settles at."""
    for cell in second.cells():
        for method, trials in halves(second, cell):
            same = np.isclose(first.trials["init_window"], cell.init_window, rtol=0, atol=SAME_WINDOW)
            same &= first.trials["config/trainable"] == (method != "baseline")
            same &= first.in_samples == second.in_samples
            row = {"Method": method, "init": as_text(second, cell.init_window)}
            for column, heading in (("accuracy", "accuracy, points"), ("settled", "λ settles, epochs")):
                values = paired(trials, first.trials[same], column)
                is_told = values.n and (method, column) != ("baseline", "settled")
                row[heading] = f"{values:+z.1f}, n = {values.n}" if is_told else "none to compare"
            yield row


def claims(results):
    """Each claim of the paper that an experiment can test: the number that tests it, and whether it holds."""
    trials, differences = results.trials, results.differences()
    best = max((cell.fixed["accuracy"].mean() for cell, _ in differences), default=0)
    for cell, values in differences:
        least, claim = 0, "more accurate than the baseline from a poor window"
        if cell.fixed["accuracy"].mean() == best and len(differences) > 1:
            least = -ABOUT_THE_SAME
            claim = f"at most {ABOUT_THE_SAME} points less accurate than the baseline from the best window"
        claim = f"{claim}, {as_text(results, cell.init_window)}"
        yield verdict(results, claim, f"{values:+z.1f} points", values, least=least)
    if "config/sigma_ref" in trials and results.in_samples:
        sigma = trials["config/sigma_ref"].iloc[0]
        for cell in results.cells():
            if len(cell.trained) and not sigma / NEAR < cell.init_window < sigma * NEAR:
                values = interval(cell.trained["window"])
                claim = f"comes near λ = {sigma:g} from {cell.init_window:.1f}"
                yield verdict(results, claim, f"λ = {values:.1f}", values, sigma / NEAR, sigma * NEAR)
    if (values := fixed_runs(trials)).n:
        yield verdict(results, f"costs less than {A_FEW} fixed windows", f"as much as {values:.1f}", values, most=A_FEW)


def verdict(results, claim, measured, values, least=-np.inf, most=np.inf):
    """A claim holds where the whole interval of the mean lies between least and most, and does not where none does."""
    answer = "not enough runs"
    if values.n >= MIN_RUNS and least < values.low and values.high < most:
        answer = "holds"
    elif values.n >= MIN_RUNS and (values.high <= least or values.low >= most):
        answer = "does not hold"
    row = {"experiment": results.name, "DMEL": claim, "measured (95 % interval)": measured}
    return row | {"n": values.n, "verdict": answer}


if __name__ == "__main__":
    run(main)
