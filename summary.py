"""Statistics of the results in RAY_RESULTS_DIR, for produce_tables.py and produce_figures.py."""

import io
import json
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from config import InputError
from dmel import WINDOW_SIGMAS
from results import EPOCHS, RECORD, TABLE
from storage import first_line

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
OPTIONAL = {f"config/{key}": POSITIVE for key in ("resample_rate", "max_epochs", "sigma_ref")} | {
    "config/seed": (0, 2**63)
}
EPOCH_COLUMNS = {"trial": (0, 1e9), "epoch": (1, 1e9), "lambd": NUMBER, "seconds": (0, 1e9)}
REMEDY = "make it again with predict_test.py"
SETTLED = 0.1  # λ has settled where it stays within this part of its last value
STILL_MOVING = 0.1  # and has not where it left that range as late as in this last part of the epochs


class Interval(NamedTuple):
    """Mean of n values, their standard deviation (n − 1), and the 95 % interval of the mean by Student's t."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float

    def bounds(self):
        """The interval as text, empty for one value."""
        return "" if self.n == 1 else f"{self.low:.1f} to {self.high:.1f}"


def interval(values):
    """The Interval of numbers; with one number its bounds are not a number."""
    values = np.asarray(values, dtype=float)
    n, mean = len(values), values.mean()
    if n < 2:
        return Interval(n, mean, np.nan, np.nan, np.nan)
    deviation = values.std(ddof=1)
    half = scipy.stats.t.ppf(0.975, n - 1) * deviation / n**0.5
    return Interval(n, mean, deviation, mean - half, mean + half)


def read_experiment(storage, name):
    """Trials of NAME.csv, or None without one, and the number of trials that were started; adds columns to the trials.

    cell: number of the initial window, equal ones to within 1e-6. accuracy: percent. seed: of the run. window: trained
    length as tables tell it, init_window: initial length, see in_samples.
    """
    started = n_started(storage, name)
    trials = read_table(storage, TABLE.format(name), COLUMNS, index_col=0)
    if trials is None:
        return None, started
    place = f"{storage.address}/{TABLE.format(name)}"
    if not trials["config/trainable"].isin([True, False]).all():
        raise InputError(f"{place}: a value in column config/trainable is not True or False: {REMEDY}.")
    told_apart = [column for column in trials if column.startswith("config/")] if "config/seed" in trials else []
    for columns in filter(None, (told_apart, ["trial_id"] if "trial_id" in trials else [])):
        if len(twice := np.flatnonzero(trials.duplicated(columns))):
            raise InputError(f"{place}: line {twice[0] + 2} holds a trial that stands above already: {REMEDY}.")
    init = trials["config/init_lambd"].sort_values()
    trials["cell"] = ((init - init.shift()) > 1e-6 * init).cumsum()
    trials["accuracy"] = 100 * trials["test_accuracy"]
    trials["seed"] = trials.get("config/seed", pd.Series(range(len(trials)), trials.index))
    unit = 1.0 if in_samples(trials) else milliseconds(1.0, trials["config/resample_rate"])
    trials["window"] = unit * trials["best_lambd_est"].abs()
    trials["init_window"] = unit * trials["config/init_lambd"]
    return trials.sort_values(["config/init_lambd", "seed"]), max(started, len(trials))


def n_started(storage, name):
    """Number of trials that an experiment was begun with, 0 where no plan is there."""
    try:
        record = storage.read(RECORD.format(name))
        return sum(batch["n_trials"] for batch in json.loads(record)["batches"]) if record else 0
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        place = f"{storage.address}/{RECORD.format(name)}"
        raise InputError(f"{place} cannot be read ({first_line(error)}): restore it.") from None


def read_table(storage, name, columns, **options):
    """A CSV file with at least these columns, None where there is no file; InputError where a number is none.

    columns: limits of the numbers of each, None where it holds something else. options: those of pandas.read_csv.
    """
    place = f"{storage.address}/{name}"
    try:
        content = storage.read(name)
        table = None if content is None else pd.read_csv(io.BytesIO(content), **options)
    except (OSError, ValueError) as error:  # of pandas too
        raise InputError(f"{place} cannot be read ({first_line(error)}): {REMEDY}.") from None
    if table is None:
        return None
    missing = [column for column in columns if column not in table]
    if missing or table.empty or not content.endswith(b"\n"):
        lacks = f"lacks the columns {', '.join(missing)}" if missing else "is cut off or has no line"
        raise InputError(f"{place} {lacks}: {REMEDY}.")
    optional = {
        column: limits for column, limits in OPTIONAL.items() if column in table and table[column].notna().any()
    }
    for column, limits in (columns | optional).items():
        numbers = pd.to_numeric(table[column], errors="coerce") if limits else table[column].notna()
        low, high = limits or (True, True)
        if len(wrong := np.flatnonzero(~numbers.between(low, high))):
            value, line = table[column].iloc[wrong[0]], wrong[0] + 2
            allowed = f" is no number from {low:g} to {high:g}" if limits else " is nothing"
            raise InputError(f"{place}: line {line}, column {column}: {value!r:.80}{allowed}: {REMEDY}.")
    return table


def experiment_names(storage):
    """The paper's experiments in its order, then all others that there are, those like the paper's first."""

    def paper_order(name):
        return next((i for i, experiment in enumerate(EXPERIMENTS) if experiment in name), len(EXPERIMENTS))

    others = {name for name in storage.list() if not MOVED_ASIDE.search(name)} - set(EXPERIMENTS)
    return [*EXPERIMENTS, *sorted(others, key=lambda name: (paper_order(name), name))]


def milliseconds(lambd, sample_rate):
    """Window length l = 6λ / sample_rate of a λ in samples, ms; sample_rate: Hz."""
    return 1000 * WINDOW_SIGMAS * lambd / sample_rate


def in_samples(trials):
    """Whether windows are told as λ in samples; where there is a sample rate it is l = 6λ / sample rate in ms."""
    return "config/resample_rate" not in trials or trials["config/resample_rate"].isna().all()


def cells(trials):
    """(model, cell), trials with DMEL, trials of the baseline, of every initial window in order."""
    for key, group in trials.groupby(["config/model_name", "cell"]):
        yield key, group[group["config/trainable"]], group[~group["config/trainable"]]


def paired(first, second, column):
    """Differences first − second of a column, one for each seed that both have."""
    means = [trials.groupby("seed")[column].mean() for trials in (first, second)]
    return (means[0] - means[1]).dropna()


def read_epochs(storage, name, trials):
    """Table with trial (index of NAME.csv), epoch, lambd and seconds, one row per epoch; None where there is none."""
    epochs = read_table(storage, EPOCHS.format(name), EPOCH_COLUMNS)
    if epochs is None:
        return None
    last = epochs.groupby("trial")["epoch"].agg(["min", "max", "size", "nunique"])
    is_whole = (last["min"] == 1) & (last["max"] == last["size"]) & (last["size"] == last["nunique"])
    if sorted(last.index) != sorted(trials.index) or not is_whole.all():
        place = f"{storage.address}/{EPOCHS.format(name)}"
        raise InputError(f"{place} does not hold every epoch of every trial of {TABLE.format(name)} once: {REMEDY}.")
    return epochs


def settling_epoch(lambds):
    """First epoch after which λ stays within SETTLED of its last value; None where it is still moving."""
    lambds = np.abs(np.asarray(lambds))
    outside = np.flatnonzero(np.abs(lambds / lambds[-1] - 1) > SETTLED)
    epoch = outside[-1] + 2 if len(outside) else 1
    return None if epoch > (1 - STILL_MOVING) * len(lambds) and epoch > 1 else int(epoch)


def add_epochs(trials, epochs):
    """The trials with columns epochs, seconds (median epoch × epochs) and settled (epoch or not a number)."""
    by_trial = epochs.groupby("trial")
    seconds = by_trial["seconds"].median() * by_trial.size()
    settled = by_trial["lambd"].apply(lambda lambds: settling_epoch(lambds) or np.nan)
    return trials.assign(epochs=by_trial.size(), seconds=seconds, settled=settled)


def was_cut(trials):
    """Which trials ended because of max_epochs and would have gone on; needs the columns of add_epochs."""
    return trials["epochs"] >= trials["config/max_epochs"]


def fixed_runs(trials):
    """How many fixed windows one DMEL run costs, of every run: mean seconds over the initial windows of each."""
    means = trials.groupby(["seed", "config/trainable"])["seconds"].mean().unstack()
    return (means[True] / means[False]).dropna() if {True, False} <= set(means) else pd.Series(dtype=float)
