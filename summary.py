"""Results of experiments and their statistics, for produce_tables.py and produce_figures.py. Starts
without torch.

An experiment's trials fall into cells, one for each model and initial window, and each of these
into two halves.
"""

import io
import json
import operator
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from config import InputError, first_line
from results import EPOCHS, RECORD, TABLE

WINDOW_SIGMAS = 6  # that of dmel.py, which needs torch
MODEL_TITLES = {"panns_cnn6": "CNN6", "mel_linear_net": "LNet", "linear_net": "LinearNet"}
EXPERIMENTS = ("esc50", "audio_mnist", "time_frequency")  # the paper's, in the order of its tables
COLUMNS = {  # of NAME.csv, and the limits of their numbers
    "config/init_lambd": (1e-9, 1e9),
    "config/max_epochs": (1, 1e9),
    "config/seed": (0, 2**63),
    "config/resample_rate": (1, 1e9),  # of recordings
    "config/sigma_ref": (1e-9, 1e9),  # of pulses
    "best_lambd_est": (-1e9, 1e9),
    "test_accuracy": (0, 1),
}
EPOCH_COLUMNS = {"trial": (0, 1e9), "epoch": (1, 1e9), "lambd": (-1e9, 1e9), "seconds": (0, 1e9)}
CELL = ["config/model_name", "model", "cell", "init_window", "init"]  # what its trials share


class Interval:
    """Mean of n values, standard deviation (n − 1), 95 % interval of the mean by Student's t; NaN
    for too few.
    """

    def __init__(self, values):
        values = pd.Series(values, dtype=float)
        self.n, self.mean, self.deviation = len(values), values.mean(), values.std()
        half = stdtrit(self.n - 1, 0.975) * self.deviation / np.sqrt(self.n)
        self.low, self.high = self.mean - half, self.mean + half

    def __format__(self, form):
        """The mean in a number's format, and the interval in brackets."""
        return f"{self.mean:{form}}" + (f" ({self.bounds()})" if self.n > 1 else "")

    def bounds(self):
        """The interval as text, empty for one value."""
        return f"{self.low:.1f} to {self.high:.1f}" if self.n > 1 else ""


def halves(trials):
    """The trials that train the window (DMEL), and those that keep it (the baseline)."""
    return trials[trials["config/trainable"]], trials[~trials["config/trainable"]]


def paired(first, second, column, relation=operator.sub):
    """Interval of first − second, or another relation, in a column of trials, one for each seed
    that both have.
    """
    first, second = (trials.groupby("config/seed")[column].mean() for trials in (first, second))
    return Interval(relation(first, second).dropna())


def differences(trials):
    """(model, window, accuracy of the baseline, Interval of DMEL − it, paired by seed) of cells
    with both halves.
    """
    for (_, model, _, _, init), cell in trials.groupby(CELL):
        trained, fixed = halves(cell)
        if (values := paired(trained, fixed, "accuracy")).n:
            yield model, init, fixed["accuracy"].mean(), values


def fixed_runs(trials):
    """Interval of how many fixed windows a DMEL run costs, by seed: mean seconds over the initial
    windows of each.
    """
    return paired(*halves(trials), "seconds", operator.truediv)


def settling_epoch(lambds):
    """First epoch from which λ stays within 10 % of its last value; NaN where that is in the last
    10 % of them.
    """
    lambds = np.abs(np.asarray(lambds))
    outside = np.flatnonzero(np.abs(lambds / lambds[-1] - 1) > 0.1)
    epoch = outside[-1] + 2 if len(outside) else 1
    return np.nan if epoch > 0.9 * len(lambds) and epoch > 1 else int(epoch)


def window_text(in_samples, *windows):
    """A window, or several in brackets: λ in samples with a decimal, or ms cut to whole ones (35
    may be 34.999999).
    """
    texts = [f"{window:.1f}" if in_samples else f"{int(window + 1e-6)}" for window in windows]
    return (texts[0] if len(texts) == 1 else f"({', '.join(texts)})") + (
        "" if in_samples else " ms"
    )


