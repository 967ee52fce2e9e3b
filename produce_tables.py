"""Prints the tables of the paper, in LaTeX and in Markdown, and what they say about its claims.

    python produce_tables.py --csv=tables.csv --compare audio_mnist audio_mnist_continuous

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it.
Windows are l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are
mean ± standard deviation, with the 95 % interval of the mean from three runs on. Differences are
taken within runs, whose two trials share seed, data and batches. Trials that differ in another key
than the seed are never averaged.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from config import InputError, run
from datasets import DATASETS
from results import Storage
from summary import (
    EXPERIMENTS,
    Interval,
    cells,
    difference,
    identity,
    markdown_table,
    papers_experiment,
    papers_row,
    read,
    read_all,
    read_costs,
    read_paper,
    window_text,
)

MIN_RUNS = 5  # fewer do not decide a claim
ABOUT_THE_SAME = 2  # percentage points
NEAR = 1.5  # λ is near sigma_ref within this factor
HALF = 0.5  # of the cost of a search over ten windows
TWICE = 2  # as many iterations
RATE_COLUMNS = [
    "normalize_window",
    "pulses",
    "rate",
    "init",
    "n",
    "iterations_mean",
    "iterations_deviation",
]
SHOWN_RATES = (30.0, 0.1)  # of SGD: those that come near the paper's iterations


def main():
    parser = argparse.ArgumentParser(
        description="Print the tables of the paper from the CSV files of predict_test.py."
    )
    parser.add_argument(
        "--ray_results_dir", default="ray_results", help="folder or URI of results (ray_results)"
    )
    parser.add_argument("--csv", help="file to write the rows of all tables to")
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
    parser.add_argument(
        "--latex",
        choices=["table", "original"],
        default="table",
        help="a table that compiles, or the rows of the original software (table)",
    )
    args = parser.parse_args()

    storage = Storage(args.ray_results_dir)
    if args.csv and "://" in args.csv:
        raise InputError(f"--csv={args.csv}: name a file, not a URI.")
    if not storage.list():
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")
    named = [*args.experiment]
    for pair in args.compare:
        named += pair
    experiments = read_all(storage, named, others_too=not args.experiment)
    check_named(named, experiments)

    paper = read_paper()
    rows = []
    shown = [experiments[name] for name in args.experiment or experiments]
    for results in shown:
        print_notes(results)
        if len(results.trials):
            rows += print_tables(results, paper, args.latex)
    for first, second in args.compare:
        print_comparison(experiments[first], experiments[second])
    print_claims(shown, paper, read_costs(storage), read_rates(storage))

    if args.csv:
        content = pd.DataFrame(rows).to_csv(index=False)
        path = Path(args.csv)
        Storage(path.parent).write(path.name, content)


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
        print(
            f"% {len(ended_early)} of {n} trials ended after {epochs_text(ended_early)} epochs, "
            "before patience ran out"
        )
    n_longer = (trials["epochs"] > results.max_epochs).sum()
    if n_longer:
        print(
            f"% {n_longer} of {n} trials have more than the {results.max_epochs} epochs asked for"
        )
    if results.precisions:
        print(f"% computed in {' and '.join(results.precisions)}")
    print(versions_note(results), end="")


def is_cut(trials):
    """Which trials ended because their epochs were used up."""
    if "best_epoch" in trials and "config/patience" in trials:
        return trials["epochs"] - trials["best_epoch"] < trials["config/patience"]
    return trials["epochs"] >= trials["config/max_epochs"]


def epochs_text(trials):
    """How many epochs trials have, such as "10" or "10 or 20"."""
    return " or ".join(f"{epochs:.0f}" for epochs in sorted(trials["epochs"].unique()))


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


def print_tables(results, paper, latex):
    """Prints the tables of an experiment; returns them once more, a dict for each row."""
    rows = table_rows(results, paper)
    lines = latex_table(results, rows)
    if latex == "original":
        lines = original_rows(results, rows)
    print("\n".join(["", *lines, ""]))
    print(markdown_of(results, rows))
    print()

    gains = []
    for cell in cells(results.trials):
        gain = difference(cell.trained, cell.fixed, "accuracy")
        if gain.n:
            gains.append((cell.model, cell.init, f"{gain.mean:+z.1f}", gain.n, gain.bounds()))
    if gains:
        method = results.trained_method
        headings = ("Model", "init", f"{method} − baseline, points", "n", "95 % interval")
        print(f"{markdown_table(headings, gains)}\n")
    return rows


def table_rows(results, paper):
    """A dict for each half of each cell: what a row tells, the paper's numbers beside ours."""
    experiment = papers_experiment(results)
    rows = []
    for number, cell in enumerate(cells(results.trials)):
        gain = difference(cell.trained, cell.fixed, "accuracy")
        for method, trials in cell.halves():
            est = cell.init
            if method != "baseline":
                windows = trials["window"]
                est = window_text(results.in_samples, windows.min(), windows.max())
            accuracy = Interval(trials["accuracy"]).within(0, 100)
            row = {
                "experiment": results.name,
                "cell": number,
                "model": cell.model,
                "init": cell.init,
                "est": est,
                "method": method,
                **vars(accuracy),
                "significant": is_better(gain, method),
                "paper_est": "",
                "paper_mean": np.nan,
                "paper_deviation": np.nan,
            }
            reported = papers_row(paper, experiment, cell, method)
            if reported is not None:
                row["paper_mean"] = reported["accuracy_mean"]
                row["paper_deviation"] = reported["accuracy_deviation"]
                row["paper_est"] = cell.init
                if method != "baseline":
                    limits = (reported["est_low"], reported["est_high"])
                    row["paper_est"] = window_text(results.in_samples, *limits)
            rows.append(row)
    return rows


