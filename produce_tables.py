"""Prints the tables of the paper, in LaTeX and in Markdown, and what they say about its claims.

    python produce_tables.py --csv=tables.csv --compare audio_mnist audio_mnist_continuous

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it.
Windows are l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are
mean ± standard deviation, with the 95 % interval of the mean from three runs on. Differences are
taken within runs, whose two trials share seed, data and batches. Trials that differ in another key
than the seed are never averaged.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from config import InputError, run
from results import Storage
from summary import (
    EXPERIMENTS,
    Interval,
    cells,
    difference,
    fixed_runs,
    identity,
    markdown_table,
    read_all,
    window_text,
)

MIN_RUNS = 5  # fewer do not decide a claim
ABOUT_THE_SAME = 2  # percentage points
NEAR = 1.5  # λ is near sigma_ref within this factor
A_FEW = 5  # fixed windows


def main():
    parser = argparse.ArgumentParser(
        description="Print the tables of the paper from the CSV files of predict_test.py."
    )
    parser.add_argument(
        "--ray_results_dir", default="ray_results", help="folder or URI of results (ray_results)"
    )
    parser.add_argument("--csv", type=Path, help="file to write the rows of all tables to")
    parser.add_argument(
        "--experiment", nargs="+", metavar="NAME", default=[], help="which ones (all)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        action="append",
        default=[],
        help="print B − A of two experiments too; may be given several times",
    )
    args = parser.parse_args()

    storage = Storage(args.ray_results_dir)
    if not storage.list():
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")
    named = [*args.experiment]
    for pair in args.compare:
        named += pair
    experiments = read_all(storage, named)
    check_named(named, experiments)

    rows = []
    for name in args.experiment or experiments:
        results = experiments[name]
        print_notes(results)
        if len(results.trials):
            rows += print_tables(results)
    for first, second in args.compare:
        print_comparison(experiments[first], experiments[second])
    print_claims([experiments[name] for name in args.experiment or experiments])

    if args.csv:
        content = pd.DataFrame(rows).to_csv(index=False)
        Storage(args.csv.parent).write(args.csv.name, content)


def check_named(named, experiments):
    """Raises InputError where an experiment that was asked for has no results."""
    tested = [name for name, results in experiments.items() if len(results.trials)]
    for name in named:
        if name not in tested:
            raise InputError(
                f"there are no results of '{name}', but of {', '.join(tested) or 'none'}."
            )


# Notes above a table


def print_notes(results):
    """Prints how many trials there are, and what else a reader of the table should know."""
    n = len(results.trials)
    missing = results.n_trials - n - results.n_untested
    note = f"% {results.name}: {n} trials"
    if missing > 0:
        note += f", of {results.n_trials}: {missing} failed or are not finished"
    print(note)
    if results.n_untested:
        print(f"% {results.n_untested} trials are not tested: run predict_test.py")
    if n == 0:
        print()
        return

    trials = results.trials
    ended_early = trials[is_cut(trials)]
    if len(ended_early):
        limits = " or ".join(f"{epochs:.0f}" for epochs in sorted(ended_early["epochs"].unique()))
        print(
            f"% {len(ended_early)} of {n} trials ended after {limits} epochs, "
            "before patience ran out"
        )
    n_longer = (trials["epochs"] > results.max_epochs).sum()
    if n_longer:
        print(
            f"% {n_longer} of {n} trials have more than the {results.max_epochs} epochs asked for"
        )
    print(versions_note(results), end="")


def is_cut(trials):
    """Which trials ended because their epochs were used up."""
    if "best_epoch" in trials and "config/patience" in trials:
        return trials["epochs"] - trials["best_epoch"] < trials["config/patience"]
    return trials["epochs"] >= trials["config/max_epochs"]


def versions_note(*several):
    """A line on the versions of the scripts that trained Results, nothing where it was one."""
    versions = set()
    for results in several:
        versions.update(map(str, results.trials.get("scripts", ["unknown"])))
    if len(versions) < 2 and "+" not in "".join(versions):
        return ""
    names = ", ".join(sorted(versions))
    return f"% trained by several versions of the scripts: {names}\n"


# Tables


def print_tables(results):
    """Prints the tables of an experiment; returns them once more, a dict for each row."""
    rows = table_rows(results)
    print("\n".join(["", *latex_lines(results, rows), ""]))
    print(markdown_of(results, rows))
    print()

    gains = []
    for cell in cells(results.trials):
        gain = difference(cell.trained, cell.fixed, "accuracy")
        if gain.n:
            gains.append((cell.model, cell.init, f"{gain.mean:+z.1f}", gain.n, gain.bounds()))
    if gains:
        headings = (
            "Model",
            "init",
            f"{results.trained_method} − baseline, points",
            "n",
            "95 % interval",
        )
        print(f"{markdown_table(headings, gains)}\n")
    return rows


def table_rows(results):
    """A dict for each half of each cell: what a row of the tables tells."""
    rows = []
    for number, cell in enumerate(cells(results.trials)):
        for method, trials in cell.halves():
            est = cell.init
            if method != "baseline":
                windows = trials["window"]
                est = window_text(results.in_samples, windows.min(), windows.max())
            accuracy = Interval(trials["accuracy"]).within(0, 100)
            rows.append(
                {
                    "experiment": results.name,
                    "cell": number,
                    "model": cell.model,
                    "init": cell.init,
                    "est": est,
                    "method": method,
                    **vars(accuracy),
                }
            )
    return rows


def accuracy_text(row, plus_minus="±"):
    """Mean and standard deviation, as in the paper."""
    text = f"{row['mean']:.1f}"
    if row["n"] > 1:
        text += f" {plus_minus} {row['deviation']:.1f}"
    return text


def latex_lines(results, rows):
    """The rows in LaTeX, in the format of the original software."""
    symbol = r"$\lambda_{%s}$" if results.in_samples else r"$l_{\lambda_{%s}}$"
    lines = [
        rf"Model & {symbol % 'init'} & {symbol % 'est'} & Method & Accuracy \\",
        r"\hline \hline",
    ]
    for number, row in enumerate(rows):
        accuracy = accuracy_text(row, r"\pm")
        values = [row["model"].replace("_", r"\_"), row["init"], row["est"], row["method"]]
        lines.append(" & ".join([*values, rf"${accuracy}$ \\"]))
        is_last = number + 1 == len(rows)
        if is_last or rows[number + 1]["cell"] != row["cell"]:
            lines.append(r"\hline")
    return lines


def markdown_of(results, rows):
    """The rows as a Markdown table, with the number of runs and the interval of the mean."""
    unit = "λ {}, samples" if results.in_samples else "window {}"
    headings = ("Model", unit.format("init"), unit.format("est"), "Method", "Accuracy, %", "n")
    lines = []
    for row in rows:
        bounds = ""
        if not np.isnan(row["low"]):
            bounds = f"{row['low']:.1f} to {row['high']:.1f}"
        values = (row["model"], row["init"], row["est"], row["method"])
        lines.append((*values, accuracy_text(row), row["n"], bounds))
    return markdown_table((*headings, "95 % interval"), lines)


# Comparison of two experiments


def print_comparison(first, second):
    """Prints second − first, for each half of each cell of second, paired by run."""
    print(f"{second.name} − {first.name} (95 % interval):")
    print(versions_note(first, second))
    headings = (
        "Model",
        "Method",
        "init",
        "accuracy, points",
        "n",
        f"est, {first.name}",
        f"est, {second.name}",
    )
    print(f"{markdown_table(headings, comparison(first, second))}\n")


def comparison(first, second):
    """Rows of the table of second − first.

    Trials are paired that share method, initial window, seed, and every key that varies within one
    of the two experiments.
    """
    keys = identity(pd.concat([first.trials, second.trials], keys=["first", "second"]))
    varying = sorted({*first.varying, *second.varying})
    rows = []
    for cell in cells(second.trials):
        for method, trials in cell.halves():
            matching = (first.trials["method"] == method) & (first.in_samples == second.in_samples)
            matching &= np.isclose(
                first.trials["init_window"], cell.init_window, rtol=0, atol=1e-3
            )  # ms or samples
            for key in varying:
                if key in keys:
                    own = keys.loc["second", key].loc[trials.index[0]]
                    theirs = keys.loc["first", key]
                    matching &= (theirs == own) | (theirs.isna() & pd.isna(own))

            others = first.trials[matching]
            gain = difference(trials, others, "accuracy")
            if gain.n == 0:
                rows.append((cell.model, method, cell.init, "none to compare", 0, "", ""))
                continue
            windows = []
            for half in (others, trials):
                if method == "baseline":
                    windows.append(cell.init)
                else:
                    window = half["window"]
                    windows.append(window_text(second.in_samples, window.min(), window.max()))
            rows.append((cell.model, method, cell.init, gain.text("+z.1f"), gain.n, *windows))
    return rows


# Claims of the paper


def print_claims(experiments):
    """Prints what the paper's experiments say about its claims, where nothing else varies."""
    rows = []
    for results in experiments:
        if results.name in EXPERIMENTS and len(results.trials) and not results.varying:
            for claim in claims(results):
                rows.append((results.name, *claim))
    if rows:
        headings = ("experiment", "DMEL", "measured (95 % interval)", "n", "verdict")
        print(f"Claims of the paper:\n\n{markdown_table(headings, rows)}\n")


