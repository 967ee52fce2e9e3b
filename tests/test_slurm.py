"""The job scripts of docs/cluster.md, with stand-ins for what Slurm brings."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Project

import cluster
import main

PAGE = (ROOT / "docs" / "cluster.md").read_text()
ONE_NODE, SEVERAL_NODES = re.findall(
    r"^```sh\n(#!/bin/sh\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE
)
JOB = str(os.getpid())  # of whose number the script makes a port
FOLDER = Path(f"/tmp/dmel-{JOB}")  # of Ray, in the script

SCONTROL = """
case "$1" in
show) printf 'localhost\\nsecond\\n' ;;
requeue) echo "$2" >>requeued ;;
esac
"""
# Runs on this machine what Slurm would run on a node; the second node comes late. Two Rays on one
# machine must not want the same port, nor all of its memory.
SRUN = """
echo "$*" >>steps
[ ! -e no_nodes ] || exit 1
case "$*" in *=second*) sleep 15 ;; esac
while [ "$1" != ray ]; do shift; done
echo "$$" >>pids
exec "$@" --object-store-memory=100000000 --dashboard-agent-listen-port=0
"""


class Job:
    """A job script that runs in a folder, as Slurm would run it."""

    def __init__(self, folder, script, environment):
        self.folder = folder
        (folder / "job.sh").write_text(script)
        with open(folder / "job.log", "w") as log:  # not a pipe, as the steps outlast the script
            self.script = subprocess.Popen(
                ["sh", "job.sh"], cwd=folder, env=environment, stdout=log, stderr=log
            )

    def output(self):
        return (self.folder / "job.log").read_text()

    def wait_for(self, file_name):
        """Waits until the job has written a file."""
        file = self.folder / file_name
        deadline = time.monotonic() + 30
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def end(self):
        """Ends the script, and what it has left, as Slurm does when the script has ended."""
        pids = self.folder / "pids"
        processes = [self.script]
        for pid in pids.read_text().split() if pids.exists() else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        for process in processes:
            process.terminate()
        self.script.wait(30)
        for process in psutil.wait_procs(processes[1:], timeout=30)[1]:
            process.kill()


@pytest.fixture
def job(tmp_path):
    """A function that starts a job script in a copy of the scripts, and returns its Job."""
    project = Project(tmp_path / "project")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/bin/sh\n{text}")
        stand_in.chmod(0o755)
    activate = project.folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={os.path.dirname(sys.executable)}:$PATH\n")

    def start(script, stand_in=None, **settings):
        """stand_in: what run_experiments.sh does instead."""
        if stand_in:
            (project.folder / "run_experiments.sh").write_text(f"{stand_in}\n")
        slurm = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_MEM_PER_NODE": "5000",  # MB
            "DMEL_PYTHON": sys.executable,
            "HOME": str(tmp_path),  # where Ray keeps its token
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }
        started.append(Job(project.folder, script, os.environ | slurm | settings))
        return started[-1]

    started = []
    yield start
    for job in started:
        job.end()
    shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.mark.parametrize("script", [ONE_NODE, SEVERAL_NODES])
def test_a_node_of_a_job_fits_the_trials_of_its_gpus(script):
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    at_once = int(asked["gpus-per-node"]) / main.RESOURCES_PER_TRIAL["gpu"]
    assert int(asked["cpus-per-task"]) == at_once * main.RESOURCES_PER_TRIAL["cpu"]
    memory = int(asked["mem"].removesuffix("G")) * 2**30
    needed = at_once * cluster.MEMORY_OF_TRIAL + cluster.MEMORY_OF_RAY
    assert 1e9 < memory - needed < 4e9  # main.py takes some itself


def test_a_job_whose_time_ends_is_queued_again(job):
    running = job(ONE_NODE, stand_in="echo $$ >>pids; exec sleep 100")
    running.wait_for("pids")
    running.script.send_signal(signal.SIGUSR1)
    running.wait_for("requeued")
    assert (running.folder / "requeued").read_text().split() == [JOB]


@pytest.mark.slow
def test_several_nodes_train_together(job):
    running = job(SEVERAL_NODES, EXPERIMENTS="time_frequency", MAX_EPOCHS="1")
    status = running.script.wait(timeout=300)
    output = running.output()
    assert status == 0, output
    assert "2 trials at a time, 1 CPUs each and about 2 GB of memory" in output
    assert "time_frequency: all trials are finished" in output
    trials = running.folder / "ray_results" / "time_frequency" / "trials"
    assert len(list(trials.glob("*.pt"))) == 6

    head, others = (running.folder / "steps").read_text().splitlines()
    assert head.startswith("--nodes=1 --ntasks=1 --nodelist=localhost ")
    assert others.startswith("--nodes=1 --ntasks=1 --nodelist=second ")


@pytest.mark.slow
def test_a_job_ends_where_ray_does_not_start(job, tmp_path):
    (tmp_path / "project" / "no_nodes").touch()
    running = job(SEVERAL_NODES.replace("+ 300", "+ 3"))
    assert running.script.wait(timeout=60) != 0
    assert "0 of 1 nodes have joined Ray at localhost:2" in running.output()
    assert "to train" not in running.output()
