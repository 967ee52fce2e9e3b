"""The Ray cluster that trials run on, and Ray Tune on it.

The cluster is a private one on this machine, or one that is there already.
"""

import contextlib
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Console is enough
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Short trials may end often.
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import pandas as pd
import psutil
import ray
import torch
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

import machine
from config import InputError, first_line, parse

# Trials keep the memory that they free for their next step: fetching it from the system each time
# costs a third more.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # a card's memory that falls to pieces less
}
GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}  # a trial that is given none sees none
OPTIONS = {"log_to_driver": False, "logging_level": "error"}  # of ray.init
LONGEST_PLACE = 20  # characters before a cluster's folder: Ray adds some 80, a socket may have 107

MEMORY_OF_TRIAL = 2e9  # bytes that a trial takes, about
MEMORY_OF_RAY = 2e9  # and Ray, main.py and the recordings
LACK_OF_MEMORY = (
    "it was killed as memory ran out: a larger --cpus_per_trial, on GPUs a larger "
    "--gpus_per_trial, trains fewer at a time"
)

MAX_ROWS = 40  # of a table on the console; of more trials it shows those that run or failed
PARAMETERS = ("init_lambd", "trainable", "seed")  # tell trials apart for people
METRICS = ("loss", "valid_loss", "valid_acc", "lambd_est")
STATES = {"RUNNING": "runs", "TERMINATED": "finished", "ERROR": "failed"}


@contextlib.contextmanager
def connected(address=None, n_cpus=None):
    """Ray, on the cluster at an address or on one for this process alone.

    n_cpus: of the latter; as many as this process may use where it is None. As long as it lasts,
    the signals that end a process end Ray Tune as Ctrl-C does.
    """
    with contextlib.ExitStack() as stack:
        try:
            if address is None:
                start(stack, n_cpus or machine.cpus())
            else:
                join(address)
        except InputError:
            raise
        except Exception as error:  # of many kinds
            problem = "Ray cannot start here"
            if address is not None:
                problem = f"--ray_address={address}: no Ray cluster joined"
            raise InputError(
                f"{problem} ({first_line(error)}): mend that and start again."
            ) from None

        stack.callback(ray.shutdown)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        yield


def start(stack, n_cpus):
    """Starts a cluster of n_cpus that ends with the stack.

    Others on this machine have neither its token nor its folder.
    """
    check_loopback()
    parent = tempfile.gettempdir()
    if len(parent) > LONGEST_PLACE:
        parent = "/tmp"
    folder = tempfile.mkdtemp(prefix="dmel-", dir=parent)
    stack.enter_context(guard(folder))

    for name, value in (MEMORY | GPUS).items():  # trials inherit them
        os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    n_gpus = 0  # Ray itself counts GPUs that torch cannot use, and not those of WSL
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
    memory = machine.free_memory() - MEMORY_OF_RAY
    with end_where_ray_cannot_start():
        ray.init(
            address="local",
            num_cpus=n_cpus,
            num_gpus=n_gpus,
            _memory=int(max(memory, MEMORY_OF_TRIAL)),  # one trial at least is tried
            include_dashboard=False,
            _temp_dir=f"{folder}/ray",
            **OPTIONS,
        )
    end_with_ray()


def guard(folder):
    """A process that removes a cluster's folder, and what still works in it, when this one ends.

    Ray ends most of its processes with the one that started it, but after a kill -9 two agents stay
    for ever and keep the folder alive. The guard waits for the end of its input, which comes with
    the end of this process, however that comes.
    """
    clean_up = """
        exec 2>/dev/null
        read -r _
        find /proc/[0-9]*/fd -lname "$1/*" | cut -d / -f 3 | sort -u | grep -vx "$PPID" |
            xargs -r kill -9
        rm -rf "$1"
    """
    return subprocess.Popen(
        ["sh", "-c", clean_up, "sh", folder], stdin=subprocess.PIPE, start_new_session=True
    )


def check_loopback():
    """Raises InputError where this machine cannot reach itself: Ray would try for minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"Ray cannot start here: 127.0.0.1 cannot be reached ({error.strerror or error}): "
            "bring the loopback interface up (`ip link set lo up`), or allow it in this container."
        ) from None


@contextlib.contextmanager
def end_where_ray_cannot_start():
    """Ends this process where one of the cluster's dies meanwhile: Ray would try for minutes."""
    started = threading.Event()

    def watch():
        heads = set()
        while not started.wait(0.2):
            with contextlib.suppress(psutil.NoSuchProcess):
                heads |= set(heads_of_ray())
            for head in heads:
                if not is_alive(head):
                    print(
                        f"\nmain.py: Ray cannot start here: its process {head.pid} ended, or was "
                        "killed, as it began: the same command tries it again.",
                        file=sys.stderr,
                    )
                    os._exit(1)  # from a thread; the guard ends what is left

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        started.set()


def heads_of_ray():
    """The processes that this one started and that a cluster cannot be without."""
    heads = []
    for child in psutil.Process().children():
        if child.name() in ("gcs_server", "raylet"):
            heads.append(child)
    return heads


