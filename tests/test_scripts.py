"""The shell scripts as subprocesses.

The whole chain, with a download from local git repositories, wrong calls, and the environment.
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
    esc10 = whole_dataset("ESC-10")
    spoken_digits = whole_dataset("AudioMNIST")
    folder = tmp_path_factory.mktemp("repositories")

    esc50 = folder / "ESC-50"
    (esc50 / "audio").mkdir(parents=True)
    (esc50 / "meta").mkdir()
    header, *rows = (esc10 / "meta" / "esc50.csv").read_text().splitlines()
    kept = rows[::20]
    (esc50 / "meta" / "esc50.csv").write_text("\n".join([header, *kept]) + "\n")
    for row in kept:
        file_name = row.split(",")[0]
        shutil.copy(esc10 / "audio" / file_name, esc50 / "audio")

    audio_mnist = folder / "AudioMNIST"
    for recording in sorted(spoken_digits.glob("data/*/*_[0-3].wav")):
        target = audio_mnist / "data" / recording.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(recording, target)

    return {"ESC50_URL": publish(esc50), "AUDIO_MNIST_URL": publish(audio_mnist)}


def publish(folder):
    """Makes a bare git repository of a folder and returns its URL."""
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "recordings"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    subprocess.run([*GIT, "clone", "-q", "--bare", folder, f"{folder}.git"], check=True)
    return f"file://{folder}.git"


@pytest.mark.slow
def test_whole_reproduction(project, repositories):
    convergence_rate = project.folder / "convergence_rate.py"  # of fewer rates and signals
    text = convergence_rate.read_text()
    for rates, one in (("[30, 100, 300]", "[30]"), ("[0.1, 0.3, 1.0]", "[0.1]"), ("=50,", "=5,")):
        assert rates in text
        text = text.replace(rates, one)
    convergence_rate.write_text(text)

    names = {"audio_mnist": 6, "esc50": 6, "tiny_folds": 2}
    settings = {"MAX_EPOCHS": 1, "RAY_RESULTS_DIR": "results", **repositories}
    output = project.run("doit.sh", **settings, EXPERIMENTS=" ".join(names)).stdout
    assert "Needs: " in output and "there is no CUDA device" in output
    assert "esc50: 20 clips of 5 s" in output and "audio_mnist: 240 clips of 1 s" in output
    for name, n_trials in names.items():
        table = project.folder / "results" / name / f"{name}.csv"
        assert len(pd.read_csv(table)) == n_trials
        assert f"results/{name}/{name}.csv" in output

    tables = (project.folder / "results" / "tables.txt").read_text()
    assert tables in output
    for part in ("| CNN6 | 35 ms |", "| LNet | 300 ms |", "Claims of the paper"):
        assert part in tables
    figures = {path.stem for path in (project.folder / "results" / "figures").glob("*.png")}
    expected = {"dmel", "accuracy", "convergence", "confusion", "time_complexity", "before_after"}
    assert figures == expected  # no time_frequency here

    settings["ESC50_URL"] = "nowhere"
    again = project.run("doit.sh", "quick", **settings, EXPERIMENTS="esc50").stdout
    assert "esc50: in " in again
    assert "esc50: all trials are finished" in again
    assert "init_lambd" not in again
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
    assert result.returncode != 0
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_shellcheck_finds_nothing(tmp_path):
    """Neither in the scripts nor in the whole scripts that stand on the pages."""
    scripts = [*ROOT.glob("*.sh"), ROOT / ".ci" / "run"]
    for page in ROOT.glob("docs/*.md"):
        found = re.findall(r"^```sh\n(#!.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for i, text in enumerate(found):
            script = tmp_path / f"{page.stem}_{i}.sh"
            script.write_text(text)
            scripts.append(script)
    assert len(scripts) > 7

    # It lies beside the Python that it was installed for.
    places = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=places)
    command = [shellcheck, "--exclude=SC1091", *scripts]  # .venv/bin/activate is not its matter
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_full_run_without_network_ends_before_training(project, tmp_path):
    settings = {
        "DATA_DIR": tmp_path,
        "RAY_RESULTS_DIR": tmp_path / "results",
        "ESC50_URL": "file:///nowhere.git",
        "AUDIO_MNIST_URL": "file:///nowhere.git",
    }
    result = project.run("doit.sh", check=False, **settings)
    assert result.returncode != 0
    assert "doit.sh quick" in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "results").exists()


def test_results_of_the_whole_chain_go_to_a_folder(project):
    result = project.run("doit.sh", check=False, RAY_RESULTS_DIR="s3://bucket/results?region=x")
    assert result.returncode == 1
    assert result.stderr == (
        "doit.sh: RAY_RESULTS_DIR=s3://bucket/results?region=x must be a folder; "
        "the other scripts take a URI.\n"
    )


def test_experiments_that_failed_and_that_were_refused_are_both_named(project, tmp_path):
    """A stand-in for main.py ends with the exit code that the name of the experiment says."""
    script = 'for flag; do case $flag in --name=*_*) exit "${flag##*_}" ;; esac; done'
    stand_in(tmp_path, "python", script)
    settings = {"DMEL_PYTHON": tmp_path / "python"}
    for names, code, told in (
        ("a_0 b_3 c_1 d_3", 1, ["failed, as said above: b_3 d_3.", "end, as said above: c_1."]),
        ("a_3 b_0", 3, ["failed, as said above: a_3."]),
        ("a_3 b_130 c_0", 130, ["failed, as said above: a_3."]),
        ("a_0 b_0", 0, []),
    ):
        result = project.run("run_experiments.sh", check=False, EXPERIMENTS=names, **settings)
        assert result.returncode == code
        lines = result.stderr.splitlines()
        assert len(lines) == len(told)
        for line, expected in zip(lines, told, strict=True):
            assert line.endswith(expected)


def environment_script(tmp_path, **environment):
    """Sources python_env.sh in a copy of the project.

    Where environment has a PATH, stand-ins for python3 and pip come first in it.
    """
    for name in ("python_env.sh", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return subprocess.run(
        ["sh", "-eu", "-c", f'here={tmp_path}; . "$here/python_env.sh"; echo "chosen $PYTHON"'],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )


def test_active_environment_is_used_where_it_has_the_pins(tmp_path):
    active = os.path.dirname(os.path.dirname(sys.executable))
    result = environment_script(tmp_path, VIRTUAL_ENV=active)
    assert result.returncode == 0
    assert f"chosen {sys.executable}" in result.stdout
    assert f"Using {sys.executable} (Python 3." in result.stdout


@pytest.mark.parametrize(("change", "is_used"), [("{}+cpu", True), ("{}.1+cpu", False)])
def test_cpu_wheels_of_the_pinned_version_count(tmp_path, old_pythons, change, is_used):
    pin = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    version = change.format(pin)
    package = tmp_path / "packages" / f"torch-{version}.dist-info"
    package.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    (package / "METADATA").write_text(text)

    active = os.path.dirname(os.path.dirname(sys.executable))
    environment = {"VIRTUAL_ENV": active, "PYTHONPATH": str(package.parent), "PATH": old_pythons}
    result = environment_script(tmp_path, **environment)
    assert (f"chosen {sys.executable}" in result.stdout) == is_used
    assert (result.returncode == 0) == is_used  # otherwise it looks for another Python


def stand_in(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python")
TOOLS = ("sh", "cat", "cmp", "cp", "mkdir", "rm")  # what python_env.sh and the stand-ins need


@pytest.fixture
def old_pythons(tmp_path):
    """A PATH whose Pythons are too old, and which has no uv."""
    script = 'case "$*" in --version) echo "Python 3.9.2" ;; *) exit 1 ;; esac'
    for name in PYTHONS:
        stand_in(tmp_path / "bin", name, script)
    for name in TOOLS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return str(tmp_path / "bin")


def test_only_an_older_python_is_said_in_one_sentence(tmp_path, old_pythons):
    result = environment_script(tmp_path, PATH=old_pythons)
    assert result.returncode != 0
    assert "needs Python 3.11, 3.12, 3.13 or 3.14, and here is Python 3.9.2" in result.stderr
    assert result.stderr.strip().count("\n") == 0 and not (tmp_path / ".venv").exists()


def test_uv_brings_a_python_where_none_is_new_enough(tmp_path, old_pythons):
    stand_in(tmp_path / "bin", "new_python", "echo Python 3.13.0")
    uv = f"""
