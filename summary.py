"""Statistics of the results in RAY_RESULTS_DIR, for produce_tables.py and produce_figures.py."""

import json
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from config import InputError
from dmel import WINDOW_SIGMAS
from results import EPOCHS, RECORD, TABLE

EXPERIMENTS = ("esc50", "audio_mnist", "time_frequency")  # the paper's, in the order of its tables
MOVED_ASIDE = re.compile(r"\.\d{8}-\d{6}$")  # by main.py --restart
COLUMNS = ["config/init_lambd", "config/trainable", "config/model_name", "best_lambd_est", "test_accuracy"]
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
    place = f"{storage.address}/{TABLE.format(name)}"
    record = storage.read(RECORD.format(name))
    started = sum(batch["n_trials"] for batch in json.loads(record)["batches"]) if record else 0
    try:
        trials = storage.read_table(TABLE.format(name), index_col=0)
    except ValueError as error:
        raise InputError(f"{place} cannot be read ({error}): make it again with predict_test.py.") from None
    if trials is None:
        return None, started
    missing = [column for column in COLUMNS if column not in trials]
    if missing or trials.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "has no trial"
        raise InputError(f"{place} {what}: make it again with predict_test.py.")
    init = trials["config/init_lambd"].sort_values()
    trials["cell"] = ((init - init.shift()) > 1e-6 * init).cumsum()
    trials["accuracy"] = 100 * trials["test_accuracy"]
    trials["seed"] = trials.get("config/seed", pd.Series(range(len(trials)), trials.index))
    unit = 1.0 if in_samples(trials) else milliseconds(1.0, trials["config/resample_rate"])
    trials["window"] = unit * trials["best_lambd_est"].abs()
    trials["init_window"] = unit * trials["config/init_lambd"]
    return trials.sort_values(["config/init_lambd", "seed"]), max(started, len(trials))


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


def read_epochs(storage, name):
    """Table with trial (index of NAME.csv), epoch, lambd and seconds, one row per epoch; None where there is none."""
    return storage.read_table(EPOCHS.format(name))


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