def is_better(gain, method):
    """Whether a half of a cell is the significantly better one: DMEL where its gain is positive.

    By a two-sided paired t-test over runs, p < 0.05, which is a 95 % interval without 0.
    """
    if gain.n < MIN_RUNS:
        return False
    if method == "baseline":
        return bool(gain.high < 0)
    return bool(gain.low > 0)


def accuracy_text(mean, deviation, plus_minus="±"):
    """Mean and standard deviation, as in the paper; empty for no mean."""
    if np.isnan(mean):
        return ""
    text = f"{mean:.1f}"
    if not np.isnan(deviation):
        text += f" {plus_minus} {deviation:.1f}"
    return text


def original_rows(results, rows):
    """The rows in LaTeX, in the format of the original software."""
    symbol = r"$\lambda_{%s}$" if results.in_samples else r"$l_{\lambda_{%s}}$"
    lines = [
        rf"Model & {symbol % 'init'} & {symbol % 'est'} & Method & Accuracy \\",
        r"\hline \hline",
    ]
    for number, row in enumerate(rows):
        accuracy = accuracy_text(row["mean"], row["deviation"], r"\pm")
        values = [escaped(row["model"]), row["init"], row["est"], row["method"]]
        lines.append(" & ".join([*values, rf"${accuracy}$ \\"]))
        if ends_cell(rows, number):
            lines.append(r"\hline")
    return lines


def latex_table(results, rows):
    """A LaTeX table that compiles by itself, the paper's numbers beside ours where it has them."""
    with_paper = any(row["paper_est"] for row in rows)
    symbol = r"$\lambda_{\mathrm{%s}}$" if results.in_samples else r"$l_{\lambda,\mathrm{%s}}$"
    headings = ["Model", symbol % "init", symbol % "est", "Method", "Accuracy, \\%", "$n$"]
    if with_paper:
        headings += [f"{symbol % 'est'}, paper", "Accuracy, \\%, paper"]

    name = escaped(results.name)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{name}: mean $\pm$ standard deviation over $n$ runs. Bold face: the better of "
        r"a pair, where a two-sided paired $t$-test over runs, five or more, gives $p < 0.05$.}",
        rf"\begin{{tabular}}{{{'l' * len(headings)}}}",
        r"\hline",
        " & ".join(headings) + r" \\",
        r"\hline",
    ]
    for number, row in enumerate(rows):
        accuracy = f"${accuracy_text(row['mean'], row['deviation'], chr(92) + 'pm')}$"
        if row["significant"]:
            accuracy = rf"{{\boldmath{accuracy}}}"
        values = [escaped(row["model"]), row["init"], row["est"], row["method"], accuracy]
        values.append(str(row["n"]))
        if with_paper:
            values.append(row["paper_est"])
            reported = accuracy_text(row["paper_mean"], row["paper_deviation"], r"\pm")
            values.append(f"${reported}$" if reported else "")
        lines.append(" & ".join(values) + r" \\")
        if ends_cell(rows, number):
            lines.append(r"\hline")
    return [*lines, r"\end{tabular}", r"\end{table}"]


def ends_cell(rows, number):
    """Whether a row is the last one of its cell."""
    return number + 1 == len(rows) or rows[number + 1]["cell"] != rows[number]["cell"]


