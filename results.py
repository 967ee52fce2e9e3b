"""The plan and the trials of an experiment, in its folder RAY_RESULTS/NAME.

docs/cluster.md lists all files there. RAY_RESULTS is a folder or a URI, such as s3://bucket/results.
Every file is replaced whole, and none is unpickled.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import filelock
import pydantic
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem, copy_files

from config import InputError, digest, first_line, lock, parse, whole_file

PACKAGES = ("torch", "torchaudio", "numpy", "ray", "librosa", "soundfile", "pandas")
SCRIPTS = ("dmel.py", "models.py", "train.py", "datasets.py", "recordings.py")  # make the numbers

# Files of an experiment, by its name; its table is table_of(name).
RECORD = "{0}/experiment.json"
EPOCHS = "{0}/epochs.csv"
PREDICTIONS = "{0}/predictions.csv"

# Keys by which an experiment.json that is no Plan is known.
KEPT = "n_trials"  # of what predict_test.py --keep copies
VERSION_1 = "batches"  # of an earlier version of these scripts

MOVED_ASIDE = r"(\.\d{8}-\d{6})+$"  # end of the name of an experiment that --restart moved


def table_of(name):
    """The path of an experiment's table, NAME/NAME.csv, which keeps its name when it is moved."""
    return f"{name}/{re.sub(MOVED_ASIDE, '', name)}.csv"


class Storage:
    """Files below a folder, given as a path or as a URI.

    Raises OSError where a file cannot be read or written.
    """

    def __init__(self, root):
        root = str(root)
        uri = root if "://" in root else Path(root).absolute()
        try:
            self.filesystem, path = FileSystem.from_uri(uri)
        except (ValueError, OSError) as error:
            raise InputError(
                f"cannot use '{root}' for results: name a folder or URI ({first_line(error)})."
            ) from None

        # Without the settings that a URI has behind ?, or a password before @.
        self.root = path.rstrip("/")
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.address = self.root  # for people
        if not self.is_local:
            self.address = f"{self.filesystem.type_name}://{self.root}"

    def read(self, name):
        """Content of a file as bytes, None where there is none."""
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name, content):
        """Replaces a file, whole; content: bytes or text."""
        if isinstance(content, str):
            content = content.encode()
        # On other storages than folders no file appears in part.
        open_file = whole_file if self.is_local else self.filesystem.open_output_stream
        with open_file(f"{self.root}/{name}") as file:
            file.write(content)

    def remove(self, name):
        """Removes a file."""
        self.filesystem.delete_file(f"{self.root}/{name}")

    def list(self, name=""):
        """Names of what a folder holds, hidden files left out."""
        selector = FileSelector(f"{self.root}/{name}", allow_not_found=True)
        names = [file.base_name for file in self.filesystem.get_file_info(selector)]
        return sorted(name for name in names if not name.startswith("."))


class LastEpoch(pydantic.BaseModel, strict=True, extra="forbid"):
    """Tells whether a finished trial is still the one that was tested: of its last row."""

    training_iteration: int
    valid_loss: float


class Plan(pydantic.BaseModel, strict=True, extra="forbid"):
    """The content of experiment.json: which trials belong to the experiment now."""

    version: Literal[2] = 2
    seeds: list[int] = []  # of the runs ever asked for
    trials: dict[str, dict[str, Any]] = {}  # config of each trial that belongs, by its key
    # The last epoch of each of them that was finished when main.py last looked.
    finished: dict[str, LastEpoch] = {}
    starts: list[dict[str, Any]] = []  # seeds, n_trials and provenance() of what added something

    def configs(self):
        """The Configs of the trials that belong, by key.

        A config that is not valid any more, or has another key now, is left out: its trial lies
        aside.
        """
        configs = {}
        for key, values in self.trials.items():
            with contextlib.suppress(InputError):
                config = parse(values)
                if config.key == key:
                    configs[key] = config
        return configs


