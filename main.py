"""Trains the grid of an experiment with Ray Tune, several trials at a time.

    python main.py --name=time_frequency --max_epochs=1000 --num_samples=10
    python main.py --name=esc50 --data_dir=data --ray_root_dir=ray_results

Results go to RAY_ROOT_DIR/NAME, see results.py. The same command again continues what was interrupted and leaves
finished trials alone; a larger --num_samples adds the missing runs. Exit codes: 0 all trials are finished, 1 a sentence
says why it did not run to the end, 3 it did but some trials failed.
"""

import argparse
import inspect
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the console output that shows a table of chosen columns
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")  # short trials may end often

import ray
import torch
from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.sample import Domain, Sampler
from ray.tune.search.variant_generator import generate_variants

import datasets
import search_spaces
import train
from datasets import InputError
from results import CHECKPOINT_FILE, Experiment, KeepReports, finished, read_checkpoint

# Trials keep the memory that they free for their next step: fetching it from the system each time costs a third more.
MEMORY = {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**29)}
RESOURCES_PER_TRIAL = {"cpu": 4, "gpu": 0.25}
CHECKPOINT_SECONDS = 10  # work that an interruption may cost a trial
MAX_FAILURES = 3  # times that a failed trial starts again from its checkpoint: its worker or its machine may have died
SOME_FAILED = 3  # exit code
REPORT_SECONDS = 10  # between console tables
PARAMETER_COLUMNS = ["init_lambd", "trainable", "model_name", "seed"]
FLAG_MINIMUM = {"num_samples": 1, "max_epochs": 1, "seed": 0, "cpus_per_trial": 1, "gpus_per_trial": 0}
METRIC_COLUMNS = ["loss", "valid_loss", "valid_acc", "best_valid_acc", "lambd_est", "training_iteration"]


def main():
    args = parse_args()
    search_space = select_search_space(args.name)(args.max_epochs)
    if search_space.get("checkpoint_path"):  # trials run in a folder of Ray's
        search_space["checkpoint_path"] = os.path.abspath(search_space["checkpoint_path"])
    configs = check_search_space(search_space)
    experiment = Experiment(args.ray_root_dir, args.name, args.restart)
    if experiment.aside:
        print(f"{args.name}: what was there is now {experiment.aside}")
    experiment.claim(describe(search_space))
    seeds = range(args.seed, args.seed + args.num_samples)
    missing = [seed for seed in seeds if seed not in experiment.seeds()]
    unfinished = [batch for batch in experiment.record["batches"] if not experiment.is_finished(batch)]
    if not missing and not unfinished:
        experiment.tidy()
        print(f"{args.name}: all trials are finished, in {experiment.address}")
        return

    recordings = datasets.recordings_of(search_space, args.data_dir)
    if recordings is not None:
        for config in configs:
            datasets.split_recordings(config["dataset_name"], recordings.groups, config.get("split"))
    connect(args.ray_address)
    resources = choose_resources(args)
    batches = unfinished + ([experiment.add_batch(missing, len(configs))] if missing else [])
    trainable = tune.with_resources(tune.with_parameters(run_trial, recordings=recordings), resources)

    failures = []
    for batch in batches:
        results = make_tuner(trainable, search_space, experiment, batch).fit()
        failed = [result for result in results if result.error is not None]
        failures += failed
        if sum(map(finished, results)) + len(failed) < batch["n_trials"]:
            raise KeyboardInterrupt
        if any(finished(result) and result.metrics["lacked_memory"] for result in results):
            print("Too little memory to keep the features of fixed windows: trials computed them anew in every epoch.")
    experiment.tidy()
    if failures:
        messages = sorted({str(failure.error).strip().splitlines()[-1] for failure in failures})
        print(f"main.py: {len(failures)} trials of {args.name} failed: {'; '.join(messages)}", file=sys.stderr)
        sys.exit(SOME_FAILED)
    print(f"{args.name}: all trials are finished, in {experiment.address}")


def parse_args():
    parser = argparse.ArgumentParser(description="Train the grid of an experiment with Ray Tune.")
    parser.add_argument("--name", required=True, help="experiment: a search space's name, or one that contains it")
    parser.add_argument("--num_samples", type=int, default=1, help="runs of the grid (1)")
    parser.add_argument("--max_epochs", type=int, default=1000, help="epochs of a trial at most (1000)")
    parser.add_argument("--ray_root_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--data_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run, each further has one more (0)")
    parser.add_argument("--cpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['cpu']}, without a GPU 1)")
    parser.add_argument("--gpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['gpu']}, without a GPU 0)")
    parser.add_argument("--ray_address", help="Ray cluster to run on, such as auto (default: a private one here)")
    parser.add_argument("--restart", action="store_true", help="move the experiment's old results aside and start anew")
    args = parser.parse_args()
    for flag, minimum in FLAG_MINIMUM.items():
        value = getattr(args, flag)
        if value is not None and not value >= minimum:
            raise InputError(f"--{flag}={value:g} must be {minimum} or more.")
    return args


def connect(address):
    """Joins the Ray cluster at an address; without one starts a private one on this machine."""
    options = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        os.environ.update(MEMORY | os.environ)  # trials inherit it
        ray.init(address="local", include_dashboard=False, **options)
    else:
        with tempfile.TemporaryDirectory() as scripts:  # trials get these and this environment wherever they run
            for script in Path(__file__).parent.glob("*.py"):
                shutil.copy(script, scripts)
            try:
                if ":" in address:  # Ray would try for minutes
                    host, port = address.rsplit(":", 1)
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=address, runtime_env={"working_dir": scripts, "env_vars": MEMORY}, **options)
            except Exception as error:  # of many kinds, some of many lines
                reason = (str(error).strip() or repr(error)).splitlines()[0]
                remedy = "check that address, and that RAY_AUTH_MODE and the token here are the cluster's"
                message = f"--ray_address={address}: no Ray cluster can be joined ({reason:.300}): {remedy}."
                raise InputError(message) from None
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: Ray Tune leaves a state to continue from
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))


