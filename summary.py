"""Results of experiments and their statistics, for produce_tables.py and produce_figures.py. Starts without torch.

An experiment's trials fall into cells, one for each model and initial window; a cell has a trained half, whose trials
train the window (DMEL), and a fixed half, whose trials keep it (the baseline).
"""

import io
import json
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from config import InputError
from results import EPOCHS, RECORD, TABLE
from storage import first_line

WINDOW_SIGMAS = 6  # that of dmel.py, which needs torch
MODEL_TITLES = {"panns_cnn6": "CNN6", "mel_linear_net": "LNet", "linear_net": "LinearNet"}
EXPERIMENTS = ("esc50", "audio_mnist", "time_frequency")  # the paper's, in the order of its tables
MOVED_ASIDE = re.compile(r"\.\d{8}-\d{6}$")  # by main.py --restart
FRACTION, POSITIVE, NUMBER = (0, 1), (1e-9, 1e9), (-1e9, 1e9)
COLUMNS = {  # of NAME.csv: limits of its numbers, None where it holds something else
    "config/init_lambd": POSITIVE,
    "config/trainable": None,
    "config/model_name": None,
    "best_lambd_est": NUMBER,
    "test_accuracy": FRACTION,
}
OPTIONAL = {f"config/{key}": POSITIVE for key in ("resample_rate", "max_epochs", "sigma_ref")}
OPTIONAL["config/seed"] = (0, 2**63)
EPOCH_COLUMNS = {"trial": (0, 1e9), "epoch": (1, 1e9), "lambd": NUMBER, "seconds": (0, 1e9)}
REMEDY = "make it again with predict_test.py"
SETTLED = 0.1  # λ has settled where it stays within this part of its last value
STILL_MOVING = 0.1  # and has not where it left that range as late as in this last part of the epochs


class Interval(NamedTuple):
    """Mean of n values, their standard deviation (n − 1), and the 95 % interval of the mean by Student's t."""

    n: int
    mean: float = np.nan
    deviation: float = np.nan
    low: float = np.nan
    high: float = np.nan

    def __format__(self, form):
        """The mean in a number's format, and the interval in brackets."""
        return f"{self.mean:{form}}" + (f" ({self.bounds()})" if self.n > 1 else "")

    def bounds(self):
        """The interval as text, empty for one value."""
        return "" if self.n == 1 else f"{self.low:.1f} to {self.high:.1f}"


def interval(values):
    """The Interval of numbers; what one number or none cannot tell is not a number."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return Interval(n, *values)
    mean, deviation = values.mean(), values.std(ddof=1)
    half = stdtrit(n - 1, 0.975) * deviation / n**0.5
    return Interval(n, mean, deviation, mean - half, mean + half)


def paired(first, second, column):
    """Interval of the differences first − second of a column of trials, one for each seed that both have."""
    first, second = (trials.groupby("seed")[column].mean() for trials in (first, second))
    return interval((first - second).dropna())


def fixed_runs(trials):
    """Interval of how many fixed windows a DMEL run costs, by seed: mean seconds over the initial windows of each."""
    means = trials.groupby(["seed", "config/trainable"])["seconds"].mean().unstack()
    return interval((means[True] / means[False]).dropna() if {True, False} <= set(means) else [])


def settling_epoch(lambds):
    """First epoch after which λ stays within SETTLED of its last value; not a number where it is still moving."""
    lambds = np.abs(np.asarray(lambds))
    outside = np.flatnonzero(np.abs(lambds / lambds[-1] - 1) > SETTLED)
    epoch = outside[-1] + 2 if len(outside) else 1
    return np.nan if epoch > (1 - STILL_MOVING) * len(lambds) and epoch > 1 else int(epoch)


def markdown_table(rows, text=str):
    """A Markdown table of dicts with the same keys; text: value -> text of a cell."""
    rows = list(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Cell(NamedTuple):
    """The trials of one model and initial window: the half that trains it, and the half that keeps it."""

    number: int  # of the window, from the shortest
    model: str  # as tables call it
    init_window: float
    trained: pd.DataFrame
    fixed: pd.DataFrame


class Results(NamedTuple):
    """What an experiment has brought; trials and epochs have no rows where there are none.

    trials: columns of NAME.csv, by initial window and seed, and cell, number of the initial window, equal ones to
    within 1e-6; init_window and window, the initial and the trained one, in ms or samples, see unit; accuracy, percent;
    seed, of the run; epochs, their number; seconds, median epoch × epochs; settled, the epoch at which λ has (all three
    not a number without epochs); cut, whether max_epochs ended the trial. epochs: see read_epochs.
    """

    name: str
    n_started: int  # trials, 0 where no plan is there
    trials: pd.DataFrame
    epochs: pd.DataFrame

    @property
    def in_samples(self):
        """Whether there is no sample rate to tell windows as 6λ in ms, so that they are told as λ in samples."""
        return "config/resample_rate" not in self.trials or self.trials["config/resample_rate"].isna().all()

    @property
    def unit(self):
        """The window that a λ of one sample is told as."""
        return 1.0 if self.in_samples else 1000 * WINDOW_SIGMAS / self.trials["config/resample_rate"].iloc[0]

    def cells(self):
        """Every Cell, by model and window."""
        for (model, number), trials in self.trials.groupby(["config/model_name", "cell"]):
            is_trained, init_window = trials["config/trainable"], trials["init_window"].iloc[0]
            yield Cell(number, MODEL_TITLES.get(model, model), init_window, trials[is_trained], trials[~is_trained])

    def differences(self):
        """(cell, Interval of DMEL − baseline in accuracy, points, paired by seed) of each Cell with both halves."""
        pairs = ((cell, paired(cell.trained, cell.fixed, "accuracy")) for cell in self.cells())
        return [(cell, values) for cell, values in pairs if values.n]


def read_all(storage):
    """Results by name: the paper's experiments in its order, then all others that there are, those like them first."""
    others = {name for name in storage.list() if not MOVED_ASIDE.search(name)} - set(EXPERIMENTS)
    likeness = {name: [experiment not in name for experiment in EXPERIMENTS] for name in others}
    names = [*EXPERIMENTS, *sorted(others, key=lambda name: (likeness[name], name))]
    return {name: read_results(storage, name) for name in names}