for target; do :; done
mkdir -p "$target/bin"
cp {tmp_path}/bin/new_python "$target/bin/python"
echo "$*" >"$HOME/uv"
"""
    stand_in(tmp_path / "bin", "uv", uv)

    result = environment_script(tmp_path, PATH=old_pythons)
    assert result.returncode == 0, result.stderr
    assert f"chosen {tmp_path}/.venv/bin/python" in result.stdout
    flags = "--quiet --clear --seed --python 3.13"
    assert (tmp_path / "uv").read_text().strip() == f"venv {flags} {tmp_path}/.venv"


def test_the_versions_of_python_are_the_same_everywhere():
    script = (ROOT / "python_env.sh").read_text()
    requirements = (ROOT / "requirements.txt").read_text()
    readme = (ROOT / "README.md").read_text()

    limits = re.search(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", script)
    first, last = map(int, limits.groups())
    *others, newest = [f"3.{minor}" for minor in range(first, last + 1)]
    assert f"This needs Python {', '.join(others)} or {newest}," in script
    assert f"install on Python {', '.join(others)} and {newest}." in requirements
    assert re.search(r"for candidate in (.*); do", script)[1].split() == list(PYTHONS)
    assert others[0] in readme and newest in readme
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tested = re.search(r"python: \[(.*)\]", workflow)[1]
    assert re.findall(r'"(.*?)"', tested) == [*others, newest]


def test_environment_is_made_once_and_again_when_requirements_change(tmp_path):
    python = """
