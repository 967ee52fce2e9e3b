"""A run of main.py in a process of its own, to disturb.

What it leaves can be compared with training without Ray.
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
from results import Experiment, Plan, data_of, scripts


class Run:
    """An experiment in a results folder of its own, every epoch of whose trials is written."""

    def __init__(self, project, results, name, epochs, flags=()):
        self.project = project
        self.name = name
        self.results = project.folder / results
        self.folder = self.results / name
        self.command = ["main.py", f"--name={name}", f"--max_epochs={epochs}"]
        self.command += [f"--ray_root_dir={self.results}", "--save_seconds=0", *flags]

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
        if not self.folder.exists():
            return 0
        return sum(len(state["history"]) for state in self.states().values())

    def wait_for_epochs(self, process, n):
        """Waits until n epochs more than now are written."""
        until = self.n_reported() + n
        deadline = time.monotonic() + 120
        while self.n_reported() < until:
            in_time = process.poll() is None and time.monotonic() < deadline
            assert in_time, process.communicate()[0]
            time.sleep(0.05)

    def assert_undisturbed(self, recordings=None):
        """Asserts that each trial is, to the last bit, what train.py makes of its config."""
        states = self.states()
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for key, config in Experiment(self.results, self.name).read_plan().configs().items():
            state = states[key]
            expected = trained(config, recordings)
            for row in state["history"] + expected["history"]:
                del row["time_this_iter_s"]
            assert config.is_finished(state["history"][-1])
            assert state["history"] == expected["history"]
            for name, value in expected["best_net"].items():
                assert torch.equal(state["best_net"][name], value), name
        torch.set_num_threads(n_threads)


def trained(config, recordings=None):
    """What a trial leaves at its end, trained without Ray."""
    snapshots = []
    data = datasets.load(config, recordings)
    train.train(config, data, lambda row, snapshot: snapshots.append(snapshot))
    return snapshots[-1]()


def is_training(process):
    """Whether a process is one in which trials train."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return "ImplicitFunc" in " ".join(process.cmdline())


def write_trained(results_dir, name, configs, recordings=None, **changes):
    """An experiment as main.py leaves it, of Configs, all trained here; returns it.

    changes: other values for the last rows of all histories.
    """
    experiment = Experiment(results_dir, name)
    trials = {config.key: config.model_dump() for config in configs}
    start = {"seeds": [0], "n_trials": len(trials), "command": f"python main.py --name={name}"}
    experiment.write_plan(Plan(seeds=[0], trials=trials, starts=[start]))
    for config in configs:
        write_trial(experiment, config, trained(config, recordings), recordings, **changes)
    return experiment


def write_trial(experiment, config, state, recordings=None, **changes):
    """Writes the file of a trial as main.py does; changes: other values for the last row."""
    state["history"][-1] |= changes
    about = {"data": data_of(recordings), "scripts": [scripts()], "logdir": "log"}
    experiment.write_trial(config.key, {**state, **about, "config": config})