def read_results(storage, name):
    """The Results of one experiment; raises InputError where a file of it is not as it was written."""
    n_started = read_n_started(storage, name)
    trials = read_table(storage, TABLE.format(name), COLUMNS, index_col=0)
    if trials is None:
        return Results(name, n_started, pd.DataFrame(), pd.DataFrame())
    place = f"{storage.address}/{TABLE.format(name)}"
    if not trials["config/trainable"].isin([True, False]).all():
        raise InputError(f"{place}: a value in column config/trainable is not True or False: {REMEDY}.")
    again = trials.index.duplicated()
    if "trial_id" in trials:
        again |= trials.duplicated("trial_id")
    if "config/seed" in trials:
        again |= trials.duplicated([column for column in trials if column.startswith("config/")])
    if again.any():
        raise InputError(f"{place}: line {np.argmax(again) + 2} holds a trial that stands above already: {REMEDY}.")

    epochs = read_epochs(storage, name, trials)
    by_trial = epochs.groupby("trial")
    results = Results(name, max(n_started, len(trials)), trials, epochs)
    init = trials["config/init_lambd"].sort_values()
    trials = trials.astype({"config/trainable": bool}).assign(
        cell=(init.diff() > 1e-6 * init).cumsum(),
        init_window=results.unit * init,
        window=results.unit * trials["best_lambd_est"].abs(),
        accuracy=100 * trials["test_accuracy"],
        seed=trials.get("config/seed", range(len(trials))),
        epochs=by_trial.size(),
        seconds=by_trial["seconds"].median() * by_trial.size(),
        settled=by_trial["lambd"].agg(settling_epoch),
    )
    trials["cut"] = trials["epochs"] >= trials.get("config/max_epochs", np.inf)
    return results._replace(trials=trials.sort_values(["config/init_lambd", "seed"]))


def read_n_started(storage, name):
    """Number of trials that an experiment was begun with, 0 where no plan is there."""
    try:
        record = storage.read(RECORD.format(name))
        return sum(batch["n_trials"] for batch in json.loads(record)["batches"]) if record else 0
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        place = f"{storage.address}/{RECORD.format(name)}"
        raise InputError(f"{place} cannot be read ({first_line(error)}): restore it.") from None


def read_epochs(storage, name, trials):
    """Table with trial (index of NAME.csv), epoch, lambd and seconds, one row per epoch, without rows if not there."""
    epochs = read_table(storage, EPOCHS.format(name), EPOCH_COLUMNS)
    if epochs is None:
        return pd.DataFrame(columns=list(EPOCH_COLUMNS), dtype=float)
    last = epochs.groupby("trial")["epoch"].agg(["min", "max", "size", "nunique"])
    is_whole = (last["min"] == 1) & (last["max"] == last["size"]) & (last["size"] == last["nunique"])
    if sorted(last.index) != sorted(trials.index) or not is_whole.all():
        place = f"{storage.address}/{EPOCHS.format(name)}"
        raise InputError(f"{place} does not hold every epoch of every trial of {TABLE.format(name)} once: {REMEDY}.")
    return epochs


def read_table(storage, name, columns, **options):
    """A CSV file with at least these columns, None where there is no file; InputError where a number is none.

    columns: limits of the numbers of each, None where it holds something else. options: those of pandas.read_csv.
    """
    place = f"{storage.address}/{name}"
    try:
        if (content := storage.read(name)) is None:
            return None
        table = pd.read_csv(io.BytesIO(content), **options)
    except (OSError, ValueError) as error:  # of pandas too
        raise InputError(f"{place} cannot be read ({first_line(error)}): {REMEDY}.") from None
    missing = [column for column in columns if column not in table]
    if missing or table.empty or not content.endswith(b"\n"):
        lacks = f"lacks the columns {', '.join(missing)}" if missing else "is cut off or has no line"
        raise InputError(f"{place} {lacks}: {REMEDY}.")
    optional = [column for column in OPTIONAL if column in table and table[column].notna().any()]
    for column, limits in (columns | {column: OPTIONAL[column] for column in optional}).items():
        numbers = pd.to_numeric(table[column], errors="coerce") if limits else table[column].notna()
        low, high = limits or (True, True)
        if len(wrong := np.flatnonzero(~numbers.between(low, high))):
            value, line = table[column].iloc[wrong[0]], wrong[0] + 2
            allowed = f" is no number from {low:g} to {high:g}" if limits else " is nothing"
            raise InputError(f"{place}: line {line}, column {column}: {value!r:.80}{allowed}: {REMEDY}.")
    return table
