"""Results of experiments and their statistics, for produce_tables.py and produce_figures.py.

It starts without torch. An experiment's trials fall into cells: those of a cell differ in their
seed, and in whether the window is trained (DMEL) or kept (the baseline).
"""

import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from pydantic_core import PydanticUndefined
from scipy.special import stdtrit

from config import NO_IDENTITY, Config, InputError, first_line
from datasets import default_split
from results import EPOCHS, MOVED_ASIDE, PREDICTIONS, RECORD, VERSION_1, table_of

WINDOW_SIGMAS = 6  # that of dmel.py, which needs torch
MODEL_TITLES = {"panns_cnn6": "CNN6", "mel_linear_net": "LNet", "linear_net": "LinearNet"}
EXPERIMENTS = ("esc50", "audio_mnist", "time_frequency")  # the paper's, in the order of its tables
PAPER = Path(__file__).with_name("results") / "paper.csv"
PRECISIONS = {"tf32": "TF32", "bf16": "bfloat16"}  # in words, where they are not float32
# What makes an experiment the paper's: its data, layer and network. How it is trained may differ
# (optimizer, learning rates, batches, epochs), as it does in the paper and its software. So may
# tf32 and bf16, which the tables name.
PAPERS_KEYS = {
    "esc50": {
        "model_name": "panns_cnn6",
        "resample_rate": 8000,
        "n_points": 40000,
        "hop_length": 80,
        "n_mels": 64,
        "energy_normalize": True,
        "optimized": True,
    },
    "audio_mnist": {
        "model_name": "mel_linear_net",
        "resample_rate": 8000,
        "n_points": 8000,
        "hop_length": 80,
        "n_mels": 64,
        "energy_normalize": True,
        "optimized": True,
    },
    "time_frequency": {
        "model_name": "linear_net",
        "n_samples": 5000,
        "n_points": 128,
        "sigma_ref": 6.38,
        "noise_std": 0.5,
        "hop_length": 1,
        "optimized": False,
    },
}
# What none of the three has on.
OFF_IN_THE_PAPER = (
    "normalize_window",
    "continuous",
    "zero_floor",
    "augment",
    "pretrained",
    "center_offset",
)
LEAST_FOR_INTERVAL = 3  # runs: with two, Student's t is wider than the scale of what is measured
SEARCHED_WINDOWS = 10  # fixed ones, that a DMEL run is compared with in cost
SAME = 1e-6  # relative difference within which numbers of configs are one

LARGEST = 3.5e38  # float32 ends there, and so does a λ that ran away

# Columns of NAME.csv that must be there, and the limits of their numbers.
COLUMNS = {
    "config/init_lambd": (1e-9, 1e9),
    "config/max_epochs": (1, 1e9),
    "config/seed": (0, 2**63),
    "best_lambd_est": (-LARGEST, LARGEST),
    "test_accuracy": (0, 1),
}
SOMETIMES = {  # of recordings, and of pulses
    "config/resample_rate": (1, 1e9),
    "config/sigma_ref": (1e-9, 1e9),
}
PREDICTION_COLUMNS = ["trial_id", "recording", "label", "predicted", "probability"]
EPOCH_COLUMNS = {
    "trial": (0, 1e9),
    "epoch": (1, 1e9),
    "lambd": (-LARGEST, LARGEST),
    "seconds": (0, 1e9),
}


class Interval:
    """Mean of n values, standard deviation (n − 1), 95 % interval of the mean by Student's t.

    What too few values do not tell is NaN.
    """

    def __init__(self, values):
        values = pd.Series(values, dtype=float)
        self.n = len(values)
        self.mean = values.mean()
        self.deviation = values.std()
        self.low = np.nan
        self.high = np.nan
        if self.n >= LEAST_FOR_INTERVAL:
            half = stdtrit(self.n - 1, 0.975) * self.deviation / np.sqrt(self.n)
            self.low = self.mean - half
            self.high = self.mean + half

    def within(self, least, most):
        """The same, with an interval that keeps to what is possible, such as 0 to 100 %."""
        self.low = np.clip(self.low, least, most)
        self.high = np.clip(self.high, least, most)
        return self

    def bounds(self):
        """The interval as text, empty for too few values."""
        if np.isnan(self.low):
            return ""
        return f"{self.low:.1f} to {self.high:.1f}"

    def text(self, number=".1f"):
        """The mean in a number's format, and the interval in brackets where there is one."""
        text = f"{self.mean:{number}}"
        if self.bounds():
            text += f" ({self.bounds()})"
        return text


