"""What a process may use of machines that are shared, limited or odd."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, Project
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

import cluster
import datasets
import machine
import main
import predict_test
import results
import search_spaces
import train
from config import InputError, check_space, draw, parse, plain
from results import Experiment

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


# Trials at a time


def nodes(*resources):
    return [{"Alive": True, "Resources": each} for each in resources]


AT_ONCE = [  # machines, flags, trials, CPUs of each
    ([{"CPU": 16.0, "memory": 1.5e9}], {}, 1, 1),  # one has to do with what is there
    ([{"CPU": 16.0, "memory": 7e9}], {}, 3, 1),
    ([{"CPU": 16.0, "memory": 7e9}, {"CPU": 2.0, "memory": 1e9}], {}, 3, 1),
    ([{"CPU": 16.0, "memory": 64e9}], {}, 16, 1),
    ([{"CPU": 16.0, "GPU": 4.0}], {"gpus": 0.6}, 4, 4),
    ([{"CPU": 16.0, "GPU": 4.0}], {"gpus": 0.5}, 8, 2),
    ([{"CPU": 16.0, "GPU": 4.0}], {"gpus": 0.3}, 12, 1),
    ([{"CPU": 64.0, "GPU": 4.0}], {"gpus": 1 / 3}, 12, 4),
    ([{"CPU": 64.0, "GPU": 1.0}], {"gpus": 1 / 7}, 7, 4),  # Ray rounds it down: tried
    ([{"CPU": 64.0, "GPU": 1.0}], {"gpus": 0.3334}, 2, 4),
    ([{"CPU": 64.0, "GPU": 4.0}], {"gpus": 3.0}, 1, 4),
    ([{"CPU": 64.0, "GPU": 4.0}], {"gpus": 2.0}, 2, 4),
    ([{"CPU": 4.0, "GPU": 4.0}], {"gpus": 0.6, "cpus": 2.0}, 2, 2),  # CPUs are narrower
    ([{"CPU": 2.0, "GPU": 4.0}], {"gpus": 0.25}, 2, 1),
    ([{"CPU": 64.0, "GPU": 4.0, "memory": 9e9}], {"gpus": 0.25}, 4, 4),  # memory is narrower
]


@pytest.mark.parametrize("case", AT_ONCE)
def test_what_is_announced_is_what_fits(case, monkeypatch, capsys):
    machines, flags, n_trials, n_cpus = case
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes(*machines))
    trial = cluster.resources(main.RESOURCES_PER_TRIAL, **flags)
    announced = capsys.readouterr().out
    assert f", {n_trials} trials at a time, {n_cpus} CPUs each" in announced
    assert trial["cpu"] == n_cpus
    has_memory = "memory" in machines[0]
    assert ("about 2 GB of memory" in announced) == ("memory" in trial) == has_memory
    assert trial.get("memory", 0) <= min(2e9, machines[0].get("memory", 0))


@pytest.mark.parametrize("gpus", [1.5, 0.00001])
def test_shares_of_gpus_that_ray_refuses(gpus, monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes({"CPU": 16.0, "GPU": 4.0}))
    with pytest.raises(InputError, match=rf"--gpus_per_trial={gpus:g} must be"):
        cluster.resources(main.RESOURCES_PER_TRIAL, gpus=gpus)


@pytest.mark.parametrize(("available", "n_gpus"), [(False, 0), (True, 3)])
def test_ray_gets_the_gpus_of_torch_and_the_memory_that_is_free(monkeypatch, available, n_gpus):
    options = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(machine, "free_memory", lambda: 7 * 10**9)
    monkeypatch.setattr(cluster.ray, "init", lambda **kwargs: options.update(kwargs))
    monkeypatch.setattr(cluster.signal, "signal", lambda *_: None)
    with cluster.connected():
        pass
    assert options["num_gpus"] == n_gpus and options["_memory"] == 5 * 10**9


def test_a_trial_that_is_killed_for_memory_counts_as_one_that_died():
    """Ray Tune starts it again then; it would end the experiment of an OutOfMemoryError."""
    task = mock.MagicMock()
    error = OutOfMemoryError("Task was killed due to the node running low on memory.")
    with cluster.restart_where_memory_ends():
        RayActorManager._actor_task_failed(
            mock.MagicMock(), tracked_actor_task=task, exception=error
        )
    ((_, reported),) = [call.args for call in task._on_error.call_args_list]
    assert isinstance(reported, RayActorError) and "--cpus_per_trial" in str(reported)
    with pytest.raises(RuntimeError):  # as Ray has it, without
        RayActorManager._actor_task_failed(
            mock.MagicMock(), tracked_actor_task=task, exception=error
        )


HUNGRY = """

