"""Clusters, simulated on this machine: several nodes, a node that goes away, shares of a GPU, the token."""

import contextlib
import os
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import soundfile
from conftest import Project
from ray.cluster_utils import Cluster
from runs import Run, assert_same

EPOCHS = 20  # of four trials: they must outlast the start of a worker on the second node
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
    return {**time_frequency(max_epochs), "n_samples": 300}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("cluster"), SPACES, REPORT_SECONDS=1)
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
    cluster = Cluster(initialize_head=True, head_node_args={"object_store_memory": 100 * 2**20, **node})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def raylets_of(run):
    """The nodes' processes, which hold the object stores, above the living workers that have reported an epoch."""
    raylets = set()
    for pid in run.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            raylets.add(psutil.Process(pid).parent())
    return raylets


def test_two_nodes_share_the_trials_and_one_takes_over(project):
    undisturbed = Run(project, "undisturbed", "spoken", EPOCHS)
    undisturbed.finish()
    with cluster(num_cpus=1) as nodes:
        second = nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        run = Run(project, "two_nodes", "spoken", EPOCHS, ["--ray_address", nodes.address])
        process = run.start()
        deadline = time.monotonic() + 120
        while len(raylets := raylets_of(run)) < 2:  # two trials at a time, each on a node of its own
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)
        maps = [[part for part in raylet.memory_maps() if "plasma" in part.path] for raylet in raylets]
        copies = [sum(part.rss for part in parts) / (180 * 48000 * 4) for parts in maps]
        assert all(1 <= copy < 1.5 for copy in copies), copies
        nodes.remove_node(second)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    assert_same(run, undisturbed)


def test_quarters_of_a_gpu_pack_and_the_fifth_waits(project):
    with cluster(num_cpus=4, num_gpus=1) as node:
        run = Run(project, "packing", "packing", 80, ["--ray_address", node.address])
        output = run.finish().stdout
    assert "4 trials at a time, 1 CPUs each" in output
    running = [int(n) for n in re.findall(r"(\d+) RUNNING", output)]
    assert max(running) == 4 and "1.0/1 GPUs" in output
    assert len(run.histories()) == 6


def test_private_cluster_refuses_those_without_the_token(project, tmp_path):
    run = Run(project, "token", "packing", 100000)
    process = run.start()
    try:
        run.wait_for_epochs(process, 1)
        commands = [" ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)]
        (address,) = {found[1] for command in commands if (found := re.search(r"--gcs-address=(\S+)", command))}
        join = f"import ray; ray.init(address='{address}', logging_level='error'); print('joined')"
        mine = os.environ | {"RAY_AUTH_MODE": "token"}
        strangers = [{"RAY_AUTH_TOKEN": "0" * 64}, {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}]
        outputs = [
            subprocess.run([sys.executable, "-c", join], env=mine | changes, capture_output=True, text=True).stdout
            for changes in ({}, *strangers)
        ]
        assert ["joined" in output for output in outputs] == [True, False, False]
    finally:
        process.terminate()
        process.communicate(timeout=120)


def test_no_cluster_there(project):
    result = project.run(
        "main.py", "--name=packing", "--ray_address=127.0.0.1:1", check=False, RAY_AUTH_MODE="disabled"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("main.py: --ray_address=127.0.0.1:1: no Ray cluster")