def escaped(text):
    """Text for LaTeX."""
    return text.replace("_", r"\_").replace("%", r"\%")


def markdown_of(results, rows):
    """The rows as a Markdown table, with number of runs, interval, and the paper's numbers."""
    unit = "λ {}, samples" if results.in_samples else "window {}"
    headings = ["Model", unit.format("init"), unit.format("est"), "Method", "Accuracy, %", "n"]
    headings.append("95 % interval")
    with_paper = any(row["paper_est"] for row in rows)
    if with_paper:
        headings += ["paper: est", "paper: accuracy, %"]

    lines = []
    for row in rows:
        values = [row["model"], row["init"], row["est"], row["method"]]
        values += [accuracy_text(row["mean"], row["deviation"]), row["n"]]
        bounds = ""
        if not np.isnan(row["low"]):
            bounds = f"{row['low']:.1f} to {row['high']:.1f}"
        values.append(bounds)
        if with_paper:
            values.append(row["paper_est"])
            values.append(accuracy_text(row["paper_mean"], row["paper_deviation"]))
        lines.append(values)
    return markdown_table(headings, lines)


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
    if any(results.trials["config/model_name"].nunique() > 1 for results in (first, second)):
        varying.append("model_name")
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

# Where λ goes by the paper: limits of the mean window from every start, ms or samples.
GOES_TO = {
    "time_frequency": (6.38 / NEAR, 6.38 * NEAR),
    "audio_mnist": (200, 1000),  # several hundred ms
    "esc50": (25, 150),
}
POOR_WINDOWS = {"esc50": (10, 300), "audio_mnist": (10, 35), "time_frequency": (1.3, 31.9)}


def print_claims(experiments, paper, costs, rates):
    """Prints the table of the paper's five claims: what each rests on, and what we measured.

    costs: of read_costs. rates: of read_rates.
    """
    of_the_paper = {}
    for results in experiments:
        experiment = papers_experiment(results)
        if experiment is None:
            continue
        if results.name == experiment:
            of_the_paper[experiment] = results
        elif results.name == f"{experiment}_bfloat16" and results.precisions:
            of_the_paper.setdefault(experiment, results)  # where it was not trained in float32
    if not of_the_paper or paper.empty:
        return

    rows = []
    for experiment in EXPERIMENTS:
        results = of_the_paper.get(experiment)
        if results is None:
            rows.append(("1, 2, 3", experiment, "", "", "", "", "not run"))
            continue
        rows += accuracy_claims(experiment, results, paper)
        rows.append(window_claim(experiment, results, paper))
    rows += cost_claims(costs)
    rows += rate_claims(rates, paper)
    headings = ("claim", "experiment, start", "paper", "measured (95 % interval)", "n", "data")
    print(f"Claims of the paper:\n\n{markdown_table((*headings, 'verdict'), rows)}\n")
    print(CLAIMS)


CLAIMS = f"""\
1: from a poor initial window a trained one is more accurate than the baseline, points. 2: from a
suitable one it is at most {ABOUT_THE_SAME} points less accurate. 3: where λ goes, (min, max) of
the runs from each start. 4: a DMEL run costs half of a search over 10 fixed windows, or less,
nothing cached. 5: the short initial window converges twice as fast, or faster. A claim holds, or
does not hold, where the whole 95 % interval says so, from {MIN_RUNS} runs on.
"""


def accuracy_claims(experiment, results, paper):
    """Rows of claims 1 and 2, one for each initial window of the paper."""
    rows = []
    for cell in cells(results.trials):
        trained = papers_row(paper, experiment, cell, results.trained_method)
        fixed = papers_row(paper, experiment, cell, "baseline")
        gain = difference(cell.trained, cell.fixed, "accuracy")
        if trained is None or gain.n == 0:
            continue
        is_poor = any(abs(window - trained["init"]) < 1e-6 for window in POOR_WINDOWS[experiment])
        claim = "1" if is_poor else "2"
        least = 0 if is_poor else -ABOUT_THE_SAME
        reported = trained["accuracy_mean"] - fixed["accuracy_mean"]
        rows.append(
            (
                claim,
                f"{results.name}, {cell.init}",
                f"{reported:+z.1f}",
                gain.text("+z.1f"),
                gain.n,
                data_text(experiment, results),
                verdict(gain, least, np.inf),
            )
        )
    return rows


