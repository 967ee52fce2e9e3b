"""Where the optional test data lies, and a copy of the scripts to run as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DMEL_TEST_DATA", ROOT.parent / "shared"))  # golden/ and data/

sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        items[:], slow = [
            [item for item in items if bool(item.get_closest_marker("slow")) == is_slow] for is_slow in (False, True)
        ]
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
        for pattern in ("*.py", "*.sh", "*.txt"):
            for path in ROOT.glob(pattern):
                shutil.copy(path, folder)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
        with open(folder / "search_spaces.py", "a") as file:
            file.write(spaces)

    def run(self, *command, check=True, **environment):
        """Runs `python script ...`, `python -m ...` or `sh script ...`; the finished process, its output as text."""
        program = "sh" if Path(command[0]).suffix == ".sh" else sys.executable
        result = subprocess.run(
            [program, *map(str, command)],
            cwd=self.folder,
            env=os.environ | {"DMEL_PYTHON": sys.executable} | {key: str(value) for key, value in environment.items()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("project"))
