"""A run of main.py in a process of its own, to disturb, and what it leaves, to compare."""

import functools
import json
import subprocess
import sys
import time

import pandas as pd

CELL = ("seed", "model_name", "init_lambd", "trainable")
OF_THE_MOMENT = {
    *("logdir", "trial_id", "hostname", "node_ip", "pid", "date", "timestamp", "checkpoint_dir_name"),
    *("time_this_iter_s", "time_total_s", "time_since_restore", "iterations_since_restore"),
    *("should_checkpoint", "done", "experiment_tag"),  # the tag begins with the number of the trial in its batch
}


class Run:
    """An experiment in a results folder of its own."""

    def __init__(self, project, results, name, epochs, flags=()):
        self.project, self.name, self.n_epochs = project, name, epochs
        self.results = project.folder / results
        self.command = ["main.py", f"--name={name}", f"--max_epochs={epochs}", f"--ray_root_dir={self.results}", *flags]

    def start(self):
        return subprocess.Popen(
            [sys.executable, *self.command],
            cwd=self.project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, **options):
        return self.project.run(*self.command, **options)

    def histories(self):
        """Lines of result.json of every trial, by its folder's name."""
        return {path.parent.name: path.read_text().splitlines() for path in self.results.glob("*/*/*/result.json")}

    def wait_for_epochs(self, process, n):
        """Waits until n epochs more than now are reported."""
        until, deadline = sum(map(len, self.histories().values())) + n, time.monotonic() + 120
        while sum(map(len, self.histories().values())) < until:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)

    def pids(self):
        """Processes that reported an epoch."""
        lines = [line for history in self.histories().values() for line in history]
        return {json.loads(line)["pid"] for line in lines if line.endswith("}")}

    @functools.cached_property
    def table(self):
        """What predict_test.py writes, sorted by cell, what belongs to the moment left out."""
        command = ["predict_test.py", f"--ray_results_dir={self.results}", f"--dataset_name={self.name}"]
        self.test_output = self.project.run(*command).stdout
        table = pd.read_csv(self.results / self.name / f"{self.name}.csv", index_col=0)
        cells = [f"config/{key}" for key in CELL]
        return table.sort_values(cells).reset_index(drop=True).drop(columns=OF_THE_MOMENT & set(table))

    def epochs(self):
        """The history of every trial by its cell, from both of its files, what belongs to the moment left out."""
        found = {}
        for path in (self.results / self.name).glob("*/*/result.json"):
            reports = [json.loads(line) for line in path.read_text().splitlines()]
            config = reports[0]["config"]
            table = pd.read_csv(path.parent / "progress.csv")
            assert table["training_iteration"].tolist() == [report["training_iteration"] for report in reports]
            assert table["loss"].tolist() == [report["loss"] for report in reports]
            cell = tuple(config[key] for key in CELL)
            found[cell] = [
                {key: value for key, value in report.items() if key not in OF_THE_MOMENT} for report in reports
            ]
        return found


def assert_same(run, reference):
    """Asserts equal tables and equal histories to the last bit, every epoch once."""
    pd.testing.assert_frame_equal(run.table, reference.table, check_exact=True)
    histories = run.epochs()
    assert histories == reference.epochs()
    for history in histories.values():
        assert [report["training_iteration"] for report in history] == list(range(1, run.n_epochs + 1))
