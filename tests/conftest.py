"""What tests share: test data, and a copy of the scripts to run as a user would."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"  # numbers of the original software
DATA = Path(os.environ.get("DMEL_TEST_DATA", ROOT.parent / "shared"))  # whole datasets, in data/
DEFAULT_EXAMPLES = 400 if "--slow" in sys.argv else 100
EXAMPLES = int(os.environ.get("DMEL_EXAMPLES", DEFAULT_EXAMPLES))  # of each property

sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

# Settings of the scripts and of git that a shell may have exported: with them the tests would write
# into the user's own recordings, results and repositories.
EXPORTED = ["DATA_DIR", "DMEL_CACHE_DIR", "RAY_RESULTS_DIR", "ESC50_URL", "AUDIO_MNIST_URL"]
EXPORTED += ["EXPERIMENTS", "NUM_SAMPLES", "MAX_EPOCHS", "GIT_DIR", "GIT_INDEX_FILE"]
EXPORTED += ["GIT_WORK_TREE"]


def pytest_configure(config):
    """Hides the user's settings; GPUs too, from all tests but -m gpu: their numbers are a CPU's.

    What a shell starts in its background ignores Ctrl-C, and what nohup starts ignores the end of a
    terminal; so would the scripts that are tested.
    """
    chosen = config.option.markexpr
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in EXPORTED:
        os.environ.pop(name, None)
    os.environ["GIT_CONFIG_GLOBAL"] = os.devnull  # it may ask for signatures, or run hooks
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def isolated():
    """Each test begins with the same seed, and leaves environment and threads as they were."""
    torch.manual_seed(0)
    n_threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(n_threads)


def golden(name):
    """Arrays of a golden vector, as tensors by name, and its settings; see golden/README.md."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    tensors = {}
    for key in arrays.files:
        if key != "meta":
            tensors[key] = torch.from_numpy(np.asarray(arrays[key]))
    return tensors, json.loads(str(arrays["meta"]))


def whole_dataset(name):
    """The folder of a whole dataset, for tests marked slow.

    Where it is not there, the test is skipped, and with CI set it fails.
    """
    folder = DATA / "data" / name
    if not folder.exists():
        reason = f"{folder} is not there: DMEL_TEST_DATA names the folder that holds data/"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


def write_audio_mnist(folder, speakers=("28", "12", "26"), repetitions=2):
    """A few tones in AudioMNIST's layout: 48 kHz, of different lengths."""
    for speaker in speakers:
        (folder / "data" / speaker).mkdir(parents=True)
        for repetition in range(repetitions):
            n_samples = 24000 + 4800 * repetition
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / 48000)
            path = folder / "data" / speaker / f"7_{speaker}_{repetition}.wav"
            soundfile.write(path, tone, 48000, subtype="FLOAT")
    return folder


def write_esc50(folder, n=3):
    """A few tones in ESC-50's layout: 44.1 kHz, 5 s, in the left of two channels."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100 * 5) / 44100)
    samples = np.stack([tone, 0 * tone], axis=1)

    rows = []
    for i in range(n):
        fold = i % 5 + 1
        name = f"{fold}-{100 + i}-A-{i}.wav"
        rows.append([name, fold, i, "tone", "False", 100 + i, "A"])
        soundfile.write(folder / "audio" / name, samples, 44100)
    write_esc50_table(folder, rows)
    return folder


def write_esc50_table(folder, rows):
    columns = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "meta" / "esc50.csv", index=False)


def write_digits(folder):
    """60 sounds in AudioMNIST's layout, one for each of six speakers and ten digits.

    They are made here: 8 kHz, 16 bit, each digit a pitch of its own in noise. Lengths are 0.3 to
    1.2 s, so that some are padded and some are cut. The speakers are four to train on, one to
    validate and one to test.
    """
    random = np.random.default_rng(0)
    for speaker in ("07", "12", "19", "26", "28", "56"):
        (folder / "data" / speaker).mkdir(parents=True)
        for digit in range(10):
            n = np.arange(random.integers(2400, 9600))
            tone = np.sin(2 * np.pi * 200 * (digit + 1) * n / 8000)
            samples = 0.2 * tone + 0.02 * random.standard_normal(len(n))
            path = folder / "data" / speaker / f"{digit}_{speaker}_0.wav"
            soundfile.write(path, samples, 8000, subtype="PCM_16")
    return folder


def write_sounds(folder):
    """10 sounds in ESC-50's layout, two of each fold, of ten classes: 44.1 kHz, Ogg Vorbis.

    They are made here, of noise in pulses. Lengths are 4.8 to 5.25 s, so that some are padded and
    some are cut.
    """
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    random = np.random.default_rng(0)
    rows = []
    for i in range(10):
        fold = i % 5 + 1
        name = f"{fold}-{100 + i}-A-{i}.ogg"
        rows.append([name, fold, i, "noise", "True", 100 + i, "A"])

        seconds = np.arange(int(44100 * (4.8 + 0.05 * i))) / 44100
        pulses = np.sin(2 * np.pi * (1 + i) * seconds) > 0
        samples = 0.1 * pulses * random.standard_normal(len(seconds))
        soundfile.write(folder / "audio" / name, samples, 44100, format="OGG", subtype="VORBIS")
    write_esc50_table(folder, rows)
    return folder


TINY_SPACES = """

def tiny(max_epochs):
    space = time_frequency(max_epochs)
    return {**space, "n_samples": 300, "init_lambd": tune.grid_search([1.276, 31.9])}


def tiny_uniform(max_epochs):
    drawn = {"init_lambd": tune.uniform(1.0, 30.0), "lr_model": tune.choice([1e-3, 1e-2])}
    return {**tiny(max_epochs), **drawn}


def tiny_failing(max_epochs):
    rates = tune.grid_search([1e-3, 1e38])
    return {**tiny(max_epochs), "init_lambd": 6.38, "trainable": False, "lr_model": rates}


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
    """A copy of the scripts in a folder of its own, with further experiments."""

    def __init__(self, folder, spaces=TINY_SPACES):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for pattern in ("*.py", "*.sh", "*.txt", "*.mplstyle"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
        (folder / "results").mkdir(exist_ok=True)
        shutil.copy(ROOT / "results" / "paper.csv", folder / "results")
        with open(folder / "search_spaces.py", "a") as file:
            file.write(spaces)

    def run(self, *command, check=True, **environment):
        """Runs `python script ...`, `python -m ...` or `sh script ...`.

        Returns the finished process, its output as text.
        """
        program = sys.executable
        if Path(command[0]).suffix == ".sh":
            program = "sh"
        changes = {key: str(value) for key, value in environment.items()}
        result = subprocess.run(
            [program, *map(str, command)],
            cwd=self.folder,
            env=os.environ | {"DMEL_PYTHON": sys.executable} | changes,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if check:
            output = result.stdout[-3000:] + result.stderr[-3000:]
            assert result.returncode == 0, output
        return result


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))