class Results(NamedTuple):
    """What an experiment has brought."""

    name: str
    n_trials: int = 0  # that belong to it, 0 where it was never begun
    n_untested: int = 0  # of them, finished and not tested as they are now
    max_epochs: int | None = None  # that were asked for last
    trials: pd.DataFrame = pd.DataFrame(columns=["epochs"])  # of parse_trials; none without them
    in_samples: bool = True  # windows are given as λ, for want of a sample rate for 6λ in ms
    varying: tuple[str, ...] = ()  # keys, beside init_lambd and model_name, that tell cells apart
    n_recordings: int | None = None  # trained on, where that is known

    @property
    def precisions(self):
        """In what all networks computed, as ["bfloat16"]; nothing where that was float32.

        Where it varies, the titles of the cells say so.
        """
        found = []
        for key, precision in PRECISIONS.items():
            column = f"config/{key}"
            if column in self.trials and self.trials[column].eq(True).all():
                found.append(precision)
        return found

    @property
    def trained_method(self):
        """What the paper calls a trained window: DSPEC without a mel scale."""
        return "DSPEC" if self.in_samples else "DMEL"


class Cell(NamedTuple):
    """Trials that differ in nothing but their seed, and in whether the window is trained."""

    model: str  # its title, and what varies beside the initial window, such as "LNet, hidden=32"
    init: str  # the initial window as text
    init_window: float  # in ms, or samples
    trained: pd.DataFrame  # DMEL
    fixed: pd.DataFrame  # the baseline

    def halves(self):
        """(method, trials) of the halves that there are, DMEL first."""
        found = []
        for trials in (self.trained, self.fixed):
            if len(trials):
                found.append((trials["method"].iloc[0], trials))
        return found


def cells(trials):
    """The Cells of a table of trials, by model and initial window."""
    found = []
    for _, cell in trials.groupby("cell"):
        first = cell.iloc[0]
        is_trained = cell["config/trainable"]
        found.append(
            Cell(
                model=first["model"],
                init=first["init"],
                init_window=first["init_window"],
                trained=cell[is_trained],
                fixed=cell[~is_trained],
            )
        )
    return found


# The paper


def read_paper():
    """Tables 2 to 5 of the paper, one row per cell: the columns of results/paper.csv.

    Without that file, as where the scripts were copied alone, there are no rows.
    """
    if not PAPER.exists():
        return pd.DataFrame(columns=["experiment", "init", "method"])
    return pd.read_csv(PAPER)


def papers_experiment(results):
    """The experiment of the paper that Results are of, None where they are of none.

    They are where data, layer and network are its own. The name makes no difference.
    """
    trials = results.trials
    if results.varying or len(trials) == 0 or "config/dataset_name" not in trials:
        return None
    if trials["config/model_name"].nunique() > 1:
        return None
    first = trials.iloc[0]
    experiment = first["config/dataset_name"]
    if experiment not in PAPERS_KEYS:
        return None

    wanted = PAPERS_KEYS[experiment] | dict.fromkeys(OFF_IN_THE_PAPER, False)
    wanted["split"] = default_split(experiment)
    for key, value in wanted.items():
        own = first.get(f"config/{key}")
        if pd.isna(own):
            continue
        is_same = own == value
        if isinstance(value, float):
            is_same = np.isclose(own, value)
        if not is_same:
            return None
    return experiment


def papers_row(paper, experiment, cell, method):
    """The paper's row of a cell's half, None where it has none of that initial window."""
    rows = paper[(paper["experiment"] == experiment) & (paper["method"] == method)]
    for _, row in rows.iterrows():
        # The paper gives λ with one decimal, as 1.3 for 1.276.
        tolerance = 0.05 if row["unit"] == "samples" else 0.5
        if abs(row["init"] - cell.init_window) < tolerance:
            return row
    return None


