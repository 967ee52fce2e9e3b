"""Whatever happens to a run, the same command continues it and the results are those of an undisturbed run."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import Project
from runs import Run, assert_same, workers_of

STEADY = """

def steady(max_epochs):
    return {**time_frequency(max_epochs), "n_samples": 1500, "init_lambd": tune.grid_search([1.276, 31.9])}


def diverging(max_epochs):
    return {**steady(max_epochs), "init_lambd": 6.38, "trainable": False, "lr_model": tune.grid_search([1e-3, 1e38])}
"""
EPOCHS = 18
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("interrupted"), STEADY)


@pytest.fixture(scope="module")
def undisturbed(project):
    run = Run(project, "undisturbed", "steady", EPOCHS)
    run.finish()
    return run


def cluster_folder(family):
    """The folder of a private Ray cluster, of whose processes the first one guards it."""
    (command,) = (member.cmdline() for member in family if member.name() == "sh")
    return Path(command[-1])


def test_signals_and_killed_processes(project, undisturbed):
    run = Run(project, "signals", "steady", EPOCHS)
    for what in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, "gcs_server", "power cut"):
        process = run.start()
        run.wait_for_epochs(process, 5)
        family = psutil.Process(process.pid).children(recursive=True)
        folder = cluster_folder(family)
        assert folder.stat().st_mode & 0o777 == 0o700
        if what == "power cut":
            for member in [psutil.Process(process.pid), *family]:
                member.kill()
            shutil.rmtree(folder)
        elif what == "gcs_server":
            next(member for member in family if member.name() == what).kill()
        else:
            process.send_signal(what)
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0
        if what in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert output.strip().splitlines()[-1] == "main.py: interrupted: the same command continues."
            assert "Traceback" not in output
        elif what == "gcs_server":
            assert output.strip().splitlines()[-1].startswith("main.py: a process of Ray ended")
        assert not psutil.wait_procs(family, timeout=15)[1], what  # nothing goes on writing
        assert not folder.exists()
    assert run.n_reported() < 4 * EPOCHS  # some work was left to do
    finish = run.start()
    assert finish.wait(timeout=200) == 0
    assert_same(run, undisturbed)
    shutil.rmtree(run.folder / "ray")  # a log that nothing depends on
    assert "all trials are finished" in run.finish().stdout and not (run.folder / "ray").exists()
    del run.table
    assert_same(run, undisturbed)


def test_a_killed_worker_starts_again_within_the_run(project, undisturbed):
    run = Run(project, "worker", "steady", EPOCHS)
    process = run.start()
    run.wait_for_epochs(process, 6)
    workers_of(process)[0].kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert_same(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; where it cannot be had, the test is skipped, in CI it fails."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_costs_no_epoch_that_is_written(project, undisturbed, small_disk):
    run = Run(project, small_disk, "steady", EPOCHS, ["--max_failures=0"])
    process = run.start()
    run.wait_for_epochs(process, 8)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(2**12))
    output = process.communicate(timeout=200)[0]
    assert process.returncode in (1, 3)
    assert output.strip().splitlines()[-1].startswith("main.py: ") and "No space left on device" in output
    written = run.n_reported()
    assert 8 <= written < 4 * EPOCHS
    filler.unlink()
    run.finish()
    assert_same(run, undisturbed)


def test_a_loss_that_is_no_number_ends_that_trial_alone(project, tmp_path):
    run = Run(project, "diverging", "diverging", EPOCHS)
    temporary = tmp_path / ("long" * 15)  # where Ray's sockets would not fit
    temporary.mkdir()
    result = run.finish(check=False, TMPDIR=temporary)
    assert result.returncode == 3
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("main.py:"))
    assert "1 trials of diverging failed: FloatingPointError: epoch 1: training loss" in message
    assert "'lr_model': 1e+38" in message
    table = run.table
    assert table["config/lr_model"].tolist() == [1e-3] and table["training_iteration"].tolist() == [EPOCHS]
    assert "left out of 2 trials: 1 failed, 0 not finished" in run.test_output
    (reason,) = (run.folder / "trials").glob("*.txt")
    assert "FloatingPointError" in reason.read_text()


def test_restart_moves_the_old_folder_aside(project, undisturbed):
    run = Run(project, "restarted", "steady", 1, ["--restart"])
    shutil.copytree(undisturbed.results, run.results)
    before = {path.relative_to(run.folder): path.read_bytes() for path in files_below(run.folder)}
    result = run.finish()
    (aside,) = (path for path in run.results.iterdir() if path.is_dir() and path.name != "steady")
    assert aside.name in result.stdout
    assert {path.relative_to(aside): path.read_bytes() for path in files_below(aside)} == before
    assert [len(history) for history in run.histories().values()] == [1, 1, 1, 1]
    tables = project.run("produce_tables.py", f"--ray_results_dir={run.results}").stdout
    assert "% steady: no results yet" in tables and aside.name not in tables


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]
