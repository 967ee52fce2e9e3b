"""Prints the tables of the paper, in LaTeX and in Markdown, and what they say about its claims.

    python produce_tables.py --ray_results_dir=ray_results --csv=tables.csv

Each initial window has two rows: DMEL (DSPEC without a mel scale) trains it, the baseline keeps it. Windows are
l = 6λ / sample rate, as (min, max) over the runs where they are trained; accuracies are mean ± standard deviation, with
the 95 % interval of the mean. Differences are taken within runs, whose two trials share seed, data and batches.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from config import InputError, run
from storage import Storage, write_whole
from summary import (
    EXPERIMENTS,
    add_epochs,
    cells,
    experiment_names,
    fixed_runs,
    in_samples,
    interval,
    paired,
    read_epochs,
    read_experiment,
    was_cut,
)

MODEL_TITLES = {"panns_cnn6": "CNN6", "mel_linear_net": "LNet", "linear_net": "LinearNet"}
VARIED = {"config/trainable", "config/init_lambd", "config/model_name", "config/seed"}  # by the tables themselves
MIN_RUNS = 5  # fewer do not decide a claim
ABOUT_THE_SAME = 2  # percentage points
NEAR = 1.5  # λ is near sigma_ref within this factor
A_FEW = 5  # fixed windows


def main():
    parser = argparse.ArgumentParser(description="Print the tables of the paper from the CSV files of predict_test.py.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--csv", type=Path, help="file to write the rows of all tables to")
    args = parser.parse_args()
    storage = Storage(args.ray_results_dir)
    if not storage.list():
        raise InputError(f"there are no results in '{storage.address}': train with main.py first.")

    experiments, rows = {}, []
    for name in experiment_names(storage):
        trials, started = read_experiment(storage, name)
        if trials is None:
            if name in EXPERIMENTS or started:
                print(f"% {name}: no results yet\n")
            continue
        epochs = read_epochs(storage, name, trials)
        experiments[name] = trials = trials if epochs is None else add_epochs(trials, epochs)
        unfinished = f", of {started}: the others failed or are not finished" if started > len(trials) else ""
        print(f"% {name}: {len(trials)} trials{unfinished}")
        for note in notes(trials):
            print(f"% {note}")
        table = table_rows(trials)
        print(f"\n{latex(table, in_samples(trials))}\n\n{markdown(table, in_samples(trials))}\n")
        rows += [{"experiment": name, **row, **row["accuracy"]._asdict()} for row in table]
        if differences := list(difference_rows(trials)):
            print(f"{markdown_table(differences)}\n")
    for name, trials in experiments.items():
        changed = [others for other, others in experiments.items() if other.startswith(f"{name}_continuous")]
        if changed and (differences := list(continuous_rows(trials, pd.concat(changed)))):
            print(f"{name}_continuous − {name} (95 % interval):\n\n{markdown_table(differences)}\n")
    if verdicts := [claim for name, trials in experiments.items() for claim in claims(name, trials)]:
        print(f"Claims of the paper:\n\n{markdown_table(verdicts)}\n")
    if args.csv:
        write_whole(args.csv, pd.DataFrame(rows).drop(columns="accuracy", errors="ignore").to_csv(index=False))


def notes(trials):
    """One line for trials that max_epochs ended, and for each further key of the config that is averaged over."""
    if "epochs" in trials and (n_cut := was_cut(trials).sum()):
        limits = " or ".join(map(str, sorted(trials["config/max_epochs"].unique())))
        yield f"{n_cut} of {len(trials)} trials ended at max_epochs = {limits}, before patience ran out"
    for column in trials.filter(like="config/").columns:
        varied = trials.groupby(["config/model_name", "cell", "config/trainable"])[column].nunique() > 1
        if column not in VARIED and varied.any():
            yield f"averaged over {column.removeprefix('config/')}: {sorted(trials[column].unique().tolist())}"


# Tables


def table_rows(trials):
    """Dicts with cell, model, init and est (windows as text), method, and accuracy, an Interval in percent."""
    rows, samples = [], in_samples(trials)
    for key, *halves in cells(trials):
        for name, runs in zip(("DSPEC" if samples else "DMEL", "baseline"), halves, strict=True):
            if runs.empty:
                continue
            low, high = number(runs["window"].min(), samples), number(runs["window"].max(), samples)
            init = window(runs["init_window"].iloc[0], samples)
            unit = "" if samples else " ms"
            rows.append(
                {
                    "cell": key[1],
                    "model": MODEL_TITLES.get(key[0], key[0]),
                    "init": init,
                    "est": init if name == "baseline" else f"({low}, {high}){unit}",
                    "method": name,
                    "accuracy": interval(runs["accuracy"]),
                }
            )
    return rows


def window(value, samples):
    """A window with its unit: λ in samples, or a length in milliseconds."""
    return number(value, samples) + ("" if samples else " ms")


def number(value, samples):
    """One decimal for samples, cut to whole numbers for milliseconds (35 ms may be 34.99999 in a file)."""
    return f"{value:.1f}" if samples else f"{int(value + 1e-6)}"


def latex(rows, samples):
    plus_minus = r"\pm"
    symbol = r"\lambda_{%s}" if samples else r"l_{\lambda_{%s}}"
    lines = [rf"Model & ${symbol % 'init'}$ & ${symbol % 'est'}$ & Method & Accuracy \\", r"\hline \hline"]
    for i, row in enumerate(rows):
        accuracy = f"${mean_and_deviation(row['accuracy'], plus_minus)}$"
        lines.append(rf"{row['model']} & {row['init']} & {row['est']} & {row['method']} & {accuracy} \\")
        if i + 1 == len(rows) or (rows[i + 1]["cell"], rows[i + 1]["model"]) != (row["cell"], row["model"]):
            lines.append(r"\hline")
    return "\n".join(lines)


def markdown(rows, samples):
    symbol = "λ {}, samples" if samples else "window {}"
    return markdown_table(
        {
            "Model": row["model"],
            symbol.format("init"): row["init"],
            symbol.format("est"): row["est"],
            "Method": row["method"],
            "Accuracy, %": mean_and_deviation(row["accuracy"]),
            "n": row["accuracy"].n,
            "95 % interval": row["accuracy"].bounds(),
        }
        for row in rows
    )


def mean_and_deviation(values, sign="±"):
    return f"{values.mean:.1f}" + ("" if values.n == 1 else f" {sign} {values.deviation:.1f}")


def markdown_table(rows):
    """A Markdown table of dicts with the same keys."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def difference_rows(trials):
    """DMEL − baseline in accuracy for each initial window, paired by run."""
    for (model, _), dmel, baseline in cells(trials):
        differences = paired(dmel, baseline, "accuracy")
        if len(differences):
            values = interval(differences)
            yield {
                "Model": MODEL_TITLES.get(model, model),
                "init": window(dmel["init_window"].iloc[0], in_samples(trials)),
                "DMEL − baseline, points": f"{values.mean:+z.1f}",
                "n": values.n,
                "95 % interval": values.bounds(),
            }


