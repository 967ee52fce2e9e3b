"""The Ray cluster that trials run on, a private one on this machine or one that is there, and Ray Tune on it.

    with cluster.private():    # or cluster.joined("auto")
        errors = cluster.fit(tune.with_resources(trial, cluster.resources({"cpu": 4, "gpu": 0.25})), configs, ...)

main.py alone uses it.
"""

import contextlib
import math
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the one that takes a reporter
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # short trials may end often

import pandas as pd
import psutil
import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from config import InputError, trial_key
from storage import first_line

# Trials keep the memory that they free for their next step: fetching it from the system each time costs a third more.
MEMORY = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
SYNC_SECONDS = 10  # between updates of Ray's log in a folder of results; all of it is written anew
MAX_ROWS = 40  # of a table on the console; of more trials it shows those that run or failed
PARAMETERS = ("init_lambd", "trainable", "seed")
METRICS = ("loss", "valid_loss", "valid_acc", "lambd_est")
STATES = {"RUNNING": "runs", "TERMINATED": "finished", "ERROR": "failed"}
OPTIONS = {"log_to_driver": False, "logging_level": "error"}
LONGEST_PLACE = 20  # characters before own_folder: Ray adds some 80 for a Unix socket, which may have 107
# Waits for the end of main.py, however it comes, and leaves neither processes that have files in its folder nor that.
CLEAN_UP = """
exec 2>/dev/null
read -r _
find /proc/[0-9]*/fd -lname "$1/*" | cut -d / -f 3 | sort -u | grep -vx "$PPID" | xargs -r kill -9
rm -rf "$1"
"""


@contextlib.contextmanager
def private():
    """A cluster for this process alone: others on this machine have neither its token nor its folder."""
    os.environ.update(MEMORY | os.environ)  # trials inherit it
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with own_folder() as folder:
        try:
            ray.init(address="local", include_dashboard=False, _temp_dir=f"{folder}/ray", **OPTIONS)
        except Exception as error:  # of many kinds
            raise InputError(f"Ray cannot start here ({first_line(error)}): mend that and start again.") from None
        heads = [child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")]
        ending = threading.Event()
        threading.Thread(target=watch, args=(heads, ending), daemon=True).start()
        yield from connected(ending)


def watch(heads, ending):
    """Ends this process with a sentence where one of Ray's ends first: Ray itself takes a minute and many lines."""
    while not ending.wait(0.5):
        for head in heads:
            if not head.is_running() or head.status() == psutil.STATUS_ZOMBIE:
                reason = "a process of Ray ended, killed or out of memory"
                print(f"\n{Path(sys.argv[0]).name}: {reason}: the same command continues.", file=sys.stderr, flush=True)
                os._exit(1)  # what else is there to end is own_folder's


@contextlib.contextmanager
def joined(address):
    """The cluster at an address; trials get the scripts, as they are now, wherever they run."""
    with own_folder() as folder:
        for script in Path(__file__).parent.glob("*.py"):
            shutil.copy(script, folder)
        try:
            if ":" in address:  # Ray would try for minutes
                host, port = address.rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, runtime_env={"working_dir": folder, "env_vars": MEMORY}, **OPTIONS)
        except Exception as error:  # of many kinds
            remedy = "check that address, and that RAY_AUTH_MODE and the token here are the cluster's"
            reason = first_line(error)
            raise InputError(f"--ray_address={address}: no Ray cluster can be joined ({reason}): {remedy}.") from None
        yield from connected(threading.Event())


