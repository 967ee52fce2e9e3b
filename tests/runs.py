"""A run of main.py in a process of its own, to disturb, and what it leaves, to compare with
training without Ray.
"""

import contextlib
import os
import subprocess
import sys
import time

import psutil
import torch

import datasets
import train
from results import Experiment


class Run:
    """An experiment in a results folder of its own, every epoch of whose trials is written."""

    def __init__(self, project, results, name, epochs, flags=()):
        self.project, self.name = project, name
        self.results = project.folder / results
        self.folder = self.results / name
        arguments = [
            f"--name={name}",
            f"--max_epochs={epochs}",
            f"--ray_root_dir={self.results}",
            "--save_seconds=0",
        ]
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
        return dict(experiment.read_trials(experiment.read_plan().trials))

    def n_reported(self):
        """Epochs that are written."""
        return (
            sum(len(state["history"]) for state in self.states().values())
            if self.folder.exists()
            else 0
        )

    def wait_for_epochs(self, process, n):
        """Waits until n epochs more than now are written."""
        until, deadline = self.n_reported() + n, time.monotonic() + 120
        while self.n_reported() < until:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)

    def assert_undisturbed(self, recordings=None):
        """Asserts that every trial is, to the last bit, what train.py makes of its config in one
        go.
        """
        n_threads, states = torch.get_num_threads(), self.states()
        torch.set_num_threads(1)
        for key, config in Experiment(self.results, self.name).read_plan().configs().items():
            state, expected = states[key], trained(config, recordings)
            for row in state["history"] + expected["history"]:
                del row["time_this_iter_s"]
            assert config.is_finished(state["history"][-1])
            assert state["history"] == expected["history"]
            assert all(
                torch.equal(state["best_net"][name], value)
                for name, value in expected["best_net"].items()
            )
        torch.set_num_threads(n_threads)


def trained(config, recordings=None):
    """What a trial leaves at its end, trained without Ray."""
    snapshots = []
    train.train(
        config, datasets.load(config, recordings), lambda row, snapshot: snapshots.append(snapshot)
    )
    return snapshots[-1]()


def is_training(process):
    """Whether a process is one in which trials train."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "ImplicitFunc" in " ".join(process.cmdline())