def continuous_rows(default, continuous):
    """continuous − default for each method and initial window, paired by run: accuracy, and the epoch λ settles at.

    default and continuous are trials as of read_experiment; initial windows match to 0.001 ms or samples.
    """
    keys = ["config/trainable", "init_window"]
    defaults = dict(list(default.round({"init_window": 3}).groupby(keys)))
    for (trainable, init), changed in continuous.round({"init_window": 3}).groupby(keys, sort=False):
        row = {"Method": "DMEL" if trainable else "baseline", "init": window(init, in_samples(default))}
        for column, title in (("accuracy", "accuracy, points"), ("settled", "λ settles, epochs")):
            differences = ()
            if (trainable, init) in defaults and column in changed and (trainable or column == "accuracy"):
                differences = paired(changed, defaults[trainable, init], column)
            values = interval(differences) if len(differences) else None
            row[title] = f"{told(values, '+z.1f')}, n = {values.n}" if values else "none to compare"
        yield row


# Claims


def claims(name, trials):
    """Each claim of the paper that an experiment can test: the number that tests it, and whether it holds."""
    pairs = [(dmel, baseline) for _, dmel, baseline in cells(trials) if len(paired(dmel, baseline, "accuracy"))]
    best = max((baseline["accuracy"].mean() for _, baseline in pairs), default=0)
    for dmel, baseline in pairs:
        init = window(dmel["init_window"].iloc[0], in_samples(trials))
        if baseline["accuracy"].mean() == best and len(pairs) > 1:
            least = -ABOUT_THE_SAME
            claim = f"at most {ABOUT_THE_SAME} points less accurate than the baseline from the best window, {init}"
        else:
            least, claim = 0, f"more accurate than the baseline from a poor window, {init}"
        values = interval(paired(dmel, baseline, "accuracy"))
        yield verdict(name, claim, f"{told(values, '+z.1f')} points", values, least=least)
    if "config/sigma_ref" in trials and in_samples(trials):
        sigma = trials["config/sigma_ref"].iloc[0]
        for _, dmel, _ in cells(trials):
            if len(dmel) and not sigma / NEAR < (init := dmel["init_window"].iloc[0]) < sigma * NEAR:
                values, claim = interval(dmel["window"]), f"comes near λ = {sigma:g} from {init:.1f}"
                yield verdict(name, claim, f"λ = {told(values)}", values, sigma / NEAR, sigma * NEAR)
    if "seconds" in trials and len(ratios := fixed_runs(trials)):
        values, claim = interval(ratios), f"costs less than {A_FEW} fixed windows"
        yield verdict(name, claim, f"as much as {told(values)}", values, most=A_FEW)


def verdict(name, claim, measured, values, least=-np.inf, most=np.inf):
    """A claim holds where the whole interval of the mean lies between least and most, and does not where none does."""
    if values.n < MIN_RUNS:
        answer = "not enough runs"
    elif least < values.low and values.high < most:
        answer = "holds"
    elif values.high <= least or values.low >= most:
        answer = "does not hold"
    else:
        answer = "not enough runs"
    return {"experiment": name, "DMEL": claim, "measured (95 % interval)": measured, "n": values.n, "verdict": answer}


def told(values, form=".1f"):
    return f"{values.mean:{form}}" + (f" ({values.bounds()})" if values.n > 1 else "")


if __name__ == "__main__":
    run(main)