@contextlib.contextmanager
def own_folder():
    """A folder that only this user can enter; it goes in the end, with the processes that have files in it."""
    try:
        place = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="dmel-", dir=place if len(place) <= LONGEST_PLACE else "/tmp")
    except OSError as error:
        raise InputError(f"there is no folder for temporary files ({error}): set TMPDIR to one.") from None
    guard = subprocess.Popen(["sh", "-c", CLEAN_UP, "sh", folder], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        guard.communicate()


def connected(ending):
    """As long as Ray is connected, signals end Ray Tune in order, as Ctrl-C does; ending is set before Ray ends."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        ending.set()
        ray.shutdown()


def check_nodes(experiment, plan):
    """Raises InputError where a machine of the cluster does not see the plan: it would keep its trials to itself."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    seen = ray.get([look_for_plan.options(scheduling_strategy=place).remote(experiment) for place in places])
    for node, checksum in zip(nodes, seen, strict=True):
        if checksum != plan.checksum:
            remedy = "name a --ray_root_dir that all machines see, such as a shared folder or s3://bucket/results"
            raise InputError(
                f"{node['NodeManagerHostname']} does not see {experiment.address}/experiment.json: {remedy}."
            )


@ray.remote(num_cpus=0)
def look_for_plan(experiment):
    """The checksum of the plan as a machine sees it."""
    with contextlib.suppress(InputError):
        plan = experiment.read_plan()
        return plan and plan.checksum


def resources(wanted, cpus=None, gpus=None):
    """CPUs and GPUs of a trial: cpus and gpus as asked for, otherwise those wanted as far as the machines have them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    for flag, asked, there in zip(("cpus", "gpus"), (cpus, gpus), zip(*machines, strict=True), strict=True):
        if asked is not None and asked > max(there):
            raise InputError(f"--{flag}_per_trial={asked:g} cannot be met: there are {max(there):g} here.")
    has_gpu = any(gpus_there for _, gpus_there in machines)
    if gpus is None:
        gpus = wanted["gpu"] if has_gpu else 0
    if cpus is None:
        cpus = min(wanted["cpu"], cpus_beside(gpus, machines)) if gpus else 1
    at_once = sum(trials_on(*machine, cpus, gpus) for machine in machines)
    if at_once < 1:
        raise InputError(f"no machine here has {cpus:g} CPUs and {gpus:g} GPUs together: ask for less per trial.")
    device = "Training on GPUs" if gpus else "Training on the CPU"
    device = device if has_gpu else "No CUDA device: training on the CPU"
    print(f"{device}, {at_once} trials at a time, {cpus:g} CPUs each.", flush=True)
    return {"cpu": cpus, "gpu": gpus}


def cpus_beside(gpus, machines):
    """CPUs of a trial with so many GPUs: as many trials as share the GPUs of a machine share its CPUs."""
    return min(max(1, int(cpus * gpus / all_gpus)) for cpus, all_gpus in machines if all_gpus)


def trials_on(machine_cpus, machine_gpus, cpus, gpus):
    """Number of trials that a machine takes at a time."""
    return int(min(machine_cpus / cpus, machine_gpus / gpus if gpus else machine_cpus) + 1e-6)


# Ray Tune


def fit(trial, configs, experiment, start, args):
    """Has Ray Tune run a trial of each config and log to ray/START of the experiment; returns what failed ones say."""
    storage, failures = experiment.storage, Failures()
    tuner = tune.Tuner(
        trial,
        param_space={"config": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            metric="valid_loss",
            mode="min",
            reuse_actors=True,  # the next trial finds torch imported
            trial_name_creator=lambda trial: trial_key(trial.config["config"]),
            trial_dirname_creator=name_of,
        ),
        run_config=tune.RunConfig(
            name=start,
            storage_path=storage.path(f"{experiment.name}/ray"),
            storage_filesystem=storage.filesystem,
            progress_reporter=Console(experiment.name, len(configs), args.report_seconds),
            callbacks=[failures],
            sync_config=tune.SyncConfig(sync_period=SYNC_SECONDS if storage.is_local else 30 * SYNC_SECONDS),
            verbose=1,
            failure_config=tune.FailureConfig(max_failures=args.max_failures),
        ),
    )
    try:
        tuner.fit()
    except Exception as error:  # of many kinds: a full disk, a cluster that is gone
        if not failures.reasons:
            raise InputError(f"Ray ended ({first_line(error)}): mend that, and the same command continues.") from None
    return failures.reasons


class Failures(tune.Callback):
    """Collects what failed trials say last; Ray itself would unpickle it from the results folder."""

    def __init__(self):
        self.reasons = []

    def on_trial_error(self, iteration, trials, trial, **info):
        self.reasons.append(Path(trial.error_file).read_text().strip().splitlines()[-1])
        trial.run_metadata.pickled_error_filename = None


class Console(tune.ProgressReporter):
    """A table of the trials when one starts or ends, not more often than asked, and a line that renews itself."""

    def __init__(self, name, n_trials, seconds):
        self.name, self.seconds, self.printed, self.states = name, seconds, -math.inf, None
        line = "{desc} [{elapsed}, {remaining} left]"
        self.bar = tqdm(total=n_trials, bar_format=line, disable=None, leave=False, mininterval=0.5)

    def setup(self, *args, **kwargs):
        pass

    def should_report(self, trials, done=False):
        epochs = [trial.last_result.get("training_iteration", 0) for trial in trials]
        states = [trial.status for trial in trials]
        ended = [n for n, state in zip(epochs, states, strict=True) if state == "TERMINATED"]
        usual = statistics.mean(ended or [trial.config["config"]["max_epochs"] for trial in trials] or [1])
        running = (min(n / usual, 0.95) for n, state in zip(epochs, states, strict=True) if state == "RUNNING")
        told = f"{len(ended)} of {self.bar.total} trials finished, {sum(epochs)} epochs"
        self.bar.set_description_str(f"{self.name}: {told}", refresh=False)
        self.bar.update(len(ended) + sum(running) - self.bar.n)
        is_news = states != self.states and not set(states) <= {"PENDING"}
        return done or (is_news and time.monotonic() - self.printed >= self.seconds)

    def report(self, trials, done, *sys_info):
        self.states, self.printed = [trial.status for trial in trials], time.monotonic()
        if len(trials) > MAX_ROWS:
            trials = [trial for trial in trials if trial.status in ("RUNNING", "ERROR")]
        rows = [
            {key: trial.config["config"][key] for key in PARAMETERS}
            | {"trial": STATES.get(trial.status, "waiting"), "epoch": trial.last_result.get("training_iteration", 0)}
            | {key: trial.last_result.get(key, math.nan) for key in METRICS}
            for trial in trials
        ]
        self.bar.write(pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="%.4g") + "\n")
        if done:
            self.bar.close()


def name_of(trial):
    """What Ray and TensorBoard call a trial: its key, and what tells it apart for people."""
    config = trial.config["config"]
    return "_".join([trial_key(config), *(f"{key}={config[key]}" for key in ("model_name", *PARAMETERS))])
