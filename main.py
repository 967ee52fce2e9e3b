"""Trains the grid of an experiment with Ray Tune, several trials at a time.

    python main.py --name=time_frequency --max_epochs=1000 --num_samples=10
    python main.py --name=esc50 --data_dir=data --ray_root_dir=ray_results

Results go to RAY_ROOT_DIR/NAME, see results.py. The same command again continues what was interrupted and leaves
finished trials alone; a larger --num_samples adds the missing runs.
"""

import argparse
import inspect
import os
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
from results import CHECKPOINT_FILE, Experiment

RESOURCES_PER_TRIAL = {"cpu": 4, "gpu": 0.25}
CHECKPOINT_SECONDS = 10  # work that an interruption may cost a trial
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
    experiment = Experiment(args.ray_root_dir, args.name)
    experiment.claim(describe(search_space))
    seeds = range(args.seed, args.seed + args.num_samples)
    missing = [seed for seed in seeds if seed not in experiment.seeds()]
    unfinished = [batch for batch in experiment.record["batches"] if not experiment.is_finished(batch)]
    if not missing and not unfinished:
        print(f"{args.name}: all trials are finished, in {experiment.folder}")
        return

    recordings = datasets.recordings_of(search_space, args.data_dir)
    if recordings is not None:
        for config in configs:
            datasets.split_recordings(config["dataset_name"], recordings.groups, config.get("split"))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error")
    resources = choose_resources(args)
    batches = unfinished + ([experiment.add_batch(missing, len(configs))] if missing else [])
    trainable = tune.with_resources(tune.with_parameters(run_trial, recordings=recordings), resources)

    failures = []
    for batch in batches:
        results = make_tuner(trainable, search_space, experiment, batch).fit()
        failures += [result for result in results if result.error is not None]
        if not failures and not experiment.is_finished(batch):
            sys.exit(f"main.py: interrupted: the same command continues {args.name}.")
    if failures:
        messages = {str(failure.error).strip().splitlines()[-1] for failure in failures}
        sys.exit(f"main.py: {len(failures)} trials of {args.name} failed: {'; '.join(sorted(messages))}")
    print(f"{args.name}: all trials are finished, in {experiment.folder}")


def parse_args():
    parser = argparse.ArgumentParser(description="Train the grid of an experiment with Ray Tune.")
    parser.add_argument("--name", required=True, help="experiment: a search space's name, or one that contains it")
    parser.add_argument("--num_samples", type=int, default=1, help="runs of the grid (1)")
    parser.add_argument("--max_epochs", type=int, default=1000, help="epochs of a trial at most (1000)")
    parser.add_argument("--ray_root_dir", default="ray_results", help="folder of all results (ray_results)")
    parser.add_argument("--data_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run, each further has one more (0)")
    parser.add_argument("--cpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['cpu']}, without a GPU 1)")
    parser.add_argument("--gpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['gpu']}, without a GPU 0)")
    args = parser.parse_args()
    for flag, minimum in FLAG_MINIMUM.items():
        value = getattr(args, flag)
        if value is not None and not value >= minimum:
            raise InputError(f"--{flag}={value:g} must be {minimum} or more.")
    return args


def run_trial(config, recordings):
    """What Ray runs for a trial: trains, reports every epoch and leaves a checkpoint now and then and at the end."""
    torch.set_num_threads(max(1, int(tune.get_context().get_trial_resources().required_resources["CPU"])))
    state = None
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, CHECKPOINT_FILE), map_location="cpu", weights_only=True)
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
    folder = experiment.folder / batch["folder"]
    if experiment.trials(batch):
        return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, resume_errored=True)
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
            name=folder.name,
            storage_path=str(experiment.folder),
            progress_reporter=reporter,
            verbose=1,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
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
    if search_space.get("dataset_name") not in datasets.N_CLASSES:
        known = ", ".join(datasets.N_CLASSES)
        raise InputError(f"config: dataset_name '{search_space.get('dataset_name')}' is not one of {known}.")
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
    """CPUs and GPUs of a trial: as asked for, otherwise RESOURCES_PER_TRIAL as far as the machine has them."""
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0), total.get("GPU", 0)
    resources = dict(RESOURCES_PER_TRIAL)
    if gpus == 0:
        resources = {"cpu": 1, "gpu": 0}
    elif resources["cpu"] > cpus:
        resources["cpu"] = max(1, int(cpus * resources["gpu"] / gpus))
    for kind, wish, available in (("cpu", args.cpus_per_trial, cpus), ("gpu", args.gpus_per_trial, gpus)):
        if wish is not None and wish > available:
            raise InputError(f"--{kind}s_per_trial={wish:g} cannot be met: there are {available:g} here.")
        resources[kind] = resources[kind] if wish is None else wish
    if gpus == 0:
        at_once = int(cpus / resources["cpu"])
        print(f"No CUDA device: training on the CPU, {at_once} trials at a time.", flush=True)
    elif resources["cpu"] < RESOURCES_PER_TRIAL["cpu"]:
        print(f"With {cpus:g} CPUs here, a trial gets {resources['cpu']:g}.", flush=True)
    return resources


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"main.py: {error}")
    except KeyboardInterrupt:
        sys.exit("main.py: interrupted: the same command continues.")