def run_trial(config, recordings):
    """What Ray runs for a trial: trains, reports every epoch and leaves a checkpoint now and then and at the end."""
    torch.set_num_threads(max(1, int(tune.get_context().get_trial_resources().required_resources["CPU"])))
    state = None
    if checkpoint := tune.get_checkpoint():
        state = read_checkpoint(checkpoint)
    last_checkpoint = time.monotonic()

    def report(metrics, snapshot):
        nonlocal last_checkpoint
        if not metrics["finished"] and time.monotonic() - last_checkpoint < CHECKPOINT_SECONDS:
            tune.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(snapshot(), Path(folder, CHECKPOINT_FILE))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
        last_checkpoint = time.monotonic()

    train.train(config, datasets.load(config, recordings), report, state)


def make_tuner(trainable, search_space, experiment, batch):
    """The Ray Tune experiment of a batch of runs, restored where it was interrupted."""
    if experiment.trials(batch):
        folder = f"{experiment.address}/{batch['folder']}"
        return tune.Tuner.restore(folder, trainable, resume_unfinished=True, resume_errored=True)
    reporter = tune.CLIReporter(
        parameter_columns=PARAMETER_COLUMNS,
        metric_columns=METRIC_COLUMNS,
        max_report_frequency=REPORT_SECONDS,
        max_progress_rows=50,
    )
    return tune.Tuner(
        trainable,
        param_space={**search_space, "seed": tune.grid_search(batch["seeds"])},
        tune_config=tune.TuneConfig(
            metric="valid_loss",
            mode="min",
            search_alg=BasicVariantGenerator(random_state=batch["seeds"][0]),
            reuse_actors=True,  # the next trial finds torch imported
        ),
        run_config=tune.RunConfig(
            name=batch["folder"],
            storage_path=experiment.address,
            progress_reporter=reporter,
            callbacks=[KeepReports()],
            verbose=1,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            # Two, as Ray may notice the last one only after the one before was removed.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )


def select_search_space(name):
    """The search space of that name, or the one with the longest name that is part of it."""
    functions = inspect.getmembers(search_spaces, inspect.isfunction)
    spaces = {key: function for key, function in functions if function.__module__ == search_spaces.__name__}
    contained = [key for key in spaces if key in name]
    if not contained:
        raise InputError(f"--name={name} contains none of the experiments in search_spaces.py: {', '.join(spaces)}.")
    return spaces[name if name in spaces else max(contained, key=len)]


def check_search_space(search_space):
    """One config per cell of the grid; raises InputError on unknown keys and on a cell that cannot be trained."""
    unknown = search_space.keys() - search_spaces.KEYS.keys()
    if unknown:
        raise InputError(
            f"config: unknown key {', '.join(sorted(unknown))}; known are {', '.join(search_spaces.KEYS)}."
        )
    for key in ("dataset_name", "resample_rate", "n_points"):
        if isinstance(search_space.get(key), (dict, Domain)):
            raise InputError(f"config: {key} must be one value: a search space works on one set of clips.")
    known = ("time_frequency", *datasets.DATASETS)
    if search_space.get("dataset_name") not in known:
        raise InputError(f"config: dataset_name '{search_space.get('dataset_name')}' is not one of {', '.join(known)}.")
    configs = [config for _, config in generate_variants(search_space)]
    for config in configs:
        train.check(config)
    return configs


def describe(value):
    """A search space, or a part of it, in plain values that can be written to a file and compared."""
    if isinstance(value, (Domain, Sampler)):
        return {type(value).__name__: describe(vars(value))}
    if isinstance(value, dict):
        return {key: describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    return value.__qualname__ if callable(value) else value


def choose_resources(args):
    """CPUs and GPUs of a trial: as asked for, otherwise RESOURCES_PER_TRIAL as far as the machines have them."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(node.get("CPU", 0), node.get("GPU", 0)) for node in alive]
    for i, (kind, wish) in enumerate((("cpu", args.cpus_per_trial), ("gpu", args.gpus_per_trial))):
        largest = max(node[i] for node in nodes)
        if wish is not None and wish > largest:
            raise InputError(f"--{kind}s_per_trial={wish:g} cannot be met: there are {largest:g} here.")
    with_gpu = [(cpus, gpus) for cpus, gpus in nodes if gpus > 0]
    gpu = (RESOURCES_PER_TRIAL["gpu"] if with_gpu else 0) if args.gpus_per_trial is None else args.gpus_per_trial
    cpu = 1
    if gpu > 0:  # as many trials as share the GPUs of a machine share its CPUs
        cpu = min(RESOURCES_PER_TRIAL["cpu"], *(max(1, int(cpus * gpu / gpus)) for cpus, gpus in with_gpu))
    cpu = cpu if args.cpus_per_trial is None else args.cpus_per_trial
    at_once = sum(int(min(cpus / cpu, gpus / gpu if gpu else cpus) + 1e-6) for cpus, gpus in nodes)
    if at_once < 1:
        raise InputError(f"no machine here has {cpu:g} CPUs and {gpu:g} GPUs together: ask for less per trial.")
    device = "Training on GPUs" if gpu else "Training on the CPU" if with_gpu else "No CUDA device: training on the CPU"
    print(f"{device}, {at_once} trials at a time, {cpu:g} CPUs each.", flush=True)
    return {"cpu": cpu, "gpu": gpu}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"main.py: {error}")
    except KeyboardInterrupt:
        sys.exit("main.py: interrupted: the same command continues.")
