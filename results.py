"""The plan and the trials of an experiment, in its folder RAY_RESULTS/NAME; docs/cluster.md lists
all files there.

RAY_RESULTS is a folder or a URI, such as s3://bucket/results. Every file is replaced whole, and
none is unpickled.
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

from config import InputError, digest, first_line, trial_key, whole_file

PACKAGES = ("torch", "torchaudio", "numpy", "ray", "librosa", "soundfile", "pandas")
SCRIPTS = (
    "dmel.py",
    "models.py",
    "train.py",
    "datasets.py",
    "recordings.py",
)  # they make the numbers
RECORD, TABLE, EPOCHS = (
    "{0}/experiment.json",
    "{0}/{0}.csv",
    "{0}/epochs.csv",
)  # files of an experiment, by its name


class Storage:
    """Files below a folder, given as a path or as a URI; raises OSError where one cannot be read or
    written.
    """

    def __init__(self, root):
        try:
            self.filesystem, path = FileSystem.from_uri(
                str(root if "://" in str(root) else Path(root).absolute())
            )
        except (ValueError, OSError) as error:
            raise InputError(
                f"cannot use '{root}' for results: name a folder or URI ({first_line(error)})."
            ) from None
        self.root = path.rstrip(
            "/"
        )  # without the settings that a URI has behind ?, or a password before @
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.address = (
            self.root if self.is_local else f"{self.filesystem.type_name}://{self.root}"
        )  # for people

    def read(self, name):
        """Content of a file as bytes, None where there is none."""
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name, content):
        """Replaces a file, whole; content: bytes or text."""
        open_file = (
            whole_file if self.is_local else self.filesystem.open_output_stream
        )  # where none appears in part
        with open_file(f"{self.root}/{name}") as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def list(self, name=""):
        """Names of what a folder holds, hidden files left out."""
        files = self.filesystem.get_file_info(
            FileSelector(f"{self.root}/{name}", allow_not_found=True)
        )
        return sorted(file.base_name for file in files if not file.base_name.startswith("."))


class Plan(pydantic.BaseModel, strict=True, extra="forbid"):
    """The content of experiment.json."""

    version: Literal[1] = 1
    search_space: dict[str, Any]  # see config.describe
    data: dict[str, int | str] | None = (
        None  # of recordings: clips, their number, and identity, see recordings.py
    )
    batches: list[
        dict[str, Any]
    ]  # seeds, n_trials and provenance() of each start that added trials
    trials: dict[str, dict[str, Any]]  # config by key
    checksum: str = ""  # of all else

    def checksum_now(self):
        return digest(self.model_dump(exclude={"checksum"}))

    def keep_to(self, recordings, name, place):
        """Raises InputError where recordings are not those that the plan was made on; a new plan
        takes them.
        """
        found = recordings and {"clips": len(recordings.clips), "identity": recordings.identity}
        if self.checksum and found != self.data:
            there, here = (
                f"{data['clips']} recordings (hash {data['identity'][:12]})"
                for data in (self.data, found)
            )
            raise InputError(
                f"{name} was begun on {there}, '{place}' has {here}: bring those back, or change --name."
            )
        self.data = found


class Experiment:
    """The folder of one experiment, which need not be there yet."""

    def __init__(self, results_dir, name):
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII):
            raise InputError(
                f"'{name}' cannot be the name of an experiment: use letters, digits, _, -, dots inside."
            )
        self.name, self.storage = name, Storage(results_dir)
        self.address = f"{self.storage.address}/{name}"  # for people

    def alone(self):
        """A context that keeps other processes out; raises InputError where one is in. A URI has no
        lock.
        """
        if not self.storage.is_local:
            return contextlib.nullcontext()
        try:  # freed when its process ends, in any way
            lock = filelock.FileLock(f"{self.storage.root}/.{self.name}.lock").acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(
                f"{self.address} is in use: wait for the main.py or predict_test.py there."
            ) from None
        for left in Path(self.storage.root, self.name).rglob(
            "*.tmp"
        ):  # of writes that were interrupted
            left.unlink(missing_ok=True)
        return lock

    def read_plan(self):
        """The Plan, None where there is none."""
        if (content := self.storage.read(RECORD.format(self.name))) is None:
            return None
        with contextlib.suppress(ValueError):
            plan = Plan.model_validate_json(content)
            if plan.checksum == plan.checksum_now() and [*map(trial_key, plan.trials.values())] == [
                *plan.trials
            ]:
                return plan
        told = "it is damaged, or of an earlier version: restore it, or start anew with main.py --restart"
        raise InputError(f"{self.address}/experiment.json cannot be used as {told}.")

    def write_plan(self, plan):
        plan.checksum = plan.checksum_now()
        self.storage.write(RECORD.format(self.name), json.dumps(plan.model_dump(), indent=2) + "\n")

    def move_aside(self):
        """Renames the folder, if there is one, and returns its new name."""
        aside, storage = f"{self.name}.{time.strftime('%Y%m%d-%H%M%S')}", self.storage
        if not storage.list(self.name):
            return None
        old, new = f"{storage.root}/{self.name}", f"{storage.root}/{aside}"
        if storage.is_local:
            os.rename(old, new)
        else:
            copy_files(old, new, storage.filesystem, storage.filesystem)
            storage.filesystem.delete_dir(old)
        return aside

    def read_trial(self, key):
        """What write_trial was given, None where there is no such file, or, with a warning,
        something else in it.
        """
        import torch  # here and below, as tables do without

        try:
            if (content := self.storage.read(f"{self.name}/trials/{key}.pt")) is None:
                return None
            broken = zipfile.ZipFile(
                io.BytesIO(content)
            ).testzip()  # torch.load does not look at checksums
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if (
                broken
                or trial_key(state["config"]) != key
                or not {"history", "finished", "best_net"} <= state.keys()
            ):
                raise ValueError("it is not what was written")
            return state
        except Exception as error:  # a file of something else can fail in every way
            damage = f"{self.address}/trials/{key}.pt is damaged ({first_line(error)})"
            print(f"warning: {damage}: left out, main.py trains it anew", file=sys.stderr)
            return None

    def write_trial(self, key, state):
        """Replaces the trial's file; state: tensors and plain values, with config, history,
        finished and best_net.
        """
        import torch

        content = io.BytesIO()
        torch.save(state, content)
        self.storage.write(f"{self.name}/trials/{key}.pt", content.getbuffer())

    def finished_trials(self, plan):
        """(key, state) of each trial that was trained to its end, one at a time."""
        return (
            (key, state)
            for key in plan.trials
            if (state := self.read_trial(key)) and state["finished"]
        )


def scripts():
    """Hash of each script that makes the numbers."""
    return {
        name: hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()[:12]
        for name in SCRIPTS
    }


def provenance():
    """What made a batch: command, versions, git commit, hashes of the scripts, hardware."""
    import torch

    git, describe = (
        shutil.which("git"),
        ["-C", Path(__file__).parent, "describe", "--always", "--dirty"],
    )
    commit = (
        subprocess.run([git, *describe], capture_output=True, text=True).stdout.strip()
        if git
        else ""
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": commit or "not a git checkout",
        "scripts": scripts(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "hardware": {"machine": platform.platform(), "cpu_cores": os.cpu_count(), "gpus": gpus},
    }