case "$*" in
*"-m venv"*)
    echo "$4" >>"$HOME/venv"
    rm -f "$HOME/cut"
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python" ;;
*"-m pip"*) echo "$*" >>"$HOME/pip" ;;
*"import pip"*) [ ! -e "$HOME/cut" ] ;;
esac
"""
    stand_in(tmp_path / "bin", "python3", python)
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for _ in range(2):
        result = environment_script(tmp_path, PATH=path)
        assert result.returncode == 0
        assert f"chosen {tmp_path}/.venv/bin/python" in result.stdout
        (command,) = (tmp_path / "pip").read_text().splitlines()
        assert command.endswith(" -c constraints.txt -r requirements.txt")

    for n_installed, name in enumerate(("requirements.txt", "constraints.txt"), 2):
        (tmp_path / ".venv" / f"installed-{name}").write_text("of an earlier version")
        environment_script(tmp_path, PATH=path)
        assert len((tmp_path / "pip").read_text().splitlines()) == n_installed

    (tmp_path / "cut").touch()  # as if the making of .venv had been cut off before it had pip
    assert environment_script(tmp_path, PATH=path).returncode == 0
    assert (tmp_path / "venv").read_text().splitlines() == [f"{tmp_path}/.venv"] * 2


@pytest.mark.slow
def test_failed_trials_do_not_stop_the_rest_and_results_can_lie_at_a_uri(project, tmp_path):
    temporary = tmp_path / ("long" * 15)  # where Ray's sockets would not fit
    temporary.mkdir()
    uri = f"file://{tmp_path}/results"
    settings = {"MAX_EPOCHS": 1, "RAY_RESULTS_DIR": uri, "TMPDIR": temporary}

    settings["EXPERIMENTS"] = "tiny_failing tiny"
    result = project.run("run_experiments.sh", "--max_failures=1", check=False, **settings)
    assert result.returncode == 3
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("main.py:"))
    reason = "FloatingPointError: epoch 1: training loss"
    assert f"1 trials of tiny_failing failed: {reason}" in message
    assert "'lr_model': 1e+38" in message
    (failure,) = (tmp_path / "results" / "tiny_failing" / "trials").glob("*.txt")
    assert reason in failure.read_text()
    assert "tiny: all trials are finished" in result.stdout
    assert "run_experiments.sh: trials failed, as said above: tiny_failing." in result.stderr

    settings["EXPERIMENTS"] = "tiny_absent tiny_failing tiny"
    tested = project.run("run_test_predictions.sh", check=False, **settings)
    assert tested.returncode == 1
    assert "predict_test.py: no experiment in" in tested.stderr
    assert "tiny_failing: 1 of 2 trials failed or are not finished" in tested.stdout

    tables = project.run("produce_tables.py", "--ray_results_dir", uri).stdout
    assert "% tiny: 4 trials" in tables
    assert "% tiny_failing: 1 trials, of 2: 1 failed or are not finished" in tables
