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
from results import Plan, Storage
from summary import Interval

BASELINE = {10.0: 0.60, 35.0: 0.70, 300.0: 0.65}  # test accuracy by initial window, ms
TRAINED = {10.0: 0.68, 35.0: 0.70, 300.0: 0.64}


def write_experiment(
    folder,
    name="audio_mnist",
    n_runs=5,
    started=None,
    spread=0.001,
    max_epochs=1000,
    recordings=None,
    **config,
):
    """Trials of 100 epochs: λ walks to that of 120 ms within 40 of them.

    DMEL takes three times as long as the baseline. Accuracies grow by 0.01 from run to run, those
    of DMEL by spread more. config: further keys of all trials.
    """
    trials = []
    epochs = []
    for trainable, accuracies in ((True, TRAINED), (False, BASELINE)):
        for window, accuracy in accuracies.items():
            for seed in range(n_runs):
                init = 8 * window / 6
                lambds = np.full(100, init)
                if trainable:
                    lambds[:40] = np.linspace(init, 160, 40)
                    lambds[40:] = -160  # its sign means nothing
                seconds = [1.0, *[0.3 if trainable else 0.1] * 99]  # the first one starts up
                epochs.append(
                    pd.DataFrame(
                        {
                            "trial": len(trials),
                            "epoch": range(1, 101),
                            "lambd": lambds,
                            "seconds": seconds,
                        }
                    )
                )
                row = {
                    "trial_id": f"trial{len(trials)}",
                    "training_iteration": 100,
                    "best_epoch": 50,
                    "valid_loss": 0.1,
                    "best_lambd_est": lambds[-1],
                    "best_valid_acc": accuracy,
                    "test_accuracy": accuracy + 0.01 * seed + spread * trainable * seed,
                }
                keys = {
                    "init_lambd": init,
                    "trainable": trainable,
                    "seed": seed,
                    "resample_rate": 8000,
                    "model_name": "mel_linear_net",
                    "dataset_name": "audio_mnist",
                    "n_points": 8000,
                    "max_epochs": max_epochs,
                    "patience": 50,
                }
                if recordings is not None:
                    row["recordings"] = recordings
                for key, value in (keys | config).items():
                    row[f"config/{key}"] = value
                trials.append(row)

    (folder / name).mkdir(parents=True)
    pd.DataFrame(trials).to_csv(folder / name / f"{name}.csv")
    pd.concat(epochs).to_csv(folder / name / "epochs.csv", index=False)
    record = {"version": 2, "n_trials": started or len(trials), "max_epochs": max_epochs}
    (folder / name / "experiment.json").write_text(json.dumps(record))


def write_plan(
    folder, name="audio_mnist", max_epochs=1000, patience=50, left_out=(), changed=(), anew=()
):
    """experiment.json as main.py leaves it, for what write_experiment wrote.

    left_out: trials that do not belong any more. changed: trials that were trained further. anew:
    trials that were trained anew, to another validation loss.
    """
    table = pd.read_csv(folder / name / f"{name}.csv")
    trials = {}
    finished = {}
    for key in table["trial_id"]:
        if key not in left_out:
            trials[key] = {"max_epochs": max_epochs, "patience": patience}
            n_epochs = 120 if key in changed else 100
            valid_loss = 0.2 if key in anew else 0.1
            finished[key] = {"training_iteration": n_epochs, "valid_loss": valid_loss}
    plan = {"version": 2, "seeds": [0], "trials": trials, "finished": finished, "starts": []}
    (folder / name / "experiment.json").write_text(json.dumps(plan))


def test_interval_is_student_s():
    values = [1.0, 2.0, 4.0, 5.5]
    scale = scipy.stats.sem(values)
    expected = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scale)
    found = Interval(values)
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.mean, found.deviation) == pytest.approx(
        (4, 3.125, np.std(values, ddof=1))
    )


def test_an_interval_takes_three_runs_and_keeps_to_what_is_possible():
    for values in ([3.0], [3.0, 4.0]):
        assert Interval(values).bounds() == "" and np.isnan(Interval(values).low)
    assert Interval([3.0, 4.0]).text("+.1f") == "+3.5"
    accuracies = [99.0, 99.5, 100.0]
    assert Interval(accuracies).high > 100
    assert Interval(accuracies).within(0, 100).text() == "99.5 (98.3 to 100.0)"


