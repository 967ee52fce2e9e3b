"""The shell scripts as subprocesses: download from local git repositories, the whole chain, wrong
calls.
"""

import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, whole_dataset

GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Bare git repositories of a few real recordings in the layouts of ESC-50 and AudioMNIST."""
    folder = tmp_path_factory.mktemp("repositories")
    esc50, audio_mnist = folder / "ESC-50", folder / "AudioMNIST"
    (esc50 / "audio").mkdir(parents=True)
    (esc50 / "meta").mkdir()
    table = (whole_dataset("ESC-10") / "meta" / "esc50.csv").read_text().splitlines()
    kept = table[:1] + table[1::10]
    (esc50 / "meta" / "esc50.csv").write_text("\n".join(kept) + "\n")
    for line in kept[1:]:
        shutil.copy(whole_dataset("ESC-10") / "audio" / line.split(",")[0], esc50 / "audio")
    for recording in sorted(whole_dataset("AudioMNIST").glob("data/*/*_[0-3].wav")):
        target = audio_mnist / "data" / recording.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(recording, target)
    urls = {}
    for variable, repository in (("ESC50_URL", esc50), ("AUDIO_MNIST_URL", audio_mnist)):
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "recordings"]):
            subprocess.run([*GIT, *command], cwd=repository, check=True)
        subprocess.run([*GIT, "clone", "-q", "--bare", repository, f"{repository}.git"], check=True)
        urls[variable] = f"file://{repository}.git"
    return urls


@pytest.mark.slow
def test_whole_reproduction(project, repositories):
    names = {"audio_mnist": 6, "esc50": 6, "tiny_folds": 2}
    settings = repositories | {
        "MAX_EPOCHS": 1,
        "EXPERIMENTS": " ".join(names),
        "RAY_RESULTS_DIR": "results",
    }
    output = project.run("doit.sh", **settings).stdout
    assert "Needs: " in output and "there is no CUDA device" in output
    assert "esc50: 40 clips of 5 s" in output and "audio_mnist: 240 clips of 1 s" in output
    for name, n_trials in names.items():
        table = project.folder / "results" / name / f"{name}.csv"
        assert len(pd.read_csv(table)) == n_trials
        assert f"results/{name}/{name}.csv" in output
    tables = (project.folder / "results" / "tables.txt").read_text()
    assert tables in output
    assert (
        "| CNN6 | 35 ms |" in tables
        and "| LNet | 300 ms |" in tables
        and "Claims of the paper" in tables
    )
    figures = {path.stem for path in (project.folder / "results" / "figures").glob("*.png")}
    assert figures == {
        "dmel",
        "accuracy",
        "convergence",
        "time_complexity",
        "before_after",
    }  # no time_frequency here
    again = project.run(
        "doit.sh", **settings | {"EXPERIMENTS": "esc50", "ESC50_URL": "nowhere"}
    ).stdout
    assert (
        "esc50: in " in again
        and "esc50: all trials are finished" in again
        and "init_lambd" not in again
    )
    assert (project.folder / "results" / "tables.txt").read_text() == tables


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("doit.sh", "fast", "the only one is quick"),
        ("download_data.sh", "esc51", "there are audio_mnist and esc50"),
    ],
)
def test_wrong_arguments(project, script, argument, message):
    result = project.run(script, argument, check=False)
    assert (
        result.returncode != 0
        and message in result.stderr
        and result.stderr.strip().count("\n") == 0
    )


def test_full_run_without_network_ends_before_training(project, tmp_path):
    urls = {"ESC50_URL": "file:///nowhere.git", "AUDIO_MNIST_URL": "file:///nowhere.git"}
    result = project.run(
        "doit.sh", check=False, DATA_DIR=tmp_path, RAY_RESULTS_DIR=tmp_path / "results", **urls
    )
    assert result.returncode != 0 and "doit.sh quick" in result.stderr
    assert result.stderr.strip().count("\n") == 0 and not (tmp_path / "results").exists()


def environment_script(tmp_path, **environment):
    """Sources python_env.sh in a copy of the project, with stand-ins for python3 and pip first in
    the PATH.
    """
    for name in ("python_env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return subprocess.run(
        ["sh", "-eu", "-c", f'here={tmp_path}; . "$here/python_env.sh"; echo "chosen $PYTHON"'],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )


def test_active_environment_is_used_where_it_has_the_pins(tmp_path):
    result = environment_script(
        tmp_path, VIRTUAL_ENV=os.path.dirname(os.path.dirname(sys.executable))
    )
    assert result.returncode == 0 and f"chosen {sys.executable}" in result.stdout
    assert f"Using {sys.executable} (Python 3." in result.stdout


def stand_in(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python")


@pytest.fixture
def old_pythons(tmp_path):
    """A PATH whose Pythons are too old."""
    for name in PYTHONS:
        stand_in(
            tmp_path / "bin",
            name,
            'case "$*" in --version) echo "Python 3.9.2" ;; *) exit 1 ;; esac',
        )
    return f"{tmp_path / 'bin'}:/usr/bin:/bin"


def test_only_an_older_python_is_said_in_one_sentence(tmp_path, old_pythons):
    result = environment_script(tmp_path, PATH=old_pythons)
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12, 3.13 or 3.14, and here is Python 3.9.2" in result.stderr
    assert result.stderr.strip().count("\n") == 0 and not (tmp_path / ".venv").exists()


def test_uv_brings_a_python_where_none_is_new_enough(tmp_path, old_pythons):
    stand_in(tmp_path / "bin", "new_python", "echo Python 3.13.0")
    uv = f'for target; do :; done; mkdir -p "$target/bin"; cp {tmp_path}/bin/new_python "$target/bin/python"'
    stand_in(tmp_path / "bin", "uv", f'{uv}; echo "$*" >"$HOME/uv"')
    result = environment_script(tmp_path, PATH=old_pythons)
    assert result.returncode == 0, result.stderr
    assert f"chosen {tmp_path}/.venv/bin/python" in result.stdout
    assert (
        tmp_path / "uv"
    ).read_text().strip() == f"venv --quiet --clear --seed --python 3.13 {tmp_path}/.venv"


def test_the_versions_of_python_are_the_same_everywhere():
    script, requirements = (
        (ROOT / name).read_text() for name in ("python_env.sh", "requirements.txt")
    )
    first, last = map(
        int, re.search(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", script).groups()
    )
    versions = [f"3.{minor}" for minor in range(first, last + 1)]
    assert f"This needs Python {', '.join(versions[:-1])} or {versions[-1]}," in script
    assert f"install on Python {', '.join(versions[:-1])} and {versions[-1]}." in requirements
    assert re.search(r"for candidate in (.*); do", script)[1].split() == list(PYTHONS)
    assert all(
        version in (ROOT / "README.md").read_text() for version in (versions[0], versions[-1])
    )


def test_environment_is_made_once_and_again_when_requirements_change(tmp_path):
    made = '*"-m venv"*) echo "$4" >>"$HOME/venv"; rm -f "$HOME/cut"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;'
    rest = '*"-m pip"*) echo "$*" >>"$HOME/pip" ;; *"import pip"*) [ ! -e "$HOME/cut" ] ;;'
    stand_in(tmp_path / "bin", "python3", f'case "$*" in {made} {rest} esac')
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for installations in (1, 1):
        result = environment_script(tmp_path, PATH=path)
        assert result.returncode == 0 and f"chosen {tmp_path}/.venv/bin/python" in result.stdout
        assert len((tmp_path / "pip").read_text().splitlines()) == installations
    (tmp_path / ".venv" / "installed-requirements.txt").write_text("of an earlier version")
    environment_script(tmp_path, PATH=path)
    assert len((tmp_path / "pip").read_text().splitlines()) == 2
    (tmp_path / "cut").touch()  # as if the making of .venv had been cut off before it had pip
    assert environment_script(tmp_path, PATH=path).returncode == 0
    assert (tmp_path / "venv").read_text().splitlines() == [f"{tmp_path}/.venv"] * 2


@pytest.mark.slow
def test_failed_trials_do_not_stop_the_rest_and_results_can_lie_at_a_uri(project, tmp_path):
    temporary = tmp_path / ("long" * 15)  # where Ray's sockets would not fit
    temporary.mkdir()
    settings = {
        "EXPERIMENTS": "tiny_failing tiny",
        "MAX_EPOCHS": 1,
        "RAY_RESULTS_DIR": f"file://{tmp_path}/results",
    }
    result = project.run(
        "run_experiments.sh", "--max_failures=1", check=False, TMPDIR=temporary, **settings
    )
    assert result.returncode == 3
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("main.py:"))
    reason = "FloatingPointError: epoch 1: training loss"
    assert (
        f"1 trials of tiny_failing failed: {reason}" in message and "'lr_model': 1e+38" in message
    )
    (told,) = (tmp_path / "results" / "tiny_failing" / "trials").glob("*.txt")
    assert reason in told.read_text()
    assert "tiny: all trials are finished" in result.stdout
    assert "run_experiments.sh: trials failed, as said above: tiny_failing." in result.stderr
    settings["EXPERIMENTS"] = "tiny_absent tiny_failing tiny"
    tested = project.run("run_test_predictions.sh", check=False, **settings)
    assert tested.returncode == 1 and "predict_test.py: no experiment in" in tested.stderr
    output = tested.stdout
    assert "tiny_failing: 1 of 2 trials failed or are not finished" in output
    tables = project.run(
        "produce_tables.py", "--ray_results_dir", settings["RAY_RESULTS_DIR"]
    ).stdout
    assert (
        "% tiny: 4 trials" in tables
        and "% tiny_failing: 1 trials, of 2: the others failed" in tables
    )
