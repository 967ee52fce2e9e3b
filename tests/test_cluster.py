"""Clusters, simulated on this machine.

Several nodes, a node that goes away, shares of a GPU, the token.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile
from conftest import ROOT, Project
from ray.cluster_utils import Cluster
from runs import Run, is_training

import datasets

pytestmark = pytest.mark.slow
EPOCHS = 20  # of four trials: they must outlast the start of a worker on the second node
CLIPS = SimpleNamespace(dataset_name="audio_mnist", resample_rate=8000, n_points=48000)
SPACES = """

def spoken(max_epochs):
    return {
        **audio_mnist(max_epochs),
        "n_points": 48000,
        "model_name": tune.grid_search(["mel_linear_net", "mel_mlp_net"]),
        "init_lambd": tune.grid_search([180.0, 200.0]),
        "trainable": True,
        "split": {"train": [1], "valid": [2], "test": [3]},
    }


def packing(max_epochs):
    return {**time_frequency(max_epochs), "n_samples": 300, "device": "cpu"}  # the GPU is none
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("cluster"), SPACES)
    random = np.random.default_rng(0)
    for speaker in (1, 2, 3):
        folder = project.folder / "data" / "audio_mnist" / "data" / f"{speaker:02}"
        folder.mkdir(parents=True)
        for repetition in range(60):
            path = folder / f"{repetition % 10}_{speaker:02}_{repetition}.wav"
            soundfile.write(path, random.uniform(-1, 1, 8000), 8000)
    return project


@contextlib.contextmanager
def cluster(**node):
    head = {"object_store_memory": 100 * 2**20, **node}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES")  # Ray counts those that it names
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_trial_that_is_given_no_gpu_sees_none():
    script = """
import os, ray, cluster

def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

with cluster.connected():
    print(repr(ray.get(ray.remote(num_cpus=1)(visible).remote())))
"""
    changes = {"RAY_AUTH_MODE": "token", "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=os.environ | changes, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "''", result.stderr


def test_two_nodes_share_the_trials_and_one_takes_over(project):
    with cluster(num_cpus=1) as nodes:
        second = nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        raylets = []
        for node in nodes.list_all_nodes():
            pid = node.all_processes["raylet"][0].process.pid
            raylets.append(psutil.Process(pid))

        run = Run(project, "two_nodes", "spoken", EPOCHS, ["--ray_address", nodes.address])
        process = run.start()
        deadline = time.monotonic() + 120
        while not all(has_a_trial(raylet) for raylet in raylets):  # two at a time, one on each node
            in_time = process.poll() is None and time.monotonic() < deadline
            assert in_time, process.communicate()[0]
            time.sleep(0.05)
        run.wait_for_epochs(process, 4)

        for raylet in raylets:  # the object store of a node holds one copy of the recordings
            mapped = sum(part.rss for part in raylet.memory_maps() if "plasma" in part.path)
            assert 1 <= mapped / (180 * 48000 * 4) < 1.5
        nodes.remove_node(second)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    run.assert_undisturbed(datasets.recordings_of(CLIPS, project.folder / "data"))


def has_a_trial(raylet):
    return any(is_training(child) for child in raylet.children())


@pytest.fixture
def with_own_mounts():
    """A command that gives what follows mounts of its own; without one the test is skipped.

    In CI it fails.
    """
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    if os.environ.get("CI"):
        pytest.fail("a process may have no mounts of its own here")
    pytest.skip("a process may have no mounts of its own here")


def test_quarters_of_a_gpu_pack_and_a_machine_that_does_not_see_the_results_is_named(
    project, with_own_mounts
):
    """The second node lives in a mount namespace, with an empty folder in place of the results."""
    results = project.folder / "not_shared"
    results.mkdir()
    with cluster(num_cpus=8, num_gpus=1) as nodes:
        flags = ["--ray_address", nodes.address, "--report_seconds=0"]
        flags += ["--gpus_per_trial=0.25", "--cpus_per_trial=1"]  # otherwise it takes no GPU
        run = Run(project, "packing", "packing", 40, flags)
        output = run.finish().stdout
        assert "4 trials at a time, 1 CPUs each" in output
        assert max(table.count(" runs ") for table in output.split("\n\n")) == 4  # the fifth waits
        assert len(run.states()) == 6

        mount = f"mount -t tmpfs tmpfs {results}"
        start = f"exec ray start --address={nodes.address} --num-cpus=1 --block"
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        node = subprocess.Popen(
            [*with_own_mounts, "sh", "-c", f"{mount} && {start}"],
            env=os.environ | {"PATH": path},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while sum(known["Alive"] for known in nodes.global_state.node_table()) < 2:
                assert node.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            run = Run(project, results, "packing", 1, ["--ray_address", nodes.address])
            result = run.finish(check=False)
        finally:
            for member in [*psutil.Process(node.pid).children(recursive=True), node]:
                member.kill()
            node.wait()
    assert result.returncode == 1 and not list(results.glob("packing/trials/*"))
    message = result.stderr.strip().splitlines()[-1]
    unseen = rf"{results}/packing/experiment\.json"
    assert re.match(rf"main.py: \S+ does not see {unseen}: name a --ray_root_dir", message)


def test_private_cluster_refuses_those_without_the_token(project, tmp_path):
    run = Run(project, "token", "packing", 100000)
    process = run.start(RAY_AUTH_MODE="disabled")
    try:
        run.wait_for_epochs(process, 1)
        children = psutil.Process(process.pid).children()
        raylet = next(child for child in children if child.name() == "raylet")
        address = re.search(r"--gcs-address=(\S+)", " ".join(raylet.cmdline()))[1]
        join = f"import ray; ray.init(address='{address}', logging_level='error'); print('joined')"
        mine = os.environ | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
        own = {"RAY_AUTH_TOKEN": raylet.environ()["RAY_AUTH_TOKEN"]}
        strangers = [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}, {}]

        joining = []  # at the same time, as Ray tries for a minute or more
        for changes in (own, *strangers):
            joiner = subprocess.Popen(
                [sys.executable, "-c", join],
                env=mine | changes,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            joining.append(joiner)
        outputs = [joiner.communicate()[0] for joiner in joining]
        assert ["joined" in output for output in outputs] == [True, False, False, False]
    finally:
        process.terminate()
        process.communicate(timeout=120)


def test_no_cluster_there(project):
    flags = ["--name=packing", "--ray_address=127.0.0.1:1"]
    result = project.run("main.py", *flags, check=False, RAY_AUTH_MODE="disabled")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("main.py: --ray_address=127.0.0.1:1: no Ray cluster")