def test_cells_have_a_trained_and_a_fixed_half(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    cells = summary.cells(results.trials)
    assert results.n_trials == 12 and set(results.trials["epochs"]) == {100}
    assert [cell.init_window for cell in cells] == pytest.approx([10, 35, 300])
    for cell in cells:
        assert cell.trained["config/trainable"].tolist() == [True] * 2
        assert cell.trained["config/seed"].tolist() == [0, 1]
        assert cell.trained["window"].tolist() == pytest.approx([120] * 2)
        assert cell.fixed["window"].tolist() == pytest.approx([cell.init_window] * 2)

    gains = [summary.difference(cell.trained, cell.fixed, "accuracy") for cell in cells]
    assert [gain.mean for gain in gains] == pytest.approx([8.05, 0.05, -0.95])


def read(folder):
    return summary.read_results(Storage(folder), "audio_mnist")


def test_trials_that_differ_in_another_key_than_the_seed_are_never_averaged(tmp_path):
    write_experiment(tmp_path, n_runs=1)
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    table = pd.read_csv(path, index_col=0)
    changes = {"config/lr_tf": 0.5, "config/zero_floor": True, "config/device": "cpu"}
    others = table.assign(**changes, trial_id=table["trial_id"] + "b")
    table = pd.concat([table.assign(**{"config/lr_tf": 1.0}), others], ignore_index=True)
    table.to_csv(path)
    (tmp_path / "audio_mnist" / "epochs.csv").unlink()

    results = read(tmp_path)
    assert results.varying == ("lr_tf", "zero_floor")  # absent ones are at their default
    cells = summary.cells(results.trials)
    assert [len(cell.trained) for cell in cells] == [1] * 6
    models = ["LNet, lr_tf=0.5, zero_floor=True", "LNet, lr_tf=1, zero_floor=False"]
    assert [cell.model for cell in cells] == [models[0]] * 3 + [models[1]] * 3


def test_numbers_that_are_equal_to_a_millionth_are_one(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    table = pd.read_csv(path, index_col=0)
    table["config/init_lambd"] *= 1 + 1e-8 * np.arange(12)
    table["config/lr_model"] = [1e-4, 1e-4 * (1 + 1e-9)] * 6
    table.to_csv(path)
    assert len(summary.cells(read(tmp_path).trials)) == 3 and read(tmp_path).varying == ()


def test_rows_that_do_not_belong_or_were_trained_further_are_left_out(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    write_plan(tmp_path)
    results = read(tmp_path)
    assert (len(results.trials), results.n_trials, results.n_untested) == (12, 12, 0)

    write_plan(tmp_path, left_out=["trial0", "trial1"], changed=["trial5"], anew=["trial7"])
    results = read(tmp_path)
    assert (len(results.trials), results.n_trials, results.n_untested) == (8, 10, 2)
    assert not {"trial0", "trial1", "trial5", "trial7"} & set(results.trials["trial_id"])


def test_keys_of_decimal_digits_alone_are_no_numbers(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    write_plan(tmp_path)
    for name in ("audio_mnist.csv", "experiment.json"):
        path = tmp_path / "audio_mnist" / name
        path.write_text(re.sub(r"trial(\d+)", r"0012345678\1", path.read_text()))
    results = read(tmp_path)
    assert len(results.trials) == 12 and results.trials["trial_id"].str.startswith("00").all()


@pytest.mark.parametrize(
    ("max_epochs", "patience", "n_rows"),
    [(50, 50, 12), (101, 50, 12), (50, 70, 12), (100, 70, 12), (101, 70, 0)],
)
def test_what_patience_ended_or_has_all_epochs_asked_for_stays(
    tmp_path, max_epochs, patience, n_rows
):
    """Of trials of 100 epochs, the best of which is the 50th."""
    write_experiment(tmp_path, n_runs=2)
    write_plan(tmp_path, max_epochs=max_epochs, patience=patience)
    results = read(tmp_path)
    assert len(results.trials) == n_rows and results.max_epochs == max_epochs


def test_rows_that_a_larger_budget_trains_further_are_left_out_at_once(tmp_path):
    """From the start of main.py on, which writes the plan and knows of no finished trial yet."""
    write_experiment(tmp_path, n_runs=2)
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    table = pd.read_csv(path, index_col=0)
    table.assign(best_epoch=90).to_csv(path)  # patience is not used up
    write_plan(tmp_path, max_epochs=200)
    plan = json.loads((tmp_path / "audio_mnist" / "experiment.json").read_text())
    plan["finished"] = {}
    (tmp_path / "audio_mnist" / "experiment.json").write_text(json.dumps(plan))
    results = read(tmp_path)
    assert results.trials.empty and (results.n_trials, results.n_untested) == (12, 0)


def test_what_was_kept_by_version_1_is_read_as_before(tmp_path):
    write_experiment(tmp_path, n_runs=2)
    record = {"search_space": {}, "data": None, "batches": [{"n_trials": 10}, {"n_trials": 4}]}
    (tmp_path / "audio_mnist" / "experiment.json").write_text(json.dumps(record))
    results = read(tmp_path)
    assert len(results.trials) == 12 and results.n_trials == 14 and results.n_untested == 0


def test_without_epochs_only_what_they_tell_is_missing(tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "audio_mnist" / "epochs.csv").unlink()
    results = read(tmp_path)
    assert results.trials[["epochs", "seconds"]].isna().all(axis=None)
    assert len(summary.cells(results.trials)) == 3
    assert summary.read_results(Storage(tmp_path), "esc50").trials.empty


def test_what_is_kept_of_a_plan_names_no_folder():
    command = "python main.py --name a_dir --data_dir '/home/me/my data' --ray_root_dir results"
    config = {"max_epochs": 7}
    start = {"command": f"{command} --seed=3", "n_trials": 2}
    plan = Plan(seeds=[3], trials={"a": config, "b": config}, starts=[start])
    assert predict_test.reduced(plan) == {
        "version": 2,
        "seeds": [3],
        "n_trials": 2,
        "max_epochs": 7,
        "starts": [{"command": "python main.py --name a_dir --seed=3", "n_trials": 2}],
    }


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
        lambda table: table.replace(",0.1,-160.0,", ",0.1,inf,", 1),
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
