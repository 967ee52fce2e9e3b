"""Whatever happens to a run, the same command continues it.

The results are those of trials left alone.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import Project
from runs import Run, is_training

STEADY = """

def steady(max_epochs):
    windows = tune.grid_search([1.276, 31.9])
    return {**time_frequency(max_epochs), "n_samples": 1500, "init_lambd": windows}
"""
EPOCHS = 20
pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MB; where it cannot be had, the test is skipped, in CI it fails."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        if os.environ.get("CI"):
            pytest.fail("only root can mount a small disk")
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(2**12))


def disturb(what, process, family, folder, disk):
    if what == "full disk":
        fill(disk)
    elif what == "power cut":
        for member in [psutil.Process(process.pid), *family]:
            member.kill()
        shutil.rmtree(folder)
    elif what == "gcs_server":
        next(member for member in family if member.name() == what).kill()
    else:
        process.send_signal(what)


INTERRUPTED = "main.py: interrupted: the same command continues."
ENDS = {  # how the output ends, where main.py itself can say so
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: INTERRUPTED,
    signal.SIGHUP: INTERRUPTED,
    signal.SIGKILL: "",
    "gcs_server": "main.py: a process of Ray ended",
    "power cut": "",
    "full disk": "main.py: ",
}


def test_whatever_happens_costs_no_epoch_that_is_written(disk, tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"), STEADY)
    run = Run(project, disk, "steady", EPOCHS, ["--max_failures=1", "--num_cpus=2"])

    for what, end in ENDS.items():
        process = run.start()
        run.wait_for_epochs(process, 4)
        written = run.n_reported()
        family = psutil.Process(process.pid).children(recursive=True)
        (guard,) = (member for member in family if member.name() == "sh")
        folder = Path(guard.cmdline()[-1])  # of the private cluster
        assert folder.stat().st_mode & 0o777 == 0o700

        disturb(what, process, family, folder, disk)
        output = process.communicate(timeout=200)[0]
        assert process.returncode != 0 and output.strip().splitlines()[-1].startswith(end), output
        assert ("No space left on device" in output) == (what == "full disk")
        assert "Traceback" not in output or what in ("full disk", "gcs_server")
        if end == INTERRUPTED:  # the table before it tells no trial finished that is not
            finished = sum(len(state["history"]) == EPOCHS for state in run.states().values())
            table = output.split("\n\n")[-2]
            assert " init_lambd " in table
            assert table.count(" finished ") <= finished

        _, still_running = psutil.wait_procs(family, timeout=15)
        assert not still_running, what  # nothing goes on writing
        assert not folder.exists()
        assert written <= run.n_reported() < 4 * EPOCHS  # some work was left to do
        (disk / "filler").unlink(missing_ok=True)
        shutil.rmtree(run.folder / "ray")  # a log that nothing depends on

    process = run.start()
    run.wait_for_epochs(process, 4)
    family = psutil.Process(process.pid).children(recursive=True)
    next(member for member in family if is_training(member)).kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output  # it started again within the run
    run.assert_undisturbed()
    shutil.rmtree(run.folder / "ray")
    assert "all trials are finished" in run.finish().stdout and not (run.folder / "ray").exists()
