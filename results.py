"""What an experiment leaves in its folder RAY_RESULTS/NAME, written by main.py and read by the scripts after it.

experiment.json   the search space, and for every batch of runs: seeds, versions, git commit, hardware, command
seeds_0-9/        one Ray Tune experiment per batch: a folder per trial, with progress.csv and checkpoints
NAME.csv          one row per finished trial, by predict_test.py
epochs.csv        λ and seconds of their epochs, by predict_test.py; trial is the index of NAME.csv

RAY_RESULTS is a folder, or the URI of any storage that Ray accepts, such as s3://bucket/results.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files
from ray import tune

from datasets import InputError

PACKAGES = ("torch", "torchaudio", "numpy", "ray", "librosa", "soundfile", "pandas")
CHECKPOINT_FILE = "trial.pt"  # in every checkpoint folder: what train.py's snapshot() gave
RECORD, TABLE, EPOCHS = "{0}/experiment.json", "{0}/{0}.csv", "{0}/epochs.csv"  # files of an experiment, by its name


class Experiment:
    """The folder of one experiment; record["batches"] lists its batches of runs, in the order they were started.

    restart: rename the folder first, if there is one; aside is then its new name.
    """

    def __init__(self, results_dir, name, restart=False):
        self.name = name
        self.storage = Storage(results_dir)
        self.address = f"{self.storage.address}/{name}"  # for people and for Ray
        aside = f"{name}.{time.strftime('%Y%m%d-%H%M%S')}"
        self.aside = aside if restart and self.storage.rename(name, aside) else None
        try:
            text = self.storage.read(RECORD.format(name))
            self.record = None if text is None else json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read {self.address}/experiment.json ({error}): start anew with --restart."
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
                f"{self.address} holds another experiment ({'; '.join(differences)}): choose another --name, such as "
                f"{self.name}_2, or move it aside with --restart."
            )

    def add_batch(self, seeds, n_cells):
        """Records a new batch of runs of a grid of n_cells, before it starts, and returns it."""
        folder = f"seeds_{seeds[0]}-{seeds[-1]}"
        batch = {"folder": folder, "seeds": seeds, "n_trials": n_cells * len(seeds), **provenance()}
        self.record["batches"].append(batch)
        try:
            self.storage.write(RECORD.format(self.name), json.dumps(self.record, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.address} ({error}): choose another --ray_root_dir.") from None
        return batch

    def seeds(self):
        return {seed for batch in self.record["batches"] for seed in batch["seeds"]}

    def trials(self, batch):
        """Results of a batch's trials, tune.Result each, in order; empty where Ray had not yet written any."""
        folder = f"{self.name}/{batch['folder']}"
        if not any(name.startswith("experiment_state-") for name in self.storage.list(folder)):
            return []
        try:
            analysis = tune.ExperimentAnalysis(self.storage.path(folder), storage_filesystem=self.storage.filesystem)
            return sorted(tune.ResultGrid(analysis), key=lambda trial: trial.path)
        except Exception as error:  # whatever a damaged file brings about
            place = f"{self.address}/{batch['folder']}"
            message = f"cannot read what Ray left in {place} ({error!r:.200}): start anew with --restart."
            raise InputError(message) from None

    def history(self, trial):
        """Reports of a trial, the last one of each epoch, in order, and the number of all in its result.json."""
        folder = os.path.relpath(trial.path, self.storage.root)
        lines = (self.storage.read(f"{folder}/result.json") or "").splitlines()
        return epochs(lines), len(lines)

    def is_finished(self, batch):
        """Whether all trials of a batch are; Ray makes the later ones of a large grid only as it gets to them."""
        return sum(map(finished, self.trials(batch))) == batch["n_trials"]

    def tidy(self):
        """Leaves each epoch once in progress.csv and result.json of finished trials: interrupted ones repeated some."""
        for batch in self.record["batches"]:
            for trial in filter(finished, self.trials(batch)):
                folder = os.path.relpath(trial.path, self.storage.root)
                history, n_lines = self.history(trial)
                # From a checkpoint Ray goes on in the old progress.csv, though with other columns.
                restored = any(report["iterations_since_restore"] < report["training_iteration"] for report in history)
                if len(history) < n_lines or restored:
                    table = pd.json_normalize(history, sep="/").to_csv(index=False)
                    text = "".join(json.dumps(report) + "\n" for report in history)
                    self.storage.write(f"{folder}/progress.csv", table)
                    self.storage.write(f"{folder}/result.json", text)


