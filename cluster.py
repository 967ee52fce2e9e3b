"""The Ray cluster that trials run on, a private one on this machine or one that is there, and Ray
Tune on it.
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
os.environ.setdefault(
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0"
)  # short trials may end often

import pandas as pd
import psutil
import ray
import torch
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

from config import InputError, first_line, trial_key

# Trials keep the memory that they free for their next step: fetching it from the system each time
# costs a third more.
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
}
GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}  # a trial that is given none sees none
MAX_ROWS = 40  # of a table on the console; of more trials it shows those that run or failed
PARAMETERS = ("init_lambd", "trainable", "seed")
STATES = {"RUNNING": "runs", "TERMINATED": "finished", "ERROR": "failed"}
OPTIONS = {"log_to_driver": False, "logging_level": "error"}
LONGEST_PLACE = 20  # characters before a cluster's folder: Ray adds some 80 for a Unix socket, which may have 107
# Waits for the end of main.py, however it comes, and leaves neither processes that have files in
# its folder nor that.
CLEAN_UP = """
exec 2>/dev/null
read -r _
find /proc/[0-9]*/fd -lname "$1/*" | cut -d / -f 3 | sort -u | grep -vx "$PPID" | xargs -r kill -9
rm -rf "$1"
"""


@contextlib.contextmanager
def connected(address=None):
    """Ray, on the cluster at an address or on one for this process alone; as long as it lasts,
    signals end Ray Tune.
    """
    with contextlib.ExitStack() as stack:
        try:
            start(stack) if address is None else join(address)
        except Exception as error:  # of many kinds
            what = (
                "Ray cannot start here"
                if address is None
                else f"--ray_address={address}: no Ray cluster joined"
            )
            raise InputError(f"{what} ({first_line(error)}): mend that and start again.") from None
        stack.callback(ray.shutdown)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
        yield


def start(stack):
    """A cluster of which others on this machine have neither the token nor the folder, which goes
    with the stack.
    """
    folder = tempfile.mkdtemp(
        prefix="dmel-", dir=None if len(tempfile.gettempdir()) <= LONGEST_PLACE else "/tmp"
    )
    guard = ["sh", "-c", CLEAN_UP, "sh", folder]
    stack.enter_context(subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True))
    os.environ.update(MEMORY | GPUS | os.environ)  # trials inherit it
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    n_gpus = (
        None if torch.cuda.is_available() else 0
    )  # with an old driver Ray counts GPUs that torch cannot use
    ray.init(
        address="local",
        num_gpus=n_gpus,
        include_dashboard=False,
        _temp_dir=f"{folder}/ray",
        **OPTIONS,
    )

    def tell(head):  # Ray itself takes a minute and many lines
        if ray.is_initialized():  # not ended by ray.shutdown
            print(
                "\nmain.py: a process of Ray ended, or was killed: the same command continues.",
                file=sys.stderr,
            )
            os._exit(1)  # what else is there to end is the guard's

    heads = [
        child for child in psutil.Process().children() if child.name() in ("gcs_server", "raylet")
    ]
    threading.Thread(target=psutil.wait_procs, args=(heads, None, tell), daemon=True).start()


def join(address):
    """The cluster at an address; trials get the scripts, as they are now, wherever they run."""
    if ":" in address:  # Ray would try for minutes
        socket.create_connection(address.rsplit(":", 1), timeout=10).close()
    scripts = {"working_dir": str(Path(__file__).parent), "excludes": ["/*", "!/.", "!/*.py"]}
    ray.init(address=address, runtime_env={**scripts, "env_vars": MEMORY | GPUS}, **OPTIONS)


def check_nodes(experiment, plan):
    """Raises InputError where a machine of the cluster does not see the plan: it would keep its
    trials to itself.
    """
    sees_plan = ray.remote(num_cpus=0)(lambda: experiment.read_plan() == plan)
    for node in ray.nodes():
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if node["Alive"] and not ray.get(sees_plan.options(scheduling_strategy=place).remote()):
            how = "name a --ray_root_dir that all machines see, such as a shared folder or s3://bucket/results"
            raise InputError(
                f"{node['NodeManagerHostname']} does not see {experiment.address}/experiment.json: {how}."
            )


def resources(wanted, cpus=None, gpus=None):
    """CPUs and GPUs of a trial: cpus and gpus as asked for, otherwise those wanted as far as the
    machines have them.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines = [(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes]
    most_cpus, most_gpus = map(max, zip(*machines, strict=True))
    gpus = (wanted["gpu"] if most_gpus else 0) if gpus is None else gpus
    if cpus is None:  # as many trials as share the GPUs of a machine share its CPUs
        shares = [max(1, int(n_cpus * gpus / n_gpus)) for n_cpus, n_gpus in machines if n_gpus]
        cpus = min([wanted["cpu"], *shares]) if gpus else 1
    at_once = sum(
        int(min(n_cpus / cpus, n_gpus / gpus if gpus else n_cpus) + 1e-6)
        for n_cpus, n_gpus in machines
    )
    if at_once < 1:
        told = f"{cpus:g} CPUs and {gpus:g} GPUs for a trial, but {most_cpus:g} CPUs and {most_gpus:g} GPUs at most"
        raise InputError(f"no machine has {told}: lower --cpus_per_trial or --gpus_per_trial.")
    how = (
        "Training on GPUs"
        if gpus
        else "Training on the CPU"
        if most_gpus
        else "No CUDA device: training on the CPU"
    )
    print(f"{how}, {at_once} trials at a time, {cpus:g} CPUs each.", flush=True)
    return {"cpu": cpus, "gpu": gpus}


def fit(trial, configs, experiment, args):
    """Has Ray Tune run a trial of each config and log to ray/ of the experiment; returns what
    failed ones say.
    """
    storage, console = (
        experiment.storage,
        Console(experiment.name, len(configs), args.report_seconds),
    )
    tuner = tune.Tuner(
        trial,
        param_space={"config": tune.grid_search(configs)},
        # The next trial of a reused actor finds torch imported.
        tune_config=tune.TuneConfig(
            reuse_actors=True, trial_name_creator=name_of, trial_dirname_creator=name_of
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=f"{storage.root}/{experiment.name}/ray",
            storage_filesystem=storage.filesystem,
            callbacks=[console],
            sync_config=tune.SyncConfig(
                sync_period=10 if storage.is_local else 300
            ),  # s; all is written anew
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=args.max_failures),
        ),
    )
    try:
        tuner.fit()
    except Exception as error:  # of many kinds: a full disk, a cluster that is gone
        raise InputError(
            f"Ray ended ({first_line(error)}): mend that, and the same command continues."
        ) from None
    return console.reasons


