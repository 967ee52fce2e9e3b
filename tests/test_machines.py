"""What a process may use of machines that are shared, limited or odd."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import cluster
import machine
import main
from config import InputError

GB = 2**30
V1_UNLIMITED = 2**63 - 4096  # what the kernel says where there is no limit


# CPUs and memory


@pytest.fixture
def machine_root(tmp_path, monkeypatch):
    """A root folder whose /proc and /sys a test writes: files by path, and the machine's memory."""

    def write(files, available=64 * GB):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr("joblib.cpu_count", lambda: 128)
    return write


QUOTAS = {
    "no groups": ({}, 128),
    "v2, none": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 128),
    "v2, a batch job": (
        {
            "proc/self/cgroup": "0::/slurm/job_7/step_0",
            "sys/fs/cgroup/slurm/job_7/cpu.max": "400000 100000",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000",
        },
        4,
    ),
    "v2, one and a half": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"},
        2,
    ),
    "v1, none": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        128,
    ),
    "v1, a container that knows its name outside": (
        {
            "proc/self/cgroup": "5:memory:/docker/1234\n4:cpu,cpuacct:/docker/1234",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        1,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cpus_of_a_quota(machine_root, case):
    files, expected = QUOTAS[case]
    machine_root(files)
    assert machine.cpus() == expected


MEMORIES = {
    "no groups": ({}, 64 * GB),
    "v2, none": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, 64 * GB),
    "v2, files do not count": (
        {
            "proc/self/cgroup": "0::/job/step",
            "sys/fs/cgroup/job/memory.max": 4 * GB,
            "sys/fs/cgroup/job/memory.current": 3 * GB,
            "sys/fs/cgroup/job/memory.stat": f"anon {GB}\ninactive_file {GB}\nactive_file {GB}",
            "sys/fs/cgroup/job/step/memory.max": "max",
        },
        3 * GB,
    ),
    "v1, none": (
        {
            "proc/self/cgroup": "5:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GB,
        },
        64 * GB,
    ),
    "v1, files of all groups": (
        {
            "proc/self/cgroup": "5:memory:/docker/1234",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 3 * GB,
            "sys/fs/cgroup/memory/memory.stat": (
                f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GB}\ntotal_active_file {GB}"
            ),
        },
        3 * GB,
    ),
}


@pytest.mark.parametrize("case", MEMORIES)
def test_memory_below_a_limit(machine_root, case):
    files, expected = MEMORIES[case]
    machine_root(files)
    assert machine.free_memory() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cpus_of_an_affinity():
    one = {min(os.sched_getaffinity(0))}
    result = subprocess.run(
        [sys.executable, "-c", "import machine; print(machine.cpus())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
    )
    assert result.stdout == "1\n", result.stderr


@pytest.mark.parametrize(("asked", "given"), [(None, 3), (7, 7)])
def test_ray_gets_the_cpus_that_may_be_used(monkeypatch, asked, given):
    options = {}
    monkeypatch.setattr(machine, "cpus", lambda: 3)
    monkeypatch.setattr(cluster.ray, "init", lambda **kwargs: options.update(kwargs))
    monkeypatch.setattr(cluster.signal, "signal", lambda *_: None)
    with cluster.connected(None, asked):
        pass
    assert options["num_cpus"] == given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_cpus=0"], r"--num_cpus=0 must be 1 or more"),
        (["--num_cpus=2", "--ray_address=auto"], r"give it to `ray start` .* --num-cpus=2"),
    ],
)
def test_wrong_numbers_of_cpus(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["main.py", "--name=time_frequency", *flags])
    with pytest.raises(InputError, match=message):
        main.main()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_trials_of_a_share_of_the_machine(project):
    """On one CPU one trial runs at a time, and as many as --num_cpus says where it does."""
    one = {min(os.sched_getaffinity(0))}
    for flags, announced in (([], "1 trials"), (["--num_cpus=2"], "2 trials")):
        result = subprocess.run(
            [sys.executable, "main.py", "--name=tiny", "--max_epochs=1", "--restart", *flags],
            cwd=project.folder,
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, one),
        )
        assert result.returncode == 0, result.stderr
        assert f"{announced} at a time, 1 CPUs each" in result.stdout