class KeepReports(tune.Callback):
    """Stores a trial's reports before it starts again: Ray goes on with those stored last and loses newer ones."""

    def on_trial_start(self, iteration, trials, trial, **info):
        for name in ("result.json", "progress.csv"):
            newest, stored = Path(trial.local_path, name), f"{trial.storage.trial_fs_path}/{name}"
            if newest.exists():
                with contextlib.suppress(OSError):  # rather lose some reports than end the run
                    copy_files(str(newest), stored, destination_filesystem=trial.storage.storage_filesystem)


class Storage:
    """Text files below a folder, given as a path or as a URI."""

    def __init__(self, root):
        try:
            if "://" in str(root):
                self.filesystem, self.root = FileSystem.from_uri(root)
                self.address = root.rstrip("/")
            else:
                self.filesystem, self.root = LocalFileSystem(), str(Path(root).absolute())
                self.address = self.root
        except (ValueError, OSError) as error:
            raise InputError(
                f"cannot use '{root}' for results ({error}): name a folder or a URI that Ray accepts."
            ) from None

    def path(self, name):
        return f"{self.root}/{name}"

    def read(self, name):
        """Content of a file, None where there is none."""
        if self.filesystem.get_file_info(self.path(name)).type == FileType.NotFound:
            return None
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read().decode()

    def read_table(self, name, **options):
        """A CSV file as a DataFrame, None where there is none; options: those of pandas.read_csv."""
        text = self.read(name)
        return None if text is None else pd.read_csv(io.StringIO(text), **options)

    def write(self, name, text):
        """Writes a file in one piece: beside its place first, then renamed."""
        path = self.path(name)
        temporary = f"{path}.{os.getpid()}.tmp"
        self.filesystem.create_dir(os.path.dirname(path), recursive=True)
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(text.encode())
            self.filesystem.move(temporary, path)
        except BaseException:
            if self.filesystem.get_file_info(temporary).type != FileType.NotFound:
                self.filesystem.delete_file(temporary)
            raise

    def list(self, name=""):
        """Names of what a folder holds."""
        selector = FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def rename(self, old, new):
        """Renames a folder; False where there is none."""
        if self.filesystem.get_file_info(self.path(old)).type == FileType.NotFound:
            return False
        try:
            self.filesystem.move(self.path(old), self.path(new))
        except OSError as error:
            raise InputError(f"{self.address}/{old} cannot be renamed ({error}): choose another --name.") from None
        return True


def finished(trial):
    """Whether a trial trained to its end: Ray also calls an interrupted one terminated."""
    return trial.error is None and bool(trial.metrics) and bool(trial.metrics.get("finished"))


def epochs(lines):
    """Reports of a result.json, the last one of each epoch, in order."""
    reports = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # cut short by an interruption
            report = json.loads(line)
            reports[report["training_iteration"]] = report
    return [reports[epoch] for epoch in sorted(reports)]


def read_checkpoint(checkpoint):
    """What train.py's snapshot() gave; raises InputError where the checkpoint holds no such thing."""
    with checkpoint.as_directory() as folder:
        try:
            return torch.load(Path(folder, CHECKPOINT_FILE), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file brings about
            raise InputError(
                f"{checkpoint.path}/{CHECKPOINT_FILE} cannot be read ({error!r:.200}): remove its trial."
            ) from None


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
    """Writes a local text file in one piece."""
    Storage(Path(path).absolute().parent).write(Path(path).name, text)