# Statistics


def difference(first, second, column):
    """Interval of first − second in a column of trials, one value for each seed that both have."""
    first = first.groupby("config/seed")[column].mean()
    second = second.groupby("config/seed")[column].mean()
    return Interval((first - second).dropna())


# Text


def window_text(in_samples, *windows):
    """A window, or several in brackets: λ in samples with a decimal, or ms cut to whole ones."""
    texts = []
    for window in windows:
        if in_samples:
            texts.append(f"{window:.1f}")
        else:
            texts.append(f"{int(window + 1e-6)}")  # 35 ms may be 34.999999
    text = texts[0]
    if len(texts) > 1:
        text = f"({', '.join(texts)})"
    return text if in_samples else f"{text} ms"


def markdown_table(headings, rows):
    """A Markdown table; rows: of as many values as there are headings."""
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        lines.append([str(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Reading


def read_all(storage, names=(), others_too=True):
    """Results by name: the paper's experiments first, then others, all that were begun.

    Those that main.py --restart moved aside are left out, unless they are among the names. Raises
    InputError where one is damaged; with others_too=False only those that are named matter.
    """
    others = []
    for name in storage.list():
        moved = re.search(MOVED_ASIDE, name) and name not in names
        if name not in EXPERIMENTS and not moved:
            others.append(name)

    found = {}
    for name in (*EXPERIMENTS, *others):
        try:
            results = read_results(storage, name)
        except InputError:
            if others_too or name in names:
                raise
            continue
        if results.n_trials:
            found[name] = results
    return found


def read_results(storage, name):
    """The Results of one experiment; raises InputError where a file of it is damaged."""
    record = read(storage, RECORD.format(name), parse_record, f"main.py --name={name} --restart")
    trials = read(storage, table_of(name), parse_trials)
    n_trials = record["n_trials"] if record else 0
    if trials is None:
        n_untested = len(record["finished"]) if record else 0
        return Results(name, n_trials, n_untested)

    n_epochs = read(
        storage, EPOCHS.format(name), lambda content: parse_epochs(content, name, trials)
    )
    if n_epochs is None:
        trials = trials.assign(epochs=np.nan, seconds=np.nan)
    else:
        trials = trials.join(n_epochs)

    max_epochs = int(trials["config/max_epochs"].max())
    n_untested = 0
    if record:
        trials = trials[is_up_to_date(trials, record)]
        n_untested = len(record["finished"].keys() - set(trials.get("trial_id", ())))
        max_epochs = record["max_epochs"] or max_epochs
    if trials.empty:
        return Results(name, n_trials, n_untested, max_epochs)

    varying, trials = with_cells(trials)
    n_recordings = record["n_recordings"] if record else None
    if "recordings" in trials:
        n_recordings = int(trials["recordings"].max())
    return Results(
        name=name,
        n_trials=max(n_trials, len(trials)),
        n_untested=n_untested,
        max_epochs=max_epochs,
        trials=trials,
        in_samples="config/resample_rate" not in trials,
        varying=varying,
        n_recordings=n_recordings,
    )


def read(storage, name, parse, maker="predict_test.py"):
    """What parse makes of a file's content, None where there is no file.

    Raises InputError where it can make nothing of it, which names what makes the file.
    """
    try:
        content = storage.read(name)
        if content is None:
            return None
        return parse(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = first_line(error)
        if isinstance(error, KeyError):
            problem = f"there is no {error}"
        raise InputError(
            f"{storage.address}/{name} cannot be used ({problem}): restore it, or make it again "
            f"with {maker}."
        ) from None


def parse_record(content):
    """What experiment.json says: n_trials, max_epochs, n_recordings, trials and finished.

    trials: configs by key, None where all rows of NAME.csv belong, as in what --keep copies and in
    files of version 1. finished: last epochs by key.
    """
    record = json.loads(content)
    found = {"n_trials": 0, "max_epochs": None, "trials": None, "finished": {}}
    found["n_recordings"] = None
    if VERSION_1 in record:
        found["n_trials"] = sum(batch["n_trials"] for batch in record["batches"])
        if record.get("data"):
            found["n_recordings"] = record["data"]["clips"]
    elif "trials" in record:
        found["trials"] = record["trials"]
        found["finished"] = record["finished"]
        found["n_trials"] = len(record["trials"])
        found["max_epochs"] = max(
            (config["max_epochs"] for config in record["trials"].values()), default=None
        )
    else:
        found["n_trials"] = record["n_trials"]
        found["max_epochs"] = record["max_epochs"]
    return found


def is_up_to_date(trials, record):
    """For each row of NAME.csv, whether its trial belongs and is still the one that was tested."""
    if record["trials"] is None:
        return pd.Series(True, index=trials.index)

    up_to_date = []
    for _, row in trials.iterrows():
        config = record["trials"].get(row["trial_id"])
        tested = config is not None and is_finished(row, config)
        now = record["finished"].get(row["trial_id"])
        if tested and now is not None:
            tested = row["training_iteration"] == now["training_iteration"] and bool(
                np.isclose(row["valid_loss"], now["valid_loss"], rtol=1e-12, atol=0)
            )
        up_to_date.append(tested)
    return pd.Series(up_to_date, index=trials.index)


def is_finished(row, config):
    """Config.is_finished for a config of experiment.json, which need not be valid any more."""
    waited = row["training_iteration"] - row["best_epoch"]
    return row["training_iteration"] >= config["max_epochs"] or waited >= config["patience"]


def parse_trials(content):
    """The trials in NAME.csv by initial window and seed, and what follows from each row.

    Their columns: those of the file, method, unit (the window of λ = 1, in ms or samples), window
    (the trained one) and accuracy (percent).
    """
    # Hexadecimal digits may all be decimal ones, and are no number.
    dtype = {"config/trainable": bool, "trial_id": str, "scripts": str, "predictions": str}
    trials = parse_table(content, COLUMNS, SOMETIMES, index_col=0, dtype=dtype)
    wrong = trials[["config/model_name", "config/trainable"]].isna().any(axis=1)
    wrong |= trials.index.duplicated()
    apart = [
        column
        for column in trials.filter(like="config/")
        if column.removeprefix("config/") not in NO_IDENTITY
    ]
    wrong |= trials.duplicated(apart)
    if wrong.any():
        raise ValueError(
            f"line {wrong.argmax() + 2} lacks its model, or holds a trial that stands above already"
        )

    trials = trials.sort_values(["config/init_lambd", "config/seed"])
    unit = 1.0
    trained_method = "DSPEC"
    if "config/resample_rate" in trials:
        unit = 1000 * WINDOW_SIGMAS / trials["config/resample_rate"]
        trained_method = "DMEL"
    return trials.assign(
        method=np.where(trials["config/trainable"], trained_method, "baseline"),
        unit=unit,
        window=unit * trials["best_lambd_est"].abs(),
        accuracy=100 * trials["test_accuracy"],
    )


def parse_epochs(content, name, trials):
    """What epochs.csv tells of each trial: epochs, seconds, and lambds, λ after each epoch.

    It has every epoch of each of them once.
    """
    table = parse_table(content, EPOCH_COLUMNS).sort_values(["trial", "epoch"])
    by_trial = table.groupby("trial")
    is_counted = by_trial.cumcount() + 1 == table["epoch"]
    if set(table["trial"]) != set(trials.index) or not is_counted.all():
        raise ValueError(f"it does not hold every epoch of every trial of {table_of(name)} once")

    n_epochs = by_trial.size()
    return pd.DataFrame(
        {
            "epochs": n_epochs,
            "seconds": by_trial["seconds"].median() * n_epochs,
            "lambds": by_trial["lambd"].agg(list),
        }
    )


def read_predictions(storage, name):
    """What predictions.csv says of each trial, by its key; nothing where there is no file.

    That is a row for each clip: recording, label, predicted and probability, as text.
    """
    return read(storage, PREDICTIONS.format(name), parse_predictions) or {}


def parse_predictions(content):
    """See read_predictions."""
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    if list(table.columns) != PREDICTION_COLUMNS or not content.endswith(b"\n"):
        raise ValueError(f"it is cut off, or has other columns than {PREDICTION_COLUMNS}")

    predictions = {}
    for key, rows in table.groupby("trial_id", sort=False):
        predictions[key] = rows[PREDICTION_COLUMNS[1:]].to_numpy().tolist()
    return predictions


def parse_table(content, columns, sometimes=None, **options):
    """The table in a CSV file with at least these columns, but no empty ones.

    sometimes: columns that may be absent. options: those of pandas.read_csv.
    """
    table = pd.read_csv(io.BytesIO(content), **options).dropna(axis="columns", how="all")
    if not content.endswith(b"\n"):
        raise ValueError("it is cut off")

    limits = dict(columns)
    for column, limit in (sometimes or {}).items():
        if column in table:
            limits[column] = limit
    for column, (low, high) in limits.items():
        is_right = pd.to_numeric(table[column], errors="coerce").between(low, high)
        if not is_right.all():
            line = is_right.argmin() + 2
            value = table[column][~is_right].iloc[0]
            raise ValueError(
                f"line {line}, column {column}: {value!r:.80} is no number from {low:g} to {high:g}"
            )
    return table


def read_costs(storage):
    """Rows of `python -m benchmarks cost --output=cost.json`, none where that is not there.

    Each has experiment, quotient and quotients, the repetitions behind it.
    """
    name = "cost.json"
    maker = f"python -m benchmarks cost --output={storage.address}/{name}"
    return read(storage, name, parse_costs, maker) or []


def parse_costs(content):
    """See read_costs; a report of other sections has none."""
    sections = json.loads(content)["sections"]
    rows = []
    if "cost" in sections:
        for row in sections["cost"]["rows"]:
            rows.append({key: row[key] for key in ("experiment", "quotient", "quotients")})
    return rows


# Cells


def with_cells(trials):
    """The varying keys (see Results), and the trials with the columns of their cells.

    These are cell (its number, by model, what varies, and initial window), model (its title),
    init_window (in ms or samples) and init (that as text).
    """
    keys = identity(trials)
    varying = []
    for key in keys.columns.drop(["model_name", "init_lambd"]):
        if keys[key].nunique(dropna=False) > 1:
            varying.append(key)

    order = pd.DataFrame(index=trials.index)
    for key in ("model_name", *varying, "init_lambd"):
        order[key] = rank(keys[key])
    titles = keys["model_name"].replace(MODEL_TITLES)
    for key in varying:
        titles = titles + f", {key}=" + keys[key].map(value_text)

    in_samples = "config/resample_rate" not in trials
    windows = trials["unit"] * keys["init_lambd"].astype(float)
    trials = trials.assign(
        cell=order.groupby(list(order.columns)).ngroup(),
        model=titles,
        init_window=windows,
        init=[window_text(in_samples, window) for window in windows],
    )
    return tuple(varying), trials


def identity(trials):
    """The keys of a config that tell trials apart beside seed and trainable, as columns.

    What a row leaves empty is at its default, and numbers within 1e-6 are one.
    """
    columns = {}
    for key, field in Config.model_fields.items():
        column = f"config/{key}"
        if key in NO_IDENTITY or key in ("seed", "trainable") or column not in trials:
            continue
        values = trials[column]
        if field.default is not PydanticUndefined and field.default is not None:
            values = values.where(values.notna(), field.default)
        if key == "split" and "config/dataset_name" in trials:
            values = values.fillna(trials["config/dataset_name"].map(default_split))
        if is_numeric_dtype(values) and not is_bool_dtype(values):
            values = merged(values)
        columns[key] = values
    return pd.DataFrame(columns, index=trials.index)


def merged(values):
    """Numbers, where those that differ by no more than 1e-6 of themselves are the first of them."""
    ordered = values.dropna().sort_values()
    group = (ordered.diff() > SAME * ordered.abs()).cumsum()
    return ordered.groupby(group).transform("first").reindex(values.index)


def rank(values):
    """Whole numbers in the order of values, of numbers or of text; what is empty comes first."""
    if not is_numeric_dtype(values):
        values = values.astype(str)
    return values.rank(method="dense", na_option="top")


def value_text(value):
    """A value of a config as it stands behind a model's title."""
    if pd.isna(value):
        return "None"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