class Experiment:
    """The folder of one experiment, which need not be there yet."""

    def __init__(self, results_dir, name):
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
            raise InputError(
                f"'{name}' cannot be the name of an experiment: "
                "use letters, digits, _, -, dots inside."
            )
        self.name = name
        self.storage = Storage(results_dir)
        self.address = f"{self.storage.address}/{name}"  # for people

    def alone(self):
        """A context that keeps other processes out; raises InputError where one is in.

        A URI has no lock.
        """
        if not self.storage.is_local:
            return contextlib.nullcontext()
        path = f"{self.storage.root}/.{self.name}.lock"
        try:  # freed when its process ends, in any way
            held = lock(
                path, "set RAY_RESULTS_DIR to a folder where files can be locked", timeout=0
            )
        except filelock.Timeout:
            raise InputError(
                f"{self.address} is in use: wait for the main.py or predict_test.py there."
            ) from None

        for left in Path(self.storage.root, self.name).rglob("*.tmp"):
            left.unlink(missing_ok=True)  # of a write that was interrupted
        return held

    def read_plan(self):
        """The Plan, None where there is none; raises InputError where it cannot be used."""
        content = self.storage.read(RECORD.format(self.name))
        if content is None:
            return None

        path = f"{self.address}/experiment.json"
        try:
            values = json.loads(content)
            if VERSION_1 in values:  # which knew other keys of trials
                raise InputError(
                    f"{path} is of an earlier version of these scripts: tables and figures read "
                    "it; to train, move it aside with main.py --restart, or change --name."
                )
            if KEPT in values:
                raise InputError(
                    f"{path} is what predict_test.py --keep copied, for tables and figures alone: "
                    "to train or test, name another folder of results."
                )
            return Plan.model_validate(values)
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged: restore it, or start anew with main.py --restart."
            ) from None

    def is_kept(self):
        """Whether predict_test.py --keep made it."""
        return KEPT in self.record()

    def is_without_plan(self):
        """Whether experiment.json is of a kind that does not say which trials belong."""
        return self.is_kept() or VERSION_1 in self.record()

    def record(self):
        """What experiment.json holds, a dict; empty where it is not there or damaged."""
        content = self.storage.read(RECORD.format(self.name))
        try:
            record = json.loads(content or "")
        except (ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def write_plan(self, plan):
        self.storage.write(RECORD.format(self.name), json.dumps(plan.model_dump(), indent=2) + "\n")

    def move_aside(self):
        """Renames the folder, if there is one, and returns its new name."""
        storage = self.storage
        if not storage.list(self.name):
            return None

        aside = f"{self.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        old = f"{storage.root}/{self.name}"
        new = f"{storage.root}/{aside}"
        if storage.is_local:
            os.rename(old, new)
        else:
            copy_files(old, new, storage.filesystem, storage.filesystem)
            storage.filesystem.delete_dir(old)
        return aside

    def trial_keys(self):
        """Keys of all trials that have a file, whether they belong or not."""
        names = self.storage.list(f"{self.name}/trials")
        return [name.removesuffix(".pt") for name in names if name.endswith(".pt")]

    def read_trial(self, key):
        """What write_trial was given, with its config as a Config; None where there is no file.

        Raises ValueError where the file holds something else.
        """
        import torch  # here and below, as tables do without

        try:
            content = self.storage.read(f"{self.name}/trials/{key}.pt")
            if content is None:
                return None
            broken = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if broken:  # torch.load does not look at checksums
                raise ValueError(f"{broken} in it is not what was written")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            state["config"] = parse(state["config"])
            if state["config"].key != key:
                raise ValueError("it is of another trial")
            missing = {"history", "best_net", "data", "scripts"} - state.keys()
            if missing or not state["history"]:
                raise ValueError("it is not what was written")
        except Exception as error:  # a file of something else can fail in every way
            path = f"{self.address}/trials/{key}.pt"
            raise ValueError(f"{path} is damaged ({first_line(error)})") from None
        return state

    def read_configs(self, keys):
        """Configs of the trials that have an intact file."""
        configs = []
        for key in keys:
            with contextlib.suppress(ValueError):
                state = self.read_trial(key)
                if state is not None:
                    configs.append(state["config"])
        return configs

    def read_trials(self, keys):
        """(key, state) of the trials that have an intact file, one at a time; warns of others."""
        for key in keys:
            try:
                state = self.read_trial(key)
            except ValueError as damage:
                print(f"warning: {damage}: left out, main.py trains it anew", file=sys.stderr)
                continue
            if state is not None:
                yield key, state

    def write_trial(self, key, state):
        """Replaces a trial's file; state: tensors and plain values, and its Config as config."""
        self.storage.write(f"{self.name}/trials/{key}.pt", content_of_trial(state))


def content_of_trial(state):
    """The bytes of a trial's file; state: see Experiment.write_trial."""
    import torch

    content = io.BytesIO()
    torch.save(state | {"config": state["config"].model_dump()}, content)
    return content.getbuffer()


def data_of(recordings):
    """What identifies the recordings that a trial is trained on, None for drawn data."""
    if recordings is None:
        return None
    return {"clips": len(recordings.clips), "identity": recordings.identity}


def check_recordings(name, trained_on, found=None):
    """Raises InputError where trials were trained on other recordings than those found here.

    trained_on: data_of() of each trial. found: that of the recordings here; where it is None, as no
    recordings are needed, trials are compared with each other.
    """
    trained_on = [data for data in trained_on if data is not None]
    if found is None and trained_on:
        found = trained_on[-1]
    others = [data for data in trained_on if data != found]
    if not others:
        return

    def described(data):
        return f"{data['clips']} recordings (hash {data['identity'][:12]})"

    raise InputError(
        f"{name}: {len(others)} of its trials were trained on {described(others[0])}, not on these "
        f"{described(found)}: bring the former back, change --name, or begin anew with --restart."
    )


def scripts():
    """Hash of each script that makes the numbers."""
    hashes = {}
    for name in SCRIPTS:
        content = Path(__file__).with_name(name).read_bytes()
        hashes[name] = hashlib.sha256(content).hexdigest()[:12]
    return hashes


def scripts_version(hashes):
    """A short name for a version of the scripts; hashes: of scripts()."""
    return digest(hashes)[:12]


def predictions_version(rows):
    """A short name for a trial's predictions; rows: of predictions.csv, as text, without its key.

    It ties them to the trial's row of NAME.csv, which tells it.
    """
    return digest(rows)[:12]


def provenance():
    """What made trials: command, versions, git commit, hashes of the scripts, hardware, time."""
    import torch

    commit = ""
    git = shutil.which("git")
    if git:
        command = [git, "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)

    gpus = []
    if torch.cuda.is_available():  # otherwise they have no names, and may be counted all the same
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "git_commit": commit or "not a git checkout",
        "scripts": scripts(),
        "versions": versions,
        "hardware": {"machine": platform.platform(), "cpu_cores": os.cpu_count(), "gpus": gpus},
    }
