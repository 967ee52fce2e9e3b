"""What an experiment leaves in its folder RAY_RESULTS/NAME, written by main.py and read by the scripts after it.

experiment.json   the search space, and for every batch of runs: seeds, versions, git commit, hardware, command
seeds_0-9/        one Ray Tune experiment per batch: a folder per trial, with progress.csv and checkpoints
NAME.csv          one row per finished trial, by predict_test.py
"""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from ray import tune

from datasets import InputError

PACKAGES = ("torch", "torchaudio", "numpy", "ray", "librosa", "soundfile", "pandas")
CHECKPOINT_FILE = "trial.pt"  # in every checkpoint folder: what train.py's snapshot() gave


class Experiment:
    """The folder of one experiment; record["batches"] lists its batches of runs, in the order they were started."""

    def __init__(self, results_dir, name):
        self.name = name
        self.folder = Path(results_dir).absolute() / name
        self.record_file = self.folder / "experiment.json"
        try:
            self.record = json.loads(self.record_file.read_text()) if self.record_file.exists() else None
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read {self.record_file} ({error}): move the folder aside and start again."
            ) from None

    def claim(self, search_space):
        """Makes sure that the folder is free or belongs to the same search space, given in plain values."""
        if self.record is None:
            self.record = {"search_space": search_space, "batches": []}
        old = self.record["search_space"]
        differences = [
            f"{key}: {old.get(key, 'absent')} there, {search_space.get(key, 'absent')} now"
            for key in sorted(old.keys() | search_space.keys())
            if old.get(key) != search_space.get(key)
        ]
        if differences:
            raise InputError(
                f"{self.folder} holds another experiment ({'; '.join(differences)}): choose another --name, such as "
                f"{self.name}_2, or move the folder aside."
            )

    def add_batch(self, seeds, n_cells):
        """Records a new batch of runs of a grid of n_cells, before it starts, and returns it."""
        folder = f"seeds_{seeds[0]}-{seeds[-1]}"
        batch = {"folder": folder, "seeds": seeds, "n_trials": n_cells * len(seeds), **provenance()}
        self.record["batches"].append(batch)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.record_file, json.dumps(self.record, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.folder} ({error}): choose another --ray_root_dir.") from None
        return batch

    def seeds(self):
        return {seed for batch in self.record["batches"] for seed in batch["seeds"]}

    def trials(self, batch):
        """Results of a batch's trials, tune.Result each, in order; empty where Ray had not yet written any."""
        folder = self.folder / batch["folder"]
        if not any(folder.glob("experiment_state-*.json")):
            return []
        return sorted(tune.ResultGrid(tune.ExperimentAnalysis(str(folder))), key=lambda trial: trial.path)

    def is_finished(self, batch):
        """Whether all trials of a batch are; Ray makes the later ones of a large grid only as it gets to them."""
        return sum(map(finished, self.trials(batch))) == batch["n_trials"]


def finished(trial):
    """Whether a trial trained to its end: Ray also calls an interrupted one terminated."""
    return trial.error is None and bool(trial.metrics) and bool(trial.metrics.get("finished"))


def provenance():
    """What made a batch: command, versions, git commit, hardware."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit or "not a git checkout",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "hardware": {
            "machine": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
    }


def write_whole(path, text):
    """Writes a text file in one piece: beside its place first, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
