"""Prints the tables of the paper, in LaTeX and in Markdown, and what they say about its claims.

    python produce_tables.py --csv=tables.csv --compare audio_mnist audio_mnist_continuous

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it.
Windows are l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are
mean ± standard deviation, with the 95 % interval of the mean. Differences are taken within runs,
whose two trials share seed, data and batches.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from config import InputError, run
from results import Storage
from summary import (
    CELL,
    Interval,
    differences,
    fixed_runs,
    halves,
    markdown_table,
    paired,
    read_all,
    window_text,
)

MIN_RUNS = 5  # fewer do not decide a claim
ABOUT_THE_SAME = 2  # percentage points
NEAR = 1.5  # λ is near sigma_ref within this factor
A_FEW = 5  # fixed windows
GAINS = (
    "Model",
    "init",
    "DMEL − baseline, points",
    "n",
    "95 % interval",
)  # headings, as those below
COMPARED = ("Method", "init", "accuracy, points", "λ settles, epochs")
CLAIMED = ("experiment", "DMEL", "measured (95 % interval)", "n", "verdict")


def main():
    parser = argparse.ArgumentParser(
        description="Print the tables of the paper from the CSV files of predict_test.py."
    )
    parser.add_argument(
        "--ray_results_dir",
        default="ray_results",
        help="folder or URI of all results (ray_results)",
    )
    parser.add_argument("--csv", type=Path, help="file to write the rows of all tables to")
    pair = {"nargs": 2, "metavar": ("A", "B"), "action": "append", "default": []}
    parser.add_argument(
        "--compare", **pair, help="print B − A of two experiments too; may be given several times"
    )
    args = parser.parse_args()
    if not (storage := Storage(args.ray_results_dir)).list():
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")
    experiments = read_all(storage)
    tested = {name: results for name, results in experiments.items() if len(results.trials)}
    if unknown := [name for names in args.compare for name in names if name not in tested]:
        raise InputError(
            f"--compare: there are no results of '{unknown[0]}', but of {', '.join(tested) or 'none'}."
        )
    rows = []
    for name, results in experiments.items():
        if name in tested:
            rows += print_tables(results)
        else:
            print(f"% {name}: no results yet\n")
    for first, second in ([tested[name] for name in names] for names in args.compare):
        table, note = (
            markdown_table(COMPARED, comparison(first, second)),
            versions_note(first, second),
        )
        print(f"{second.name} − {first.name} (95 % interval):\n{note}\n{table}\n")
    if verdicts := [
        (name, *claim) for name, results in tested.items() for claim in claims(results)
    ]:
        print(f"Claims of the paper:\n\n{markdown_table(CLAIMED, verdicts)}\n")
    if args.csv:
        Storage(args.csv.parent).write(args.csv.name, pd.DataFrame(rows).to_csv(index=False))


def print_tables(results):
    """Prints what there is of an experiment; returns its table once more, as a dict of plain values
    for each row.
    """
    print_notes(results)
    init, est = (
        ("λ init, samples", "λ est, samples")
        if results.in_samples
        else ("window init", "window est")
    )
    symbol = r"$\lambda_{%s}$" if results.in_samples else r"$l_{\lambda_{%s}}$"
    latex = [
        rf"Model & {symbol % 'init'} & {symbol % 'est'} & Method & Accuracy \\",
        r"\hline \hline",
    ]
    markdown, rows = [], []
    for (_, model, number, _, start), cell in results.trials.groupby(CELL):
        for method, trials in cell.groupby("method"):  # DMEL before baseline
            values, windows = Interval(trials["accuracy"]), trials["window"]
            end = (
                start
                if method == "baseline"
                else window_text(results.in_samples, windows.min(), windows.max())
            )
            about = {"model": model, "init": start, "est": end, "method": method}
            accuracy = f"{values.mean:.1f}" + (f" ± {values.deviation:.1f}" if values.n > 1 else "")
            latex.append(" & ".join([*about.values(), rf"${accuracy}$ \\".replace("±", r"\pm")]))
            markdown.append((*about.values(), accuracy, values.n, values.bounds()))
            rows.append({"experiment": results.name, "cell": number, **about, **vars(values)})
        latex.append(r"\hline")
    headings = ("Model", init, est, "Method", "Accuracy, %", "n", "95 % interval")
    print("", *latex, "", markdown_table(headings, markdown), "", sep="\n")
    gains = differences(results.trials)
    if gains := [
        (model, init, f"{gain.mean:+z.1f}", gain.n, gain.bounds()) for model, init, _, gain in gains
    ]:
        print(f"{markdown_table(GAINS, gains)}\n")
    return rows


def print_notes(results):
    """Prints how many trials there are, and in what they differ beside what the tables tell."""
    trials, n = results.trials, len(results.trials)
    unfinished = (
        f", of {results.n_started}: the others failed or are not finished"
        if results.n_started > n
        else ""
    )
    print(f"% {results.name}: {n} trials{unfinished}")
    if n_cut := (trials["epochs"] >= trials["config/max_epochs"]).sum():
        limits = " or ".join(map(str, sorted(trials["config/max_epochs"].unique())))
        print(f"% {n_cut} of {n} trials ended at max_epochs = {limits}, before patience ran out")
    for column in trials.filter(like="config/").columns.drop(["config/init_lambd", "config/seed"]):
        if (trials.groupby([*CELL, "method"])[column].nunique(dropna=False) > 1).any():
            values = sorted(
                trials[column].unique().tolist(), key=str
            )  # nan: the key is not given, or None
            print(f"% averaged over {column.removeprefix('config/')}: {values}")
    print(versions_note(results), end="")


def versions_note(*several):
    """A line on the versions of the scripts that Results were trained by, nothing where it was one."""
    versions = sorted(
        {str(name) for results in several for name in results.trials.get("scripts", ["unknown"])}
    )
    noted = len(versions) > 1 or "+" in "".join(versions)
    return f"% trained by several versions of the scripts: {', '.join(versions)}\n" if noted else ""


def comparison(first, second):
    """second − first for each half of each cell of second, paired by run: accuracy, and the epoch λ
    settles at.
    """
    for (*_, window, init, method), trials in second.trials.groupby([*CELL, "method"]):
        same = np.isclose(first.trials["init_window"], window, rtol=0, atol=1e-3)  # ms or samples
        same &= (first.trials["method"] == method) & (first.in_samples == second.in_samples)
        gains = [paired(trials, first.trials[same], column) for column in ("accuracy", "settled")]
        yield (
            method,
            init,
            *(f"{gain:+z.1f}, n = {gain.n}" if gain.n else "none to compare" for gain in gains),
        )


def claims(results):
    """Claims of the paper: (claim, what was measured, in how many runs, verdict)."""
    gains = list(differences(results.trials))
    best = max((baseline for _, _, baseline, _ in gains), default=0)
    for _, init, baseline, values in gains:
        least, claim = 0, "more accurate than the baseline from a poor window"
        if baseline == best and len(gains) > 1:
            least = -ABOUT_THE_SAME
            claim = f"at most {ABOUT_THE_SAME} points less accurate than the baseline from the best window"
        yield f"{claim}, {init}", f"{values:+z.1f} points", values.n, verdict(values, least, np.inf)
    if "config/sigma_ref" in results.trials and results.in_samples:
        sigma = results.trials["config/sigma_ref"].iloc[0]
        for (*_, window, _), trials in halves(results.trials)[0].groupby(CELL):
            if not sigma / NEAR < window < sigma * NEAR:
                values = Interval(trials["window"])
                answer = verdict(values, sigma / NEAR, sigma * NEAR)
                yield (
                    f"comes near λ = {sigma:g} from {window:.1f}",
                    f"λ = {values:.1f}",
                    values.n,
                    answer,
                )
    if (cost := fixed_runs(results.trials)).n:
        yield (
            f"costs less than {A_FEW} fixed windows",
            f"as much as {cost:.1f}",
            cost.n,
            verdict(cost, -np.inf, A_FEW),
        )


def verdict(values, least, most):
    """A claim holds where the whole interval of the mean lies between least and most, and does not
    where none does.
    """
    if values.n < MIN_RUNS:
        return "not enough runs"
    if least < values.low and values.high < most:
        return "holds"
    return "does not hold" if values.high <= least or values.low >= most else "undecided"


if __name__ == "__main__":
    run(main)