def window_claim(experiment, results, paper):
    """The row of claim 3: where λ goes from all starts."""
    least, most = GOES_TO[experiment]
    measured = []
    reported = []
    answers = []
    counts = []
    starts = paper[(paper["experiment"] == experiment) & (paper["method"] != "baseline")]
    for cell in cells(results.trials):
        row = papers_row(paper, experiment, cell, results.trained_method)
        if row is None or len(cell.trained) == 0:
            continue
        windows = cell.trained["window"]
        measured.append(window_text(results.in_samples, windows.min(), windows.max()))
        reported.append(window_text(results.in_samples, row["est_low"], row["est_high"]))
        answers.append(verdict(Interval(windows), least, most))
        counts.append(len(windows))

    answer = "undecided"
    if not answers:
        answer = "not run"
    elif "does not hold" in answers:
        answer = "does not hold"
    elif len(answers) < len(starts):
        answer = "not all starts"
    elif "not enough runs" in answers:
        answer = "not enough runs"
    elif set(answers) == {"holds"}:
        answer = "holds"
    unit = "samples" if results.in_samples else "ms"
    goal = f"{results.name}, all starts: {least:.4g} to {most:.4g} {unit}"
    data = data_text(experiment, results)
    texts = ("; ".join(reported), "; ".join(measured))
    return ("3", goal, *texts, min(counts, default=0), data, answer)


def data_text(experiment, results):
    """On what the results were trained, and how far and in what where that is not as usual."""
    texts = []
    n = results.n_recordings
    if experiment == "time_frequency":
        texts.append("pulses, drawn as by the original software")
    elif n is None:
        texts.append("not recorded")
    elif n == DATASETS[experiment].n_recordings:
        texts.append(f"{n} recordings, as many as in the paper")
    else:
        complete = DATASETS[experiment].n_recordings
        texts.append(f"not the paper's: {n} recordings, not {complete}")

    trials = results.trials
    if is_cut(trials).all():
        texts.append(f"{epochs_text(trials)} epochs")
    texts += results.precisions
    return "; ".join(texts)


def cost_claims(costs):
    """Rows of claim 4, one for each experiment that `python -m benchmarks cost` measured."""
    if not costs:
        return [("4", "", "about 0.5", "", "", "", "not run")]
    rows = []
    for row in costs:
        quotients = Interval(row["quotients"])
        measured = f"{quotients.mean:.2f} ({quotients.low:.2f} to {quotients.high:.2f})"
        answer = verdict(quotients, -np.inf, HALF)
        rows.append(("4", row["experiment"], "about 0.5", measured, quotients.n, "", answer))
    return rows


def rate_claims(rates, paper):
    """Rows of claim 5: the ratio of iterations, for each way to compute the error."""
    reported = paper[paper["experiment"] == "convergence_rate"].sort_values("init")
    first, last = reported["iterations_mean"]
    rows = []
    if rates.empty:
        return [("5", "", f"{last / first:.1f} times", "", "", "", "not run")]
    for (normalized, pulses, rate), pair in rates.groupby(["normalize_window", "pulses", "rate"]):
        short, long = pair.sort_values("init").to_dict("records")
        fewest, most = mean_interval(short)
        low = mean_interval(long)[0] / most
        high = mean_interval(long)[1] / fewest
        answer = "undecided"
        if low >= TWICE:
            answer = "holds"
        elif high < TWICE:
            answer = "does not hold"
        window = "normalized window" if normalized else "window as it is"
        ratio = long["iterations_mean"] / short["iterations_mean"]
        rows.append(
            (
                "5",
                f"{pulses} pulses, {window}, rate {rate:g}",
                f"{last / first:.1f} times",
                f"{ratio:.1f} times ({low:.1f} to {high:.1f})",
                short["n"],
                "pulses of convergence_rate.py",
                answer,
            )
        )
    return rows


def mean_interval(row):
    """The 95 % interval of the mean iterations in a row of the table."""
    half = stdtrit(row["n"] - 1, 0.975) * row["iterations_deviation"] / np.sqrt(row["n"])
    return row["iterations_mean"] - half, row["iterations_mean"] + half


def read_rates(storage):
    """The table that convergence_rate.py wrote, at the rates nearest to the paper's iterations."""
    name = "convergence_rate/iterations.csv"
    rates = read(storage, name, parse_rates, "convergence_rate.py")
    return pd.DataFrame() if rates is None else rates


def parse_rates(content):
    """See read_rates."""
    rates = pd.read_csv(io.BytesIO(content))
    return rates.loc[rates["rate"].isin(SHOWN_RATES), RATE_COLUMNS]


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