def markdown_table(headings, rows, text=str):
    """A Markdown table; rows: of as many values as there are headings; text: value -> text of a
    cell.
    """
    lines = [headings, ["---"] * len(headings), *([text(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Results(NamedTuple):
    """What an experiment has brought."""

    name: str
    n_started: int  # trials, 0 where no plan is there
    trials: pd.DataFrame = pd.DataFrame(
        columns=["epochs"]
    )  # see parse_trials and parse_epochs; no rows without them
    in_samples: bool = (
        True  # windows are told as λ, for want of a sample rate to tell them as 6λ in ms
    )


def read_all(storage):
    """Results by name: the paper's, then others that were begun, but none that main.py --restart
    moved aside.
    """
    others = [
        name
        for name in storage.list()
        if name not in EXPERIMENTS and not re.search(r"\.\d{8}-\d{6}$", name)
    ]
    experiments = {name: read_results(storage, name) for name in (*EXPERIMENTS, *others)}
    return {
        name: results
        for name, results in experiments.items()
        if name in EXPERIMENTS or results.n_started
    }


def read_results(storage, name):
    """The Results of one experiment; raises InputError where a file of it is not as it was written."""
    n_started = read(
        storage,
        RECORD.format(name),
        lambda c: sum(b["n_trials"] for b in json.loads(c)["batches"]),
        0,
    )
    if (trials := read(storage, TABLE.format(name), parse_trials)) is None:
        return Results(name, n_started)
    without = trials.assign(epochs=np.nan, seconds=np.nan, settled=np.nan)
    trials = read(
        storage, EPOCHS.format(name), lambda content: parse_epochs(content, name, trials), without
    )
    return Results(name, max(n_started, len(trials)), trials, "config/resample_rate" not in trials)


def read(storage, name, parse, absent=None):
    """What parse makes of a file's content, absent where there is no file; InputError where it can
    make nothing.
    """
    try:
        content = storage.read(name)
        return absent if content is None else parse(content)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else first_line(error)
        remedy = "restore it, or make it again with predict_test.py"
        raise InputError(f"{storage.address}/{name} cannot be used ({told}): {remedy}.") from None


def parse_trials(content):
    """The table in NAME.csv by initial window and seed, and what follows from it; all windows in ms
    or samples.
    """
    trials = parse_table(content, COLUMNS, index_col=0, dtype={"config/trainable": bool})
    wrong = trials.index.duplicated() | trials.duplicated(list(trials.filter(like="config/")))
    wrong |= trials[["config/model_name", "config/trainable"]].isna().any(axis=1)
    if wrong.any():
        raise ValueError(
            f"line {wrong.argmax() + 2} lacks its model, or holds a trial that stands above already"
        )
    trials = trials.sort_values(["config/init_lambd", "config/seed"])
    in_samples = "config/resample_rate" not in trials
    unit = 1.0 if in_samples else 1000 * WINDOW_SIGMAS / trials["config/resample_rate"].iloc[0]
    lambds = trials["config/init_lambd"]
    cell = (lambds.diff() > 1e-6 * lambds).cumsum()
    windows = unit * lambds.groupby(cell).transform("first")
    return trials.assign(
        model=trials["config/model_name"].replace(MODEL_TITLES),
        method=np.where(trials["config/trainable"], "DSPEC" if in_samples else "DMEL", "baseline"),
        unit=unit,  # the window of λ = 1
        cell=cell,  # number of the initial window, equal ones to within 1e-6
        init_window=windows,
        init=[window_text(in_samples, window) for window in windows],
        window=unit * trials["best_lambd_est"].abs(),
        accuracy=100 * trials["test_accuracy"],  # percent
    )


def parse_epochs(content, name, trials):
    """The trials, and what epochs.csv tells of them; it has every epoch of each of them once."""
    table = parse_table(content, EPOCH_COLUMNS).sort_values(["trial", "epoch"])
    by_trial = table.groupby("trial")
    if {*table["trial"]} != {*trials.index} or (by_trial.cumcount() + 1 != table["epoch"]).any():
        raise ValueError(f"it does not hold every epoch of every trial of {name}.csv once")
    return trials.assign(
        epochs=by_trial.size(),
        seconds=by_trial["seconds"].median() * by_trial.size(),
        settled=by_trial["lambd"].agg(settling_epoch).where(trials["config/trainable"]),
        lambds=by_trial["lambd"].agg(list),
    )


def parse_table(content, columns, **options):
    """The table in a CSV file with at least these columns, but no empty ones; options: those of
    pandas.read_csv.
    """
    table = pd.read_csv(io.BytesIO(content), **options).dropna(axis="columns", how="all")
    if not content.endswith(b"\n"):
        raise ValueError("it is cut off")
    for column, (low, high) in columns.items():
        if column in table or column not in ("config/resample_rate", "config/sigma_ref"):
            is_right = pd.to_numeric(table[column], errors="coerce").between(low, high)
            if not is_right.all():
                line, value = is_right.argmin() + 2, table[column][~is_right].iloc[0]
                raise ValueError(
                    f"line {line}, column {column}: {value!r:.80} is no number from {low:g} to {high:g}"
                )
    return table