def is_alive(process):
    """Whether a process runs: one that ended is a zombie until this one asks for its exit code."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_with_ray():
    """Has this process end as soon as the cluster's own processes do.

    Where one of them is killed, Ray itself tries to reach it for a minute, with many lines.
    """

    def end(head):
        if ray.is_initialized():  # not ended by ray.shutdown
            print(
                "\nmain.py: a process of Ray ended, or was killed: the same command continues.",
                file=sys.stderr,
            )
            os._exit(1)  # from a thread; the guard ends what is left

    threading.Thread(
        target=psutil.wait_procs, args=(heads_of_ray(), None, end), daemon=True
    ).start()


def join(address):
    """Joins the cluster at an address; trials get the scripts as they are now."""
    if ":" in address:  # Ray would try for minutes
        socket.create_connection(address.rsplit(":", 1), timeout=10).close()
    environment = {
        "working_dir": str(Path(__file__).parent),
        "excludes": ["/*", "!/.", "!/*.py"],
        "env_vars": MEMORY | GPUS,
    }
    ray.init(address=address, runtime_env=environment, **OPTIONS)


def check_nodes(experiment, plan):
    """Raises InputError where a machine does not see the plan: it would keep its trials' files."""
    sees_plan = ray.remote(num_cpus=0)(lambda: experiment.read_plan() == plan)
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if not ray.get(sees_plan.options(scheduling_strategy=place).remote()):
            raise InputError(
                f"{node['NodeManagerHostname']} does not see {experiment.address}/experiment.json: "
                "name a --ray_root_dir that all machines see, such as a shared folder or "
                "s3://bucket/results."
            )


