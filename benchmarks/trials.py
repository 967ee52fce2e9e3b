"""The sections that run trials through Ray."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from ray import tune

import cluster
import datasets
import machine
import main
import search_spaces
from benchmarks.measure import first_config, recordings_of
from config import read_search_space
from datasets import DATASETS
from recordings import Source, write_cache
from results import Experiment


def start(args):
    """Start of a trial, s: what it takes beyond an empty one of Ray's and beyond its epochs"""
    config = first_config(search_spaces.time_frequency(1), init_lambd=6.38).model_dump()
    n = 2 if args.tiny else 8

    def seconds_per_trial(function, n_epochs):
        configs = [{**config, "max_epochs": n_epochs, "seed": seed} for seed in range(n)]
        seconds, _ = timed(run, function, {"config": tune.grid_search(configs)})
        return seconds / n

    with cluster.connected(), tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(folder, "start")
        trial = tune.with_parameters(
            main.run_trial, recordings=None, data=None, experiment=experiment, save_seconds=10
        )
        run(do_nothing, {"config": tune.grid_search([{}] * n)})  # workers start
        empty = seconds_per_trial(do_nothing, 1)
        one = seconds_per_trial(trial, 1)
        three = seconds_per_trial(trial, 3)

    epoch = (three - one) / 2
    yield {
        "empty trial": empty,
        "trial of one epoch": one,
        "epoch": epoch,
        "start": one - epoch - empty,
    }


def copies(args):
    """Memory for the data, two trials at a time on one node, MiB"""
    n_clips = 500 if args.tiny else 10000
    clips = np.random.default_rng(0).standard_normal((n_clips, 8000), dtype=np.float32)
    labels = np.zeros(n_clips, np.int64)
    speakers = np.arange(n_clips) % 60 + 1
    recordings = datasets.Recordings(clips, labels, speakers)

    with cluster.connected():
        trial = tune.with_parameters(touch, recordings=recordings)
        results = run(trial, {"seed": tune.grid_search([0, 1])}, cpus=machine.cpus() / 2)
    for i, result in enumerate(results):
        yield {
            "trial": i,
            "data": clips.nbytes / 2**20,
            "its own memory for it": result.metrics["own"] / 2**20,
        }


def grid(args):
    """The grid of an experiment, 6 trials through main.py"""
    n_epochs = 2 if args.tiny else 6
    if args.device == "cuda":
        n_gpus = torch.cuda.device_count()
        shares = {n * n_gpus: f"--gpus_per_trial={1 / n}" for n in (1, 4)}
    else:
        n_cpus = machine.cpus()
        shares = {n: f"--cpus_per_trial={n_cpus // n}" for n in sorted({1, n_cpus})}

    for name in args.experiments:
        for n, share in shares.items():
            wall, histories = run_grid(name, n_epochs, share, args)

            # The first epoch of a trial also warms up.
            per_epoch = 0.0
            for history in histories:
                seconds = statistics.median(row["time_this_iter_s"] for row in history[1:])
                per_epoch += seconds / min(n, len(histories))
            yield {
                "experiment": name,
                "trials at a time": n,
                f"wall time of {n_epochs} epochs, s": wall,
                "one epoch of all, s": per_epoch,
                f"{args.epochs} epochs of all, minutes": per_epoch * args.epochs / 60,
            }


def run_grid(name, n_epochs, share, args):
    """Seconds of a run of main.py, start included, and the history of each of its trials."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        data_dir = args.data_dir
        if args.complete:
            data_dir = complete_data(name, args, Path(folder, "data"))
            environment.pop("DMEL_CACHE_DIR", None)  # the cache was laid out in data_dir

        command = [
            sys.executable,
            main.__file__,
            f"--name={name}",
            f"--max_epochs={n_epochs}",
            f"--data_dir={data_dir}",
            share,
            f"--ray_root_dir={folder}",
        ]
        wall, _ = timed(subprocess.run, command, check=True, capture_output=True, env=environment)

        experiment = Experiment(folder, name)
        trials = experiment.read_trials(experiment.read_plan().trials)
        return wall, [state["history"] for _, state in trials]


def complete_data(name, args, folder):
    """Writes the cache of the repeated recordings into a data folder and returns that."""
    config = first_config(read_search_space(name, 1))
    recordings = recordings_of(config, args)
    if recordings is None:
        return folder

    sources = []
    for label, group in zip(recordings.labels, recordings.groups, strict=True):
        sources.append(Source("", 0, 0, int(label), int(group), sha256=""))

    dataset_name = config.dataset_name
    settings = {
        "sample_rate": config.resample_rate,
        "n_points": config.n_points,
        "fit": DATASETS[dataset_name].fit.__name__,
    }
    file_name = f"{dataset_name}_{config.resample_rate}Hz_{config.n_points}.npy"
    cache = folder / dataset_name / file_name
    cache.parent.mkdir(parents=True)
    write_cache(cache, settings, sources, recordings.clips)
    return folder


def run(trainable, space, cpus=None):
    """Results of the trials of a space, one at a time unless each takes fewer CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        return tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus or machine.cpus()}),
            param_space=space,
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()


def timed(function, *args, **options):
    begin = time.perf_counter()
    result = function(*args, **options)
    return time.perf_counter() - begin, result


def do_nothing(config):
    tune.report({"valid_loss": 0.0})


def touch(config, recordings):
    """Loads the data as a trial does, reads all of it, and reports this process's own memory."""
    before = psutil.Process().memory_full_info().uss
    config = first_config(search_spaces.audio_mnist(1))
    data = datasets.load(config, recordings)
    data.clips.sum()
    time.sleep(3)  # until the other trial has read it too
    tune.report({"own": psutil.Process().memory_full_info().uss - before})


SECTIONS = (start, copies, grid)
