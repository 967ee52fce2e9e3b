"""Statistics of results made up so that the answers are known, and of damaged ones."""

import json

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
import train
from config import InputError
from results import Plan, Storage

BASELINE = {10.0: 0.60, 35.0: 0.70, 300.0: 0.65}  # test accuracy by initial window, ms
TRAINED = {10.0: 0.68, 35.0: 0.70, 300.0: 0.64}


def write_experiment(
    folder, name="audio_mnist", n_runs=5, started=None, spread=0.001, max_epochs=1000
):
    """Trials of 100 epochs: λ walks to that of 120 ms within 40; DMEL takes three times as long as
    the baseline.

    Accuracies grow by 0.01 from run to run, those of DMEL by spread more.

    """
    trials, epochs = [], []
    for trainable, accuracies in ((True, TRAINED), (False, BASELINE)):
        for window, accuracy in accuracies.items():
            for seed in range(n_runs):
                init = 8 * window / 6
                lambds = np.full(100, init)
                if trainable:
                    lambds[:40] = np.linspace(init, 160, 40)
                    lambds[40:] = -160  # its sign means nothing
                config = {
                    "init_lambd": init,
                    "trainable": trainable,
                    "seed": seed,
                    "resample_rate": 8000,
                }
                config |= {
                    "model_name": "mel_linear_net",
                    "dataset_name": "audio_mnist",
                    "n_points": 8000,
                }
                config |= {"max_epochs": max_epochs}
                result = {"best_lambd_est": lambds[-1], "best_valid_acc": accuracy}
                result["test_accuracy"] = accuracy + 0.01 * seed + spread * trainable * seed
                seconds = [1.0, *[0.3 if trainable else 0.1] * 99]  # the first one starts up
                columns = {
                    "trial": len(trials),
                    "epoch": range(1, 101),
                    "lambd": lambds,
                    "seconds": seconds,
                }
                epochs.append(pd.DataFrame(columns))
                trials.append(result | {f"config/{key}": value for key, value in config.items()})
    (folder / name).mkdir(parents=True)
    pd.DataFrame(trials).to_csv(folder / name / f"{name}.csv")
    pd.concat(epochs).to_csv(folder / name / "epochs.csv", index=False)
    record = {"batches": [{"n_trials": started or len(trials)}]}
    (folder / name / "experiment.json").write_text(json.dumps(record))


def test_interval_is_student_s():
    values = [1.0, 2.0, 4.0, 5.5]
    expected = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = summary.Interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.mean, found.deviation) == pytest.approx(
        (4, 3.125, np.std(values, ddof=1))
    )
    assert summary.Interval([3.0]).mean == 3.0 and np.isnan(summary.Interval([3.0]).low)


def test_epoch_at_which_lambda_settles():
    assert summary.settling_epoch([100, 50, 10, 10, 10, 10, 10, 10, 10, 10]) == 3
    assert summary.settling_epoch([10, 9.5, 10.5, 10, 10, 10, 10, 10, 10, 10]) == 1
    assert (
        summary.settling_epoch([-20, 10, -20, 10, -10, 10, 10, 10, 10, 10.5]) == 4
    )  # λ is the same with a minus
    assert np.isnan(summary.settling_epoch([100, 90, 80, 70, 60, 50, 40, 30, 20, 10]))
    assert summary.settling_epoch([5.0]) == 1


