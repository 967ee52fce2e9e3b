"""The section that disturbs runs of main.py at random moments.

What they leave is compared with an undisturbed one.
"""

import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
NAME = "time_frequency"
FLAGS = [f"--name={NAME}", "--max_epochs=8", "--save_seconds=0.5", "--max_failures=1"]
OF_THE_MOMENT = [
    "logdir",
    "time_this_iter_s",
    "time_total_s",
    "config/max_epochs",  # of the last start that trained it
]
DISK_BYTES = 2**24  # a run's results and Ray's logs of its starts take some MB
LONGEST_SECONDS = 20  # from the start of a run to a fault: most runs end about then
PATIENCE_SECONDS = 400  # for a run to end after a fault
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # nodes of Ray's test clusters have none


def faults(args):
    """Faults at random moments, each followed by the same command; lost: other final numbers"""
    draw = random.Random(args.seed)
    times = collections.Counter()
    lost = collections.Counter()
    seconds = 60 * args.minutes
    if args.tiny:
        seconds = 30
    begin = time.monotonic()

    with tempfile.TemporaryDirectory() as folder, tqdm(unit="fault", desc="faults") as progress:
        undisturbed = Path(folder, "undisturbed")
        start(undisturbed).wait()
        expected = numbers_of(undisturbed)

        while time.monotonic() - begin < seconds:
            with small_disk(Path(folder, "disturbed")) as results:
                suffered = []
                while True:
                    kind = draw.choice(WEIGHTED)
                    is_finished = KINDS[kind](draw.uniform(0, LONGEST_SECONDS), results)
                    if is_finished:
                        break
                    suffered.append(kind)
                    progress.update()
                times.update(suffered)
                if not numbers_of(results).equals(expected):
                    lost.update(set(suffered))

    for kind in KINDS:
        yield {"fault": kind, "times": times[kind], "lost": lost[kind]}
    yield {"fault": "all", "times": times.total(), "lost": lost.total()}


def start(results, *flags, limit=None, scripts=ROOT):
    """main.py in a process of its own; limit: bytes that a file may have."""
    command = [sys.executable, scripts / "main.py", *FLAGS, f"--ray_root_dir={results}", *flags]

    def limit_files():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command,
        env=os.environ | WITHOUT_GPU,
        preexec_fn=limit_files,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def numbers_of(results):
    """The table that predict_test.py makes of finished trials, without what is of the moment."""
    command = [
        sys.executable,
        ROOT / "predict_test.py",
        f"--dataset_name={NAME}",
        f"--ray_results_dir={results}",
    ]
    subprocess.run(command, env=os.environ | WITHOUT_GPU, check=True, capture_output=True)
    table = pd.read_csv(results / NAME / f"{NAME}.csv", index_col=0)
    return table.drop(columns=OF_THE_MOMENT)


@contextlib.contextmanager
def small_disk(folder):
    """An empty folder, on a small disk of its own where the user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder / "results"
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        subprocess.run(["rm", "-rf", "--", folder], check=True)


def ended_before(process, seconds):
    """Whether a run is finished within some seconds."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(seconds) == 0:
            return True
        raise RuntimeError(
            f"a run ended with exit code {process.returncode} before anything happened to it"
        )
    return False


def disturbed(act):
    """A fault: starts the run, waits, acts on its processes, and waits for its end."""

    def run(seconds, results):
        process = start(results)
        if ended_before(process, seconds):
            return True
        not_there = (psutil.NoSuchProcess, IndexError)  # not yet, or no longer
        with contextlib.suppress(*not_there):
            act(psutil.Process(process.pid))
        process.wait(PATIENCE_SECONDS)
        return False

    return run


def kill_child(name):
    """Kills a process of the run, such as the raylet or a worker that trains."""

    def act(process):
        found = []
        for child in process.children(recursive=True):
            if name in f"{child.name()} {child.cmdline()}":
                found.append(child)
        found[0].kill()

    return act


def fill_disk(seconds, results):
    """No space left for some seconds, then there is again."""
    if not os.path.ismount(results.parent):  # not root: files may not grow beyond some size
        process = start(results, limit=int(2**12 * (1 + seconds)))
        return process.wait(PATIENCE_SECONDS) == 0
    process = start(results)
    if ended_before(process, seconds):
        return True
    filler = results.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    process.wait(PATIENCE_SECONDS)
    filler.unlink()
    return False


def edit_search_space(seconds, results):
    """Another learning rate of λ, trained for some seconds, killed, and the edit undone."""
    with tempfile.TemporaryDirectory() as folder:
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        space = Path(folder, "search_spaces.py")
        space.write_text(space.read_text().replace('"lr_tf": 1.0', '"lr_tf": 0.5'))
        process = start(results, scripts=Path(folder))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
    return False


def smaller_budget(seconds, results):
    """Half of the epochs, trained for some seconds or to their end; then the budget is raised."""
    process = start(results, "--max_epochs=4")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
    return False


def lose_node(seconds, results):
    """A cluster of two nodes, one of which goes away; the run goes on with the other."""
    script = "import sys; from benchmarks.faults import two_nodes; two_nodes(float(sys.argv[1]))"
    nodes = subprocess.Popen(
        [sys.executable, "-c", script, str(seconds)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = nodes.stdout.readline().strip()
        process = start(results, f"--ray_address={address}")
        process.wait(PATIENCE_SECONDS)
    finally:
        nodes.communicate()
    return False


def two_nodes(seconds):
    """Two Ray nodes until the standard input ends, one of which goes away after a while.

    Prints their address.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    time.sleep(seconds)
    cluster.remove_node(second)
    sys.stdin.read()
    cluster.shutdown()


KINDS = {
    "kill -9 of main.py": disturbed(psutil.Process.kill),
    "kill -9 of a worker": disturbed(kill_child("ImplicitFunc")),
    "kill -9 of the raylet": disturbed(kill_child("raylet")),
    "Ctrl-C": disturbed(lambda process: process.send_signal(signal.SIGINT)),
    "SIGTERM": disturbed(lambda process: process.send_signal(signal.SIGTERM)),
    "full disk": fill_disk,
    "edit of the search space": edit_search_space,
    "half of the epochs": smaller_budget,
    "node loss": lose_node,
}
WEIGHTED = [*KINDS, *list(KINDS)[:-1]]  # a cluster takes long to start
SECTIONS = (faults,)
