"""A run of main.py in a process of its own, to disturb, and what it leaves, to compare."""

import functools
import os
import subprocess
import sys
import time

import pandas as pd
import psutil

from results import Experiment

CELL = [f"config/{key}" for key in ("seed", "model_name", "init_lambd", "trainable")]
OF_THE_MOMENT = ["logdir", "time_this_iter_s", "time_total_s"]


class Run:
    """An experiment in a results folder of its own, every epoch of whose trials is written."""

    def __init__(self, project, results, name, epochs, flags=()):
        self.project, self.name, self.n_epochs = project, name, epochs
        self.results = project.folder / results
        self.folder = self.results / name
        arguments = [f"--name={name}", f"--max_epochs={epochs}", f"--ray_root_dir={self.results}", "--save_seconds=0"]
        self.command = ["main.py", *arguments, *flags]

    def start(self, **environment):
        return subprocess.Popen(
            [sys.executable, *self.command],
            cwd=self.project.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, **options):
        return self.project.run(*self.command, **options)

    def states(self):
        """What the files of the trials hold, by key; those that are not there yet are left out."""
        experiment = Experiment(self.results, self.name)
        states = {key: experiment.read_trial(key) for key in experiment.read_plan().trials}
        return {key: state for key, state in states.items() if state is not None}

    def n_reported(self):
        """Epochs that are written."""
        return sum(len(state["history"]) for state in self.states().values()) if self.folder.exists() else 0

    def wait_for_epochs(self, process, n):
        """Waits until n epochs more than now are written."""
        until, deadline = self.n_reported() + n, time.monotonic() + 120
        while self.n_reported() < until:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)

    @functools.cached_property
    def table(self):
        """What predict_test.py writes, sorted by cell, what belongs to the moment left out."""
        command = ["predict_test.py", f"--ray_results_dir={self.results}", f"--dataset_name={self.name}"]
        result = self.project.run(*command)
        self.test_output = result.stdout + result.stderr
        table = pd.read_csv(self.folder / f"{self.name}.csv", index_col=0)
        return table.sort_values(CELL).reset_index(drop=True).drop(columns=OF_THE_MOMENT)

    def histories(self):
        """The history of every trial by its key, what belongs to the moment left out."""
        return {
            key: [{name: value for name, value in row.items() if name not in OF_THE_MOMENT} for row in state["history"]]
            for key, state in self.states().items()
        }


def workers_of(process):
    """The processes of a run in which trials train."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if "ImplicitFunc" in " ".join(member.cmdline())]


def assert_same(run, reference):
    """Asserts equal tables and equal histories to the last bit, every epoch once."""
    pd.testing.assert_frame_equal(run.table, reference.table, check_exact=True)
    histories = run.histories()
    assert histories == reference.histories()
    for history in histories.values():
        assert [row["training_iteration"] for row in history] == list(range(1, run.n_epochs + 1))
