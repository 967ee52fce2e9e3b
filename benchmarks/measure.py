"""What the sections share: times, fresh processes, recordings."""

import concurrent.futures
import multiprocessing
import statistics
import time

import numpy as np
import torch

import datasets
from config import parse


def medians(args, *functions):
    """Median milliseconds of each function.

    Bursts of calls are made in turns, the first call of each burst to warm up.
    """
    times = [[] for _ in functions]
    for _ in range(1 if args.tiny else 4):
        for function, its_times in zip(functions, times, strict=True):
            calls = 0
            begin = time.perf_counter()
            while calls < 3 or (not args.tiny and time.perf_counter() - begin < 0.3):
                start = time.perf_counter()
                function()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if calls > 0:
                    its_times.append(1000 * (time.perf_counter() - start))
                calls += 1
    return [statistics.median(its_times) for its_times in times]


def fresh_process():
    """A pool of one new process."""
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def forward_backward(way, clips):
    """A call that computes features and, from a given upstream gradient, the gradient of λ."""
    upstream = torch.randn_like(way(clips))
    return lambda: torch.autograd.grad(way(clips), way.lambd, upstream)


def first_config(space, window=0, **changes):
    """The Config of a trained trial of a search space, with one of its windows, by number."""
    lambd = space["init_lambd"]
    if isinstance(lambd, dict):
        lambd = lambd["grid_search"][window]
    chosen = {"trainable": True, "init_lambd": lambd, "seed": 0}
    return parse({**space, **chosen, **changes})


def recordings_of(config, args):
    """Recordings of a Config; --complete repeats them up to the complete dataset's number."""
    recordings = datasets.recordings_of(config, args.data_dir)
    if recordings is None or not args.complete:
        return recordings
    n_complete = datasets.DATASETS[config.dataset_name].n_recordings
    repeated = np.arange(n_complete) % len(recordings.clips)
    return datasets.Recordings(
        clips=recordings.clips[repeated],
        labels=recordings.labels[repeated],
        groups=recordings.groups[repeated],
    )