def resources(wanted, cpus=None, gpus=None):
    """CPUs, GPUs and memory of a trial: as asked for, or what is wanted as far as machines have it.

    Says how many trials Ray will run at a time.
    """
    machines = []
    for node in ray.nodes():
        if node["Alive"]:
            machines.append(node["Resources"])
    most_cpus = max(each.get("CPU", 0) for each in machines)
    most_gpus = max(each.get("GPU", 0) for each in machines)

    if gpus is None:
        gpus = wanted["gpu"] if most_gpus else 0
    if gpus > 1 and gpus != int(gpus):
        raise InputError(f"--gpus_per_trial={gpus:g} must be a whole number, or below 1.")
    for flag, value in (("cpus", cpus), ("gpus", gpus)):
        if value and units(value) == 0:
            raise InputError(f"--{flag}_per_trial={value:g} must be 0.0001 or more.")
    if cpus is None:
        cpus = 1
        if gpus:  # as many trials as share the GPUs of a machine share its CPUs
            shares = []
            for each in machines:
                at_once = trials_on_gpus(each.get("GPU", 0), gpus)
                if at_once:
                    shares.append(each.get("CPU", 0) // at_once)
            cpus = max(1, min([wanted["cpu"], *(int(share) for share in shares)]))

    trial = {"cpu": cpus, "gpu": gpus}
    most_memory = max(each.get("memory", 0) for each in machines)
    if most_memory:  # where there is less, one trial has to do with it
        trial["memory"] = int(min(MEMORY_OF_TRIAL, most_memory))

    at_once = sum(trials_on_machine(each, trial) for each in machines)
    if at_once < 1:
        raise InputError(
            f"no machine has {cpus:g} CPUs and {gpus:g} GPUs for a trial, but {most_cpus:g} CPUs "
            f"and {most_gpus:g} GPUs at most: lower --cpus_per_trial or --gpus_per_trial."
        )

    place = "No CUDA device: training on the CPU"
    if gpus:
        place = "Training on GPUs"
    elif most_gpus:
        place = "Training on the CPU"
    memory = ""
    if "memory" in trial:
        memory = f" and about {MEMORY_OF_TRIAL / 1e9:g} GB of memory"
    print(f"{place}, {at_once} trials at a time, {cpus:g} CPUs each{memory}.", flush=True)
    return trial


def trials_on_machine(has, trial):
    """Trials that a machine runs at a time; has: its resources, as Ray names them."""
    at_once = units(has.get("CPU", 0)) // units(trial["cpu"])
    if trial["gpu"]:
        at_once = min(at_once, trials_on_gpus(has.get("GPU", 0), trial["gpu"]))
    if "memory" in trial:
        at_once = min(at_once, int(has.get("memory", 0) // trial["memory"]))
    return at_once


def trials_on_gpus(n_gpus, gpus):
    """Trials that share n_gpus: a part of a GPU lies on one card, and whole ones are not shared."""
    if gpus < 1:
        return int(n_gpus) * (units(1) // units(gpus))
    return int(n_gpus // gpus)


def units(amount):
    """An amount of CPUs or GPUs as Ray counts it: in ten-thousandths, rounded down."""
    return int(amount * 10000 + 1e-6)


@contextlib.contextmanager
def restart_where_memory_ends():
    """Has Ray Tune start a trial again that Ray's memory monitor killed.

    It does so for one whose process died in another way, but knows no OutOfMemoryError, which would
    end the whole experiment.
    """
    original = RayActorManager._actor_task_failed

    def failed(manager, tracked_actor_task, exception):
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=LACK_OF_MEMORY)
        original(manager, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = original


def fit(trial, configs, experiment, args):
    """Has Ray Tune run a trial of each Config and log to ray/ of the experiment.

    Returns what failed trials say.
    """
    storage = experiment.storage
    console = Console(experiment.name, len(configs), args.report_seconds)
    dicts = [config.model_dump() for config in configs]
    tuner = tune.Tuner(
        trial,
        param_space={"config": tune.grid_search(dicts)},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # the next trial of an actor finds torch imported
            trial_name_creator=name_of,
            trial_dirname_creator=name_of,
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=f"{storage.root}/{experiment.name}/ray",
            storage_filesystem=storage.filesystem,
            callbacks=[console],
            # Seconds; all is written anew.
            sync_config=tune.SyncConfig(sync_period=10 if storage.is_local else 300),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=args.max_failures),
        ),
    )
    try:
        with restart_where_memory_ends():
            tuner.fit()
    except Exception as error:  # of many kinds: a full disk, a cluster that is gone
        raise InputError(
            f"Ray ended ({first_line(error)}): mend that, and the same command continues."
        ) from None
    return console.reasons


class Console(tune.Callback):
    """A line that renews itself, and a table of the trials when one starts or ends."""

    def __init__(self, name, n_trials, seconds):
        """seconds: least time between two tables."""
        self.name = name
        self.seconds = seconds
        self.due = 0  # time of the next table
        self.states = {}  # of the trials, by trial
        self.shown_states = None  # those of the last table
        self.reasons = []  # what failed trials say last
        self.bar = tqdm(
            total=n_trials,
            bar_format="{desc} [{elapsed}, {remaining} left]",
            disable=None,  # where there is no terminal
            leave=False,
            mininterval=0.5,
        )

    def on_step_end(self, iteration, trials, **info):
        # Kept, since an interruption lets Ray call all of them terminated.
        self.states = {trial: trial.status for trial in trials}
        states = list(self.states.values())
        epochs = [trial.last_result.get("training_iteration", 0) for trial in trials]
        ended = [n for n, trial in zip(epochs, trials, strict=True) if trial.is_finished()]

        # A trial that runs counts as the part of a usual one that it has done. Those that ended
        # may all have failed in their first epoch.
        budgets = [trial.config["config"]["max_epochs"] for trial in trials]
        usual = max(1, statistics.mean(ended or budgets or [1]))
        done = len(ended)
        for n, state in zip(epochs, states, strict=True):
            if state == "RUNNING":
                done += min(n / usual, 0.95)

        finished = states.count("TERMINATED")
        self.bar.set_description_str(
            f"{self.name}: {finished} of {self.bar.total} trials finished, {sum(epochs)} epochs",
            refresh=False,
        )
        self.bar.update(done - self.bar.n)

        changed = "RUNNING" in states and states != self.shown_states
        if changed and time.monotonic() >= self.due:
            self.shown_states = states
            self.due = time.monotonic() + self.seconds
            self.show(trials)

    def show(self, trials):
        """Prints the table."""
        all_configs = [trial.config["config"] for trial in trials]
        if len(trials) > MAX_ROWS:
            chosen = [trial for trial in trials if self.states.get(trial) in ("RUNNING", "ERROR")]
            trials = chosen or trials

        rows = []
        for trial in trials:
            state = STATES.get(self.states.get(trial), "waiting")
            rows.append({**trial.config["config"], **trial.last_result, "trial": state})
        table = pd.DataFrame(rows).rename(columns={"training_iteration": "epoch"})
        keys = [*PARAMETERS, *varying_keys(all_configs)]
        table = table.reindex(columns=[*keys, "trial", "epoch", *METRICS])
        text = table.to_string(index=False, na_rep="", float_format="%.4g", max_rows=MAX_ROWS)
        self.bar.write(f"{text}\n")

    def on_trial_error(self, iteration, trials, trial, **info):
        self.reasons.append(Path(trial.error_file).read_text().strip().splitlines()[-1])
        # Ray would unpickle it from the results folder.
        trial.run_metadata.pickled_error_filename = None

    def on_experiment_end(self, trials, **info):
        self.show(trials)
        self.bar.close()


def varying_keys(configs):
    """Keys beside PARAMETERS that have several values among configs, dicts."""
    values = pd.DataFrame(configs).astype(str)
    return [key for key in values.columns.drop(list(PARAMETERS)) if values[key].nunique() > 1]


def name_of(trial):
    """What Ray and TensorBoard call a trial: its key, and what tells it apart for people."""
    config = parse(trial.config["config"])
    parts = [config.key]
    for name in ("model_name", *PARAMETERS):
        parts.append(f"{name}={getattr(config, name)}")
    return "_".join(parts)
