"""Statistics of results made up so that the answers are known, and of damaged ones."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import dmel
import predict_test
import search_spaces
import summary
from config import InputError
from results import Plan
from storage import Storage

BASELINE = {10.0: 0.60, 35.0: 0.70, 300.0: 0.65}  # test accuracy by initial window, ms
TRAINED = {10.0: 0.68, 35.0: 0.70, 300.0: 0.64}


def write_experiment(folder, name="audio_mnist", n_runs=5, started=None, spread=0.001, max_epochs=1000):
    """Trials of 100 epochs: λ walks to that of 120 ms within 40; DMEL takes three times as long as the baseline.

    Accuracies grow by 0.01 from run to run, those of DMEL by spread more.
    """
    trials, epochs = [], []
    for trainable, accuracies in ((True, TRAINED), (False, BASELINE)):
        for window, accuracy in accuracies.items():
            for seed in range(n_runs):
                lambds = np.full(100, 8 * window / 6)
                if trainable:
                    lambds[:40] = np.linspace(8 * window / 6, 160, 40)
                    lambds[40:] = -160  # its sign means nothing
                config = {"init_lambd": 8 * window / 6, "trainable": trainable, "seed": seed, "resample_rate": 8000}
                config |= {"model_name": "mel_linear_net", "dataset_name": "audio_mnist", "n_points": 8000}
                config |= {"max_epochs": max_epochs}
                result = {
                    "best_lambd_est": lambds[-1],
                    "best_valid_acc": accuracy,
                    "test_accuracy": accuracy + 0.01 * seed + spread * trainable * seed,
                }
                trials.append(result | {f"config/{key}": value for key, value in config.items()})
                seconds = [1.0, *[0.3 if trainable else 0.1] * 99]  # the first one starts up
                for epoch, (lambd, second) in enumerate(zip(lambds, seconds, strict=True), start=1):
                    epochs.append({"trial": len(trials) - 1, "epoch": epoch, "lambd": lambd, "seconds": second})
    (folder / name).mkdir(parents=True)
    pd.DataFrame(trials).to_csv(folder / name / f"{name}.csv")
    pd.DataFrame(epochs).to_csv(folder / name / "epochs.csv", index=False)
    record = {"batches": [{"n_trials": started or len(trials)}]}
    (folder / name / "experiment.json").write_text(json.dumps(record))


def test_interval_is_student_s():
    values = [1.0, 2.0, 4.0, 5.5]
    expected = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = summary.interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.mean, found.deviation) == pytest.approx((4, 3.125, np.std(values, ddof=1)))
    assert summary.interval([3.0]).mean == 3.0 and np.isnan(summary.interval([3.0]).low)


@pytest.mark.parametrize(
    ("lambds", "epoch"),
    [
        ([100, 50, 10, 10, 10, 10, 10, 10, 10, 10], 3),
        ([10, 9.5, 10.5, 10, 10, 10, 10, 10, 10, 10], 1),
        ([100, 10, 20, 10, 10, 10, 10, 10, 10, 10.5], 4),
        ([-20, 10, -10, 10, 10, 10, 10, 10, 10, 10], 2),
        ([100, 90, 80, 70, 60, 50, 40, 30, 20, 10], np.nan),
        ([5.0], 1),
    ],
)
def test_epoch_at_which_lambda_settles(lambds, epoch):
    assert summary.settling_epoch(lambds) == pytest.approx(epoch, nan_ok=True)


def test_seconds_are_free_of_the_start_and_paired_by_run(tmp_path):
    write_experiment(tmp_path)
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    trials = results.trials
    assert results.n_started == 30 and set(trials["epochs"]) == {100} and not trials["cut"].any()
    assert summary.fixed_runs(trials)[:2] == pytest.approx((5, 3.0))
    assert trials.loc[trials["config/trainable"], "settled"].between(30, 40).all()


def test_cells_have_a_trained_and_a_fixed_half(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    cells = list(results.cells())
    assert [cell.init_window for cell in cells] == pytest.approx([10, 35, 300])
    for cell in cells:
        assert cell.trained["config/trainable"].tolist() == [True] * 2 and cell.trained["seed"].tolist() == [0, 1]
        assert cell.trained["window"].tolist() == pytest.approx([120] * 2)
        assert cell.fixed["window"].tolist() == pytest.approx([cell.init_window] * 2)
    assert [values.mean for _, values in results.differences()] == pytest.approx([8.05, 0.05, -0.95])


def test_without_epochs_only_what_they_tell_is_missing(tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "audio_mnist" / "epochs.csv").unlink()
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    assert results.epochs.empty and results.trials[["epochs", "seconds", "settled"]].isna().all(axis=None)
    assert len(results.differences()) == 3 and summary.fixed_runs(results.trials).n == 0
    assert summary.read_results(Storage(tmp_path), "esc50").trials.empty


def test_what_is_kept_of_a_plan_names_no_folder():
    command = "python main.py --name=a --data_dir '/home/me/my data' --ray_root_dir=/home/me/results --seed=3"
    plan = Plan(search_space={"seed": 3}, batches=[{"command": command, "n_trials": 2}], trials={"a": {}})
    assert predict_test.reduced(plan) == {
        "search_space": {"seed": 3},
        "data": None,
        "batches": [{"command": "python main.py --name=a --seed=3", "n_trials": 2}],
    }


def test_a_window_is_six_lambdas():
    assert summary.WINDOW_SIGMAS == search_spaces.WINDOW_SIGMAS == dmel.WINDOW_SIGMAS
    assert search_spaces.SAMPLE_RATE == datasets.SAMPLE_RATE


DAMAGED = {
    "text in an accuracy": (
        lambda table: table.replace(",0.68,0.68,", ",0.68,good,", 1),
        r"line 2, column test_accuracy: 'good'",
    ),
    "no accuracy": (lambda table: table.replace(",0.68,0.68,", ",0.68,,", 1), r"line 2, column test_accuracy: .*nan"),
    "accuracy in percent": (
        lambda table: table.replace(",0.68,0.68,", ",0.68,68.0,", 1),
        r"68.0\)? is no number from 0 to 1",
    ),
    "no λ": (lambda table: table.replace("\n0,-160.0", "\n0,"), r"line 2, column best_lambd_est"),
    "infinite λ": (lambda table: table.replace("\n0,-160.0", "\n0,inf"), r"line 2, column best_lambd_est"),
    "text in trainable": (lambda table: table.replace("True", "yes", 1), r"config/trainable is not True or False"),
    "text in a seed": (lambda table: table.replace(",True,1,", ",True,one,", 1), r"line 3, column config/seed: 'one'"),
    "a trial twice": (lambda table: table + table.splitlines()[1] + "\n", r"line 32 holds a trial that stands above"),
    "a number twice": (lambda table: table.replace("\n7,", "\n6,"), r"line 9 holds a trial that stands above"),
    "cut off in a line": (lambda table: table[:-3], r"cut off"),
    "cut off in a number": (lambda table: table[:-40] + "\n", r"line 31, column \S+: nan is"),
    "empty": (lambda table: "", r"cannot be read"),
    "no column": (lambda table: table.replace("test_accuracy", "accuracy"), r"lacks the columns test_accuracy"),
    "bytes": (lambda table: b"\x80\x04" + table.encode(), r"cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_tables_are_told_by_line_and_column(tmp_path, case):
    write_experiment(tmp_path)
    damage, message = DAMAGED[case]
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    before, after = path.read_text(), damage(path.read_text())
    assert after != before
    path.write_bytes(after if isinstance(after, bytes) else after.encode())
    with pytest.raises(InputError, match=rf"audio_mnist\.csv.*{message}.*make it again with predict_test") as error:
        summary.read_results(Storage(tmp_path), "audio_mnist")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.replace("\n0,3,", "\n0,2,"), "does not hold every epoch of every trial"),
        (lambda table: "\n".join(table.splitlines()[:-1]) + "\n", "does not hold every epoch of every trial|"),
        (lambda table: table[: len(table) // 2], "cut off|does not hold|line"),
        (lambda table: table.replace("\n0,3,", "\n0,x,"), "line 4, column epoch: 'x'"),
        (lambda table: table.replace("\n0,", "\n99,"), "does not hold every epoch of every trial"),
        (lambda table: "", "cannot be read"),
    ],
)
def test_damaged_epochs_are_told(tmp_path, damage, message):
    write_experiment(tmp_path)
    path = tmp_path / "audio_mnist" / "epochs.csv"
    path.write_text(damage(path.read_text()))
    try:
        summary.read_results(Storage(tmp_path), "audio_mnist")
    except InputError as error:
        assert re.search(message, str(error)) and "epochs.csv" in str(error) and "\n" not in str(error)
    else:
        assert message.endswith("|")  # a trial that ended an epoch sooner is one


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_mutated_tables_are_numbers_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tables")
    write_experiment(folder, n_runs=2)
    path = folder / "audio_mnist" / "audio_mnist.csv"
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    content[start:end] = data.draw(
        st.binary(max_size=6) | st.text(',\n"0123456789.einfa-T', max_size=8).map(str.encode)
    )
    path.write_bytes(bytes(content))
    try:
        trials = summary.read_results(Storage(folder), "audio_mnist").trials
    except InputError as error:
        assert "audio_mnist.csv" in str(error) and "\n" not in str(error)
    else:
        assert trials["accuracy"].between(0, 100).all() and np.isfinite(trials["window"]).all()
        assert not trials.duplicated(["config/model_name", "cell", "config/trainable", "seed"]).any()
