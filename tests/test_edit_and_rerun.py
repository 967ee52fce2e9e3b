"""The act that the repository exists for: edit search_spaces.py, run the shell script again.

Each step goes through run_experiments.sh, real Ray and real files.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import Project

pytestmark = pytest.mark.slow

SPACE = """

def edited(max_epochs):
    return {
        **time_frequency(max_epochs),
        "n_samples": 200,
        "init_lambd": tune.grid_search([1.276, 6.38]),
    }
"""
OF_THE_MOMENT = ["logdir", "time_this_iter_s", "time_total_s"]


class Experiment:
    """A project whose experiment is edited, trained, tested and tabulated by the shell scripts."""

    def __init__(self, folder):
        self.project = Project(folder, SPACE)
        self.results = folder / "ray_results" / "edited"
        self.settings = {"EXPERIMENTS": "edited", "MAX_EPOCHS": 2, "NUM_SAMPLES": 1}

    def edit(self, old, new):
        path = self.project.folder / "search_spaces.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def train(self, *flags, **settings):
        """The sentence before training."""
        output = self.project.run("run_experiments.sh", *flags, **self.settings | settings).stdout
        return re.search(r"^edited: (\d+ trials: .*)$", output, re.MULTILINE)[1]

    def numbers(self):
        """NAME.csv by trial, without what belongs to the moment, and the tables."""
        self.project.run("run_test_predictions.sh", **self.settings)
        table = pd.read_csv(self.results / "edited.csv", index_col="trial_id")
        table = table.drop(columns=["Unnamed: 0", *OF_THE_MOMENT]).sort_index()
        return table, self.project.run("produce_tables.py").stdout


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return Experiment(tmp_path_factory.mktemp("edited"))


def test_every_edit_trains_what_is_new_and_undoing_it_brings_every_number_back(experiment):
    assert experiment.train() == "4 trials: 0 finished, 4 to train"
    first, first_tables = experiment.numbers()

    experiment.edit('"n_samples": 200', '"lr_tf": 0.5, "n_samples": 200')
    new_rate = "4 trials: 0 finished, 4 to train (lr_tf 0.5 is new); 4 others stay aside"
    assert experiment.train() == new_rate
    experiment.edit('"lr_tf": 0.5, ', "")

    experiment.edit("[1.276, 6.38]", "[6.38, 3.19, 1.276]")
    new_window = "6 trials: 4 finished, 2 to train (init_lambd 3.19 is new); 4 others stay aside"
    assert experiment.train() == new_window
    table, tables = experiment.numbers()
    assert len(table) == 6 and tables.count("| 3.2 |") == 3  # two of the accuracies, a difference

    experiment.edit("[6.38, 3.19, 1.276]", "[6.38]")
    assert experiment.train() == "2 trials: 2 finished; 8 others stay aside"
    stale = experiment.project.run("produce_tables.py").stdout  # before they are tested again
    assert "% edited: 2 trials" in stale and "| 3.2 |" not in stale
    table, tables = experiment.numbers()
    assert len(table) == 2 and "| 1.3 |" not in tables

    experiment.edit("[6.38]", "[6.38, 1.276]")
    experiment.edit('"n_samples": 200', '"device": "cpu", "n_samples": 200')
    assert experiment.train() == "4 trials: 4 finished; 6 others stay aside"
    untested = experiment.project.run("produce_tables.py").stdout
    assert "% 2 trials are not tested: run predict_test.py" in untested
    experiment.edit('"device": "cpu", ', "")
    again, again_tables = experiment.numbers()
    pd.testing.assert_frame_equal(again, first)
    assert again_tables == first_tables

    experiment.edit('"n_samples": 200', '"optimizer_name": "adam", "n_samples": 200')
    new_optimizer = "4 trials: 0 finished, 4 to train (optimizer_name adam is new)"
    assert experiment.train().startswith(new_optimizer)
    experiment.edit('"optimizer_name": "adam", ', "")


def test_runs_and_epochs_are_added(experiment):
    experiment.train()
    second_run = experiment.train(NUM_SAMPLES=2)
    assert second_run.startswith("8 trials: 4 finished, 4 to train (seed 1 is new)")
    assert experiment.train(NUM_SAMPLES=1).startswith("8 trials: 8 finished")
    _, tables = experiment.numbers()
    assert "% edited: 8 trials" in tables

    longer = experiment.train(NUM_SAMPLES=2, MAX_EPOCHS=4)
    assert longer.startswith("8 trials: 0 finished, 8 to train (8 go on from epoch 2)")
    table, _ = experiment.numbers()
    assert set(table["training_iteration"]) == {4}
    from_the_start = Project(experiment.project.folder / "anew", SPACE)
    settings = experiment.settings | {"NUM_SAMPLES": 2, "MAX_EPOCHS": 4}
    from_the_start.run("run_experiments.sh", **settings)
    from_the_start.run("run_test_predictions.sh", **settings)
    path = from_the_start.folder / "ray_results" / "edited" / "edited.csv"
    expected = pd.read_csv(path, index_col="trial_id").drop(columns=["Unnamed: 0", *OF_THE_MOMENT])
    pd.testing.assert_frame_equal(table, expected.sort_index())

    assert experiment.train(NUM_SAMPLES=2, MAX_EPOCHS=3).startswith("8 trials: 8 finished")
    _, tables = experiment.numbers()
    assert "% 8 of 8 trials have more than the 3 epochs asked for" in tables


def test_a_restart_that_is_interrupted_goes_on_without_the_flag(experiment):
    experiment.train()
    command = ["sh", "run_experiments.sh", "--restart", "--save_seconds=0", "--num_cpus=2"]
    settings = {key: str(value) for key, value in experiment.settings.items()}
    settings |= {"EXPERIMENTS": "edited time_frequency", "MAX_EPOCHS": "400"}
    process = subprocess.Popen(
        command,
        cwd=experiment.project.folder,
        env=os.environ | {"DMEL_PYTHON": sys.executable} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(list((experiment.results / "trials").glob("*.pt"))) not in (1, 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=100)[0]

    assert process.returncode == 130, output
    assert "run_experiments.sh: --restart moves aside: edited time_frequency\n" in output
    assert re.search(r"^edited: what was there is now edited\.\d{8}-\d{6}$", output, re.MULTILINE)
    assert "interrupted: the same command without --restart continues." in output
    assert "how edited goes on is said above; not moved aside yet: time_frequency." in output

    assert experiment.train(MAX_EPOCHS=2).startswith("4 trials: ")
    plan = json.loads((experiment.results / "experiment.json").read_text())
    assert len(plan["finished"]) == 4


def test_a_refusal_does_not_stop_the_others(experiment):
    settings = experiment.settings | {"EXPERIMENTS": "absent edited wrong"}
    result = experiment.project.run("run_experiments.sh", check=False, **settings)
    assert result.returncode == 1
    assert "edited: all trials are finished" in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last == "run_experiments.sh: not trained to the end, as said above: absent wrong."
