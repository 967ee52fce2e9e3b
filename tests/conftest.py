"""Where the optional test data lies, and a copy of the scripts to run as a user would."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = int(
    os.environ.get("DMEL_EXAMPLES", 400 if "--slow" in sys.argv else 100)
)  # of each property
SHARED = Path(os.environ.get("DMEL_TEST_DATA", ROOT.parent / "shared"))  # golden/ and data/

sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def pytest_configure(config):
    """Hides GPUs from all tests but those of -m gpu, as their numbers are a CPU's.

    What a shell starts in its background ignores Ctrl-C, and so would the scripts that are tested.
    """
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shared(path):
    """A file or folder of the test data; without it the test is skipped, in CI it fails."""
    if not (SHARED / path).exists():
        reason = f"{SHARED / path} is not there: DMEL_TEST_DATA names the folder that holds golden/ and data/"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return SHARED / path


def write_audio_mnist(folder, speakers=("28", "12", "26"), repetitions=2):
    """A few tones in AudioMNIST's layout: 48 kHz, of different lengths."""
    for speaker in speakers:
        (folder / "data" / speaker).mkdir(parents=True)
        for repetition in range(repetitions):
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(24000 + 4800 * repetition) / 48000)
            soundfile.write(
                folder / "data" / speaker / f"7_{speaker}_{repetition}.wav",
                tone,
                48000,
                subtype="FLOAT",
            )
    return folder


def write_esc50(folder, n=3):
    """A few tones in ESC-50's layout: 44.1 kHz, 5 s, in the left of two channels."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100 * 5) / 44100)
    rows = [
        [f"{i % 5 + 1}-{100 + i}-A-{i}.wav", i % 5 + 1, i, "tone", "False", 100 + i, "A"]
        for i in range(n)
    ]
    table = pd.DataFrame(
        rows, columns=["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    )
    table.to_csv(folder / "meta" / "esc50.csv", index=False)
    for name in table["filename"]:
        soundfile.write(folder / "audio" / name, np.stack([tone, 0 * tone], axis=1), 44100)
    return folder


TINY_SPACES = """

def tiny(max_epochs):
    return {**time_frequency(max_epochs), "n_samples": 300, "init_lambd": tune.grid_search([1.276, 31.9])}


def tiny_uniform(max_epochs):
    return {**tiny(max_epochs), "init_lambd": tune.uniform(1.0, 30.0), "lr_model": tune.choice([1e-3, 1e-2])}


def tiny_failing(max_epochs):
    return {**tiny(max_epochs), "init_lambd": 6.38, "trainable": False, "lr_model": tune.grid_search([1e-3, 1e38])}


def tiny_folds(max_epochs):
    return {
        **audio_mnist(max_epochs),
        "dataset_name": "esc50",
        "n_points": 40000,
        "init_lambd": 46.7,
        "trainable": False,
        "split": tune.grid_search(["folds", {"train": [5], "valid": [1, 2], "test": [3, 4]}]),
    }
"""


class Project:
    """A copy of the scripts in a folder of its own, with further experiments in search_spaces.py."""

    def __init__(self, folder, spaces=TINY_SPACES):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for pattern in ("*.py", "*.sh", "*.txt", "*.mplstyle"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
        with open(folder / "search_spaces.py", "a") as file:
            file.write(spaces)

    def run(self, *command, check=True, **environment):
        """Runs `python script ...`, `python -m ...` or `sh script ...`; the finished process, its
        output as text.
        """
        program = "sh" if Path(command[0]).suffix == ".sh" else sys.executable
        result = subprocess.run(
            [program, *map(str, command)],
            cwd=self.folder,
            env=os.environ
            | {
                "DMEL_PYTHON": sys.executable,
                **{key: str(value) for key, value in environment.items()},
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))