trained = train


def train(*args, **kwargs):
    marker = Path(__file__).with_name("was_hungry")
    if not marker.exists():
        marker.touch()
        held = []
        for _ in range(100):
            held.append(b"x" * 10**8)
            time.sleep(0.05)
        raise RuntimeError("nothing ended it")
    return trained(*args, **kwargs)
"""


def hungry_project(folder):
    """A project whose first trial takes memory until something ends it, and then no trial does."""
    project = Project(folder)
    script = project.folder / "train.py"
    script.write_text(f"from pathlib import Path\n{script.read_text()}{HUNGRY}")
    return project


def assert_hunger_cost_nothing(project, result):
    """Asserts that a trial was killed, started again, and that all of them came to their end."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert (project.folder / "was_hungry").exists()
    experiment = Experiment(project.folder / "ray_results", "tiny")
    states = dict(experiment.read_trials(experiment.trial_keys()))
    assert [len(state["history"]) for state in states.values()] == [2] * 4
    starts = (project.folder / "ray_results" / "tiny" / "ray").rglob("error.txt")
    return "".join(path.read_text() for path in starts)


@pytest.mark.slow
def test_ray_s_memory_monitor_costs_a_start_of_one_trial(tmp_path):
    project = hungry_project(tmp_path / "project")
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + 4 * GB) / memory.total
    result = project.run(
        "main.py",
        "--name=tiny",
        "--max_epochs=2",
        "--num_cpus=1",
        RAY_memory_usage_threshold=threshold,
        RAY_memory_monitor_refresh_ms=100,
        check=False,
    )
    reasons = assert_hunger_cost_nothing(project, result)
    assert "killed as memory ran out" in reasons and "--cpus_per_trial" in reasons


@pytest.fixture
def limited_memory():
    """A control group of 3 GB, in which a command runs that is written behind it."""
    top = Path("/sys/fs/cgroup/memory")
    if not top.exists():
        top = Path("/sys/fs/cgroup")
    group = top / f"dmel-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / "memory.max"
        if not limit.exists():
            limit = group / "memory.limit_in_bytes"
        limit.write_text(str(3 * GB))
    except OSError:
        pytest.skip("needs root and a control group that it may make")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
    group.rmdir()


@pytest.mark.slow
def test_a_limit_on_memory_costs_a_start_of_one_trial(tmp_path, limited_memory):
    """As in a container or a batch job, where the system itself kills what takes too much."""
    project = hungry_project(tmp_path / "project")
    result = subprocess.run(
        [*limited_memory, sys.executable, "main.py", "--name=tiny", "--max_epochs=2"],
        cwd=project.folder,
        capture_output=True,
        text=True,
    )
    assert_hunger_cost_nothing(project, result)
    assert ", 1 trials at a time" in result.stdout


# Users


WITHOUT_A_NAME = """
import os

os.getuid = lambda: 2**31 - 3

import datasets
import search_spaces
import train
from config import parse

space = search_spaces.time_frequency(1) | {"n_samples": 60, "init_lambd": 6.38, "seed": 0}
config = parse(space | {"trainable": True})
train.train(config, datasets.load(config), lambda row, _: print(row["training_iteration"]))
"""