def test_cells_have_a_trained_and_a_fixed_half(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    trials, cells = results.trials, [cell for _, cell in results.trials.groupby(summary.CELL)]
    assert results.n_started == 12 and set(trials["epochs"]) == {100}
    assert [cell["init_window"].iloc[0] for cell in cells] == pytest.approx([10, 35, 300])
    for trained, fixed in map(summary.halves, cells):
        assert trained["config/trainable"].tolist() == [True] * 2 and trained[
            "config/seed"
        ].tolist() == [0, 1]
        assert trained["window"].tolist() == pytest.approx([120] * 2)
        assert fixed["window"].tolist() == pytest.approx(fixed["init_window"].tolist())
        assert trained["settled"].between(30, 40).all()
    assert [values.mean for *_, values in summary.differences(trials)] == pytest.approx(
        [8.05, 0.05, -0.95]
    )
    ratio = summary.fixed_runs(trials)
    assert (ratio.n, ratio.mean) == pytest.approx(
        (2, 3.0)
    )  # the epoch that starts up does not count


def test_without_epochs_only_what_they_tell_is_missing(tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "audio_mnist" / "epochs.csv").unlink()
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    assert results.trials[["epochs", "seconds", "settled"]].isna().all(axis=None)
    assert (
        len(list(summary.differences(results.trials))) == 3
        and summary.fixed_runs(results.trials).n == 0
    )
    assert summary.read_results(Storage(tmp_path), "esc50").trials.empty


def test_what_is_kept_of_a_plan_names_no_folder():
    command = (
        "python main.py --name a_dir --data_dir '/home/me/my data' --ray_root_dir results --seed=3"
    )
    plan = Plan(
        search_space={"seed": 3}, batches=[{"command": command, "n_trials": 2}], trials={"a": {}}
    )
    batches = [{"command": "python main.py --name a_dir --seed=3", "n_trials": 2}]
    assert predict_test.reduced(plan) == {
        "search_space": {"seed": 3},
        "data": None,
        "batches": batches,
    }


def test_a_trial_is_tested_on_its_test_split(monkeypatch):
    config = search_spaces.time_frequency(1) | {
        "n_samples": 20,
        "trainable": True,
        "init_lambd": 6.38,
        "seed": 0,
    }
    state = {"config": config, "best_net": train.prepare(config)[0].state_dict()}
    monkeypatch.setattr(
        train, "evaluate", lambda net, loss_function, data, indices, *rest: (0, indices.tolist())
    )
    assert predict_test.accuracy_of(state, None) == [16, 17, 18, 19]


def test_a_window_is_six_lambdas():
    assert summary.WINDOW_SIGMAS == search_spaces.WINDOW_SIGMAS == dmel.WINDOW_SIGMAS
    assert search_spaces.SAMPLE_RATE == datasets.SAMPLE_RATE


DAMAGED = [  # the file, what is changed in it, and what is told of it
    (
        "audio_mnist.csv",
        lambda table: table.replace(",0.68,0.68,", ",0.68,good,", 1),
        "line 2, column test_accuracy",
    ),
    (
        "audio_mnist.csv",
        lambda table: table.replace(",0.68,0.68,", ",0.68,68.0,", 1),
        "line 2, column test_accuracy",
    ),
    (
        "audio_mnist.csv",
        lambda table: table.replace("\n0,-160.0", "\n0,inf"),
        "line 2, column best_lambd_est",
    ),
    ("audio_mnist.csv", lambda table: table.replace("True", "yes", 1), ""),
    (
        "audio_mnist.csv",
        lambda table: table.replace(",True,1,", ",True,one,", 1),
        "line 3, column config/seed",
    ),
    ("audio_mnist.csv", lambda table: table.replace("\n1,", "\n0,", 1), "line 3 .* stands above"),
    (
        "audio_mnist.csv",
        lambda table: table.replace(",True,1,", ",True,0,", 1),
        "line 3 .* stands above",
    ),
    (
        "audio_mnist.csv",
        lambda table: table.replace("mel_linear_net", "", 1),
        "line 2 lacks its model",
    ),
    ("audio_mnist.csv", lambda table: table[:-3], "cut off"),
    ("audio_mnist.csv", lambda table: "", ""),
    ("audio_mnist.csv", lambda table: table.replace("test_accuracy", "accuracy"), "test_accuracy"),
    (
        "audio_mnist.csv",
        lambda table: table.replace("config/trainable", "config"),
        "config/trainable",
    ),
    ("epochs.csv", lambda table: table.replace("\n0,3,", "\n0,2,"), "every epoch of every trial"),
    ("epochs.csv", lambda table: table.replace("\n0,", "\n99,"), "every epoch of every trial"),
    ("experiment.json", lambda plan: plan.replace("n_trials", "n"), ""),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_damaged_files_are_told(tmp_path, name, damage, message):
    write_experiment(tmp_path)
    path = tmp_path / "audio_mnist" / name
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    with pytest.raises(InputError, match=rf"audio_mnist/{name}.*{message}") as error:
        summary.read_results(Storage(tmp_path), "audio_mnist")
    assert "\n" not in str(error.value)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_mutated_tables_are_numbers_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tables")
    write_experiment(folder, n_runs=2)
    path = folder / "audio_mnist" / "audio_mnist.csv"
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    text = st.text(',\n"0123456789.einfa-T', max_size=8)
    content[start:end] = data.draw(st.binary(max_size=6) | text.map(str.encode))
    path.write_bytes(bytes(content))
    try:
        trials = summary.read_results(Storage(folder), "audio_mnist").trials
    except InputError as error:
        assert "audio_mnist.csv" in str(error) and "\n" not in str(error)
    else:
        assert trials["accuracy"].between(0, 100).all() and np.isfinite(trials["window"]).all()
        assert not trials.duplicated(
            ["config/model_name", "cell", "config/trainable", "config/seed"]
        ).any()