class Console(tune.Callback):
    """A table of the trials when one starts or ends, not more often than asked, and a line that
    renews itself.
    """

    def __init__(self, name, n_trials, seconds):
        self.name, self.seconds, self.due, self.states, self.shown = name, seconds, 0, {}, None
        self.reasons = []  # what failed trials say last
        line = "{desc} [{elapsed}, {remaining} left]"
        self.bar = tqdm(total=n_trials, bar_format=line, disable=None, leave=False, mininterval=0.5)

    def on_step_end(self, iteration, trials, **info):
        self.states = {
            trial: trial.status for trial in trials
        }  # an interruption lets Ray call them all terminated
        states, epochs = (
            [*self.states.values()],
            [trial.last_result.get("training_iteration", 0) for trial in trials],
        )
        ended = [n for n, trial in zip(epochs, trials, strict=True) if trial.is_finished()]
        usual = statistics.mean(
            ended or [trial.config["config"]["max_epochs"] for trial in trials] or [1]
        )
        running = (
            min(n / usual, 0.95)
            for n, state in zip(epochs, states, strict=True)
            if state == "RUNNING"
        )
        told = f"{states.count('TERMINATED')} of {self.bar.total} trials finished, {sum(epochs)} epochs"
        self.bar.set_description_str(f"{self.name}: {told}", refresh=False)
        self.bar.update(len(ended) + sum(running) - self.bar.n)
        if "RUNNING" in states and states != self.shown and time.monotonic() >= self.due:
            self.shown, self.due = states, time.monotonic() + self.seconds
            self.show(trials)

    def show(self, trials):
        if len(trials) > MAX_ROWS:
            trials = [
                trial for trial in trials if self.states.get(trial) in ("RUNNING", "ERROR")
            ] or trials
        rows = [trial.config["config"] | trial.last_result for trial in trials]
        table = pd.DataFrame(rows).rename(columns={"training_iteration": "epoch"})
        table["trial"] = [STATES.get(self.states.get(trial), "waiting") for trial in trials]
        table = table.reindex(
            columns=[*PARAMETERS, "trial", "epoch", "loss", "valid_loss", "valid_acc", "lambd_est"]
        )
        self.bar.write(
            table.to_string(index=False, na_rep="", float_format="%.4g", max_rows=MAX_ROWS) + "\n"
        )

    def on_trial_error(self, iteration, trials, trial, **info):
        self.reasons.append(Path(trial.error_file).read_text().strip().splitlines()[-1])
        trial.run_metadata.pickled_error_filename = (
            None  # Ray would unpickle it from the results folder
        )

    def on_experiment_end(self, trials, **info):
        self.show(trials)
        self.bar.close()


def name_of(trial):
    """What Ray and TensorBoard call a trial: its key, and what tells it apart for people."""
    config = trial.config["config"]
    return "_".join(
        [trial_key(config), *(f"{key}={config[key]}" for key in ("model_name", *PARAMETERS))]
    )