def test_a_user_without_a_name_trains(tmp_path):
    """As in a container that is started with a user of its own number: torch asks for the name."""
    command = [sys.executable, "-c", WITHOUT_A_NAME]
    environment = {"TMPDIR": str(tmp_path), "HOME": "/", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "1\n", result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["produce_figures.py", "--ray_results_dir=results", "--figures=accuracy"],
        ["convergence_rate.py", "--help"],
    ],
)
def test_a_home_that_cannot_be_written_is_no_matter(command, tmp_path):
    """As in many containers: Matplotlib would warn, as it keeps its fonts there."""
    environment = os.environ | {"HOME": "/proc", "TMPDIR": str(tmp_path)}  # root cannot either
    environment.pop("MPLCONFIGDIR", None)
    result = subprocess.run(
        [sys.executable, *command, f"--output_dir={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    # The fonts of this TMPDIR are new, and Matplotlib tells so where reading them takes long.
    told = [line for line in result.stderr.splitlines() if "building the font cache" not in line]
    assert (result.returncode, told) == (0, [])


# Trials that fail at once


def test_the_console_outlives_a_trial_that_fails_in_its_first_epoch():
    trials = []
    for status in ("ERROR", "RUNNING"):
        trial = mock.MagicMock(status=status, last_result={}, config={"config": {"max_epochs": 9}})
        trial.is_finished.return_value = status == "ERROR"
        trials.append(trial)
    console = cluster.Console("tiny", 2, seconds=1000)
    console.due = float("inf")
    console.on_step_end(1, trials)
    assert list(console.states.values()) == ["ERROR", "RUNNING"]


def test_the_console_tells_trials_apart_by_all_that_varies(capsys):
    trials = []
    for lr_tf in (1.0, 0.3):
        values = {"init_lambd": 6.38, "trainable": True, "seed": 0, "lr_tf": lr_tf, "patience": 9}
        trials.append(mock.MagicMock(last_result={}, config={"config": values}))
    cluster.Console("tiny", 2, seconds=0).show(trials)
    headings, *rows = capsys.readouterr().out.strip().splitlines()
    assert headings.split()[:5] == ["init_lambd", "trainable", "seed", "lr_tf", "trial"]
    assert [row.split()[3] for row in rows] == ["1", "0.3"]


# GPUs


def card(monkeypatch, capability=(8, 6), kernels=("sm_75", "sm_80", "sm_90", "compute_90")):
    """Has torch tell of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 9), True), ((12, 0), True)],
)
def test_a_gpu_without_kernels(monkeypatch, capability, runs):
    card(monkeypatch, capability)
    if runs:
        main.check_gpus([])
        return
    message = rf"^NVIDIA Some Card has .* {capability[0]}\.{capability[1]}, .*sm_75, .*CUDA_VIS"
    with pytest.raises(InputError, match=message):
        main.check_gpus([])


def test_kernels_of_one_chip_and_of_other_makes():
    assert not machine.has_kernels(["sm_80", "sm_90a"], 12, 0)
    assert not machine.has_kernels([], 8, 0)
    assert not machine.has_kernels(["sm_86"], 8, 0)
    assert machine.has_kernels(["gfx90a"], 9, 0)


def config_of(space=search_spaces.time_frequency, **changes):
    config = space(1) | {"init_lambd": 6.38, "trainable": False}
    return parse(config | changes)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True)])
def test_bf16_needs_ampere(monkeypatch, capability, runs):
    card(monkeypatch, capability)
    main.check_gpus([config_of()])
    if runs:
        main.check_gpus([config_of(bf16=True)])
        return
    for check in (
        lambda: main.check_gpus([config_of(bf16=True)]),
        lambda: train.prepare(config_of(bf16=True)),
    ):
        with pytest.raises(InputError, match=r"bf16 = True: NVIDIA Some Card .* 7\.5"):
            check()


def test_a_gpu_of_another_number(monkeypatch):
    card(monkeypatch)
    for gpus in (None, 0.25, 1):
        with pytest.raises(InputError, match=r"device = cuda:1: a trial sees its own .*cuda:0:"):
            main.check_gpus([config_of(device="cuda:1")], gpus)
        main.check_gpus([config_of(device="cuda:0")], gpus)
    main.check_gpus([config_of(device="cuda:1")], 2)


def test_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = "The NVIDIA driver on your system is too old (found version 11040). Please update"
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(reason)))
    with pytest.raises(InputError, match=r"too old \(found version 11040\).*newer driver"):
        main.check_gpus([])
    reason = "Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(reason)))
    main.check_gpus([])


def test_a_gpu_that_the_driver_counts_and_cuda_refuses(monkeypatch):
    """As where a service that it needs does not run: it has no name either."""
    error = RuntimeError("Error 802: system not yet initialized")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for function in ("init", "get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, function, mock.Mock(side_effect=error))
    with pytest.raises(InputError, match=r"cannot be used.*802.*CUDA_VISIBLE_DEVICES= before"):
        main.check_gpus([])
    assert results.provenance()["hardware"]["gpus"] == []
    train.prepare(config_of())  # on the CPU

    # A batch job without a GPU on a machine that has some.
    error = RuntimeError("No CUDA GPUs are available")
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=error))
    main.check_gpus([])


def test_a_gpu_that_is_not_on_this_machine(monkeypatch):
    """A trial of a machine with two is tested on one with one."""
    card(monkeypatch)
    with pytest.raises(InputError, match=r"device = cuda:1 is not on this machine, which has 1"):
        train.prepare(config_of(device="cuda:1"))


@pytest.mark.parametrize(
    ("gpus", "allocated", "reserved", "free", "expected"),
    [
        (0.25, 1, 1, 8, 2.0),  # neighbours have taken their own shares
        (0.25, 1, 3, 8, 2.0),  # cached blocks of its own are not taken
        (0.5, 1, 1, 8, 5.0),
        (2, 1, 1, 11, 11.0),
        (1, 1, 3, 4, 6.0),  # others hold more than their share
        (0.25, 4, 4, 8, 0.0),
    ],
)
def test_a_trial_s_share_of_a_card(monkeypatch, gpus, allocated, reserved, free, expected):
    properties = SimpleNamespace(total_memory=12 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated * GB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GB, 12 * GB))
    assert machine.free_gpu_memory("cuda:0", gpus) == expected * GB


def test_a_gpu_that_cuda_refuses_is_not_replaced_by_the_cpu(monkeypatch, tmp_path):
    resources = SimpleNamespace(required_resources={"CPU": 1, "GPU": 0.25})
    context = mock.MagicMock()
    context.get_trial_resources.return_value = resources
    context.get_trial_dir.return_value = "trial"
    context.get_experiment_name.return_value = "name"
    monkeypatch.setattr("ray.tune.get_context", lambda: context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it trains"))
    experiment = main.Experiment(tmp_path, "refused")
    config = config_of(n_samples=100)  # its device is cuda:0
    n_threads = torch.get_num_threads()
    try:
        with pytest.raises(InputError, match="a GPU that CUDA refuses"):
            main.run_trial({"config": config.model_dump()}, None, None, experiment, 10)
    finally:
        torch.set_num_threads(n_threads)
    (note,) = (tmp_path / "refused" / "trials").glob("*.txt")
    assert "a GPU that CUDA refuses" in note.read_text()


def test_predictions_take_the_test_split_alone_to_the_device():
    data = datasets.load(config_of(n_samples=100))
    test = predict_test.only_test(data)
    assert len(test.clips) == 20 and test.splits.keys() == {"test"}
    assert torch.equal(test.clips[test.splits["test"]], data.clips[data.splits["test"]])
    assert torch.equal(test.labels[test.splits["test"]], data.labels[data.splits["test"]])


# Ray does not start


def test_no_loopback_interface(monkeypatch):
    refusal = OSError(99, "Cannot assign requested address")
    monkeypatch.setattr(cluster.socket, "create_server", mock.Mock(side_effect=refusal))
    with (
        pytest.raises(InputError, match=r"^Ray cannot start here: 127.0.0.1 .* lo up[^\n]*$"),
        cluster.connected(),
    ):
        pass


@pytest.mark.parametrize(("before", "ignored"), [(signal.SIG_IGN, True), (signal.SIG_DFL, False)])
def test_the_end_of_a_terminal_is_ignored_under_nohup(monkeypatch, before, ignored):
    for name in ("start", "join"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, before)
    try:
        with cluster.connected():
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == ignored
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_head_that_is_killed_while_ray_starts(project, name):
    process = subprocess.Popen(
        [sys.executable, "main.py", "--name=tiny", "--ray_root_dir=killed"],
        cwd=project.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = []
    while not found:
        assert process.poll() is None
        children = psutil.Process(process.pid).children()
        found = [child for child in children if child.name() == name]
        time.sleep(0.01)
    found[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended, or was killed" in errors.strip().splitlines()[-1]


# Errors in search_spaces.py


def space_error(tmp_path, text):
    project = Project(tmp_path / "project", text)
    arguments = ["--name=mine", "--dry_run"]
    result = project.run("main.py", *arguments, check=False)
    assert result.returncode == 1 and "config.py" not in result.stderr
    sentence, _, details = result.stderr.partition("\n\n")
    assert "\n" not in sentence
    n_lines = len((project.folder / "search_spaces.py").read_text().splitlines())
    return sentence, details, n_lines


MISTAKES = {  # text at the end of search_spaces.py, its line from the end, what is said
    "syntax": ("def mine(max_epochs:\n", 0, "SyntaxError"),
    "missing module": ("import no_such_module\n", 0, "ModuleNotFoundError: No module named"),
    "failure": ("def mine(max_epochs):\n    return wrong\n", 0, "NameError: name 'wrong'"),
    "arguments": ("def mine():\n    return {}\n", 1, r"TypeError: mine\(\) takes 0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_search_spaces_is_told_with_its_line(tmp_path, case):
    text, from_end, reason = MISTAKES[case]
    sentence, details, n_lines = space_error(tmp_path, text)
    assert re.match(
        rf"main.py: search_spaces.py, line {n_lines - from_end}: {reason}.*: mend that", sentence
    )
    assert re.search(reason, details.splitlines()[-1])


def test_grids_and_samplers_that_fail_are_named_by_their_key():
    base = search_spaces.time_frequency(1)
    space = plain({**base, "init_lambd": tune.grid_search(x for x in (1.0, 2.0))})
    with pytest.raises(InputError, match=r"init_lambd = grid_search\(.* must be of a list"):
        check_space(space)
    with pytest.raises(InputError, match=r"'lr_model'.*ZeroDivisionError: division by zero"):
        draw(plain({**base, "lr_model": tune.sample_from(lambda _: 1 / 0)}), 0)


def test_tensors_as_values():
    values = {"init_lambd": tune.grid_search(torch.linspace(1, 5, 3)), "lr_tf": torch.tensor(0.5)}
    space = plain(search_spaces.time_frequency(1) | values)
    check_space(space)
    configs = draw(space, 0).values()
    assert sorted({config.init_lambd for config in configs}) == [1, 3, 5]
    assert {config.lr_tf for config in configs} == {0.5}


# Results that move


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_results_that_are_copied_elsewhere_go_on_there(project, tmp_path):
    """With other CPUs too; the folder that they came from is gone."""
    project.run("main.py", "--name=tiny", "--max_epochs=1", f"--ray_root_dir={tmp_path / 'old'}")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    arguments = ["main.py", "--name=tiny", "--max_epochs=3", f"--ray_root_dir={tmp_path / 'new'}"]
    one = {min(os.sched_getaffinity(0))}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=project.folder,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, one),
    )
    assert result.returncode == 0, result.stderr
    assert "4 to train (4 go on from epoch 1)" in result.stdout
    flags = ["--dataset_name=tiny", f"--ray_results_dir={tmp_path / 'new'}"]
    project.run("predict_test.py", *flags)
    table = pd.read_csv(tmp_path / "new" / "tiny" / "tiny.csv")
    assert table["training_iteration"].tolist() == [3] * 4
    assert table["logdir"].str.startswith(str(tmp_path / "new")).all()
    assert not (tmp_path / "old").exists()


def test_gpus_are_hidden_from_these_tests(pytestconfig):
    if pytestconfig.option.markexpr != "gpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