def claims(results):
    """Claims of the paper: (claim, what was measured, in how many runs, verdict)."""
    both = [cell for cell in cells(results.trials) if len(cell.trained) and len(cell.fixed)]
    best = max((cell.fixed["accuracy"].mean() for cell in both), default=0)
    for cell in both:
        gain = difference(cell.trained, cell.fixed, "accuracy")
        if gain.n == 0:
            continue
        least = 0
        claim = "more accurate than the baseline from a poor window"
        if cell.fixed["accuracy"].mean() == best and len(both) > 1:
            least = -ABOUT_THE_SAME
            claim = (
                f"at most {ABOUT_THE_SAME} points less accurate than the baseline from the best "
                "window"
            )
        measured = f"{gain.text('+z.1f')} points"
        yield f"{claim}, {cell.init}", measured, gain.n, verdict(gain, least, np.inf)

    if "config/sigma_ref" in results.trials and results.in_samples:
        sigma = results.trials["config/sigma_ref"].iloc[0]
        for cell in cells(results.trials):
            if len(cell.trained) and not sigma / NEAR < cell.init_window < sigma * NEAR:
                values = Interval(cell.trained["window"])
                answer = verdict(values, sigma / NEAR, sigma * NEAR)
                claim = f"comes near λ = {sigma:g} from {cell.init_window:.1f}"
                yield claim, f"λ = {values.text()}", values.n, answer

    cost = fixed_runs(results.trials)
    if cost.n:
        claim = f"costs less than {A_FEW} fixed windows"
        yield claim, f"as much as {cost.text()}", cost.n, verdict(cost, -np.inf, A_FEW)


def verdict(values, least, most):
    """What an Interval says of a claim that the mean lies between least and most.

    It holds where the whole interval lies there, and does not hold where none of it does.
    """
    if values.n < MIN_RUNS:
        return "not enough runs"
    if least < values.low and values.high < most:
        return "holds"
    if values.high <= least or values.low >= most:
        return "does not hold"
    return "undecided"


if __name__ == "__main__":
    run(main)
