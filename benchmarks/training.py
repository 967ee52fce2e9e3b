"""The sections that measure training: epochs, and single steps."""

import collections
import functools
import itertools
import statistics
import time
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import datasets
import dmel
import search_spaces
import train
from benchmarks import clip_by_clip
from benchmarks.measure import (
    first_config,
    forward_backward,
    fresh_process,
    medians,
    recordings_of,
)
from config import read_search_space
from summary import SEARCHED_WINDOWS

COST_REPEATS = 5  # epochs that count, after one to warm up
PRECISIONS = {"float32": {}, "TF32": {"tf32": True}, "bfloat16": {"bf16": True}}


def epoch(args):
    """An epoch, s; the first one also warms up and computes the features of a fixed window"""
    for name in args.experiments:
        is_slow = args.device == "cpu" and "esc50" in name  # a minute an epoch, whatever the window
        is_short = args.tiny or is_slow
        space = read_search_space(name, 2 if is_short else 4)
        windows = space["init_lambd"]["grid_search"]
        if is_short:
            windows = windows[:1]

        with fresh_process() as pool:
            for trainable, lambd in itertools.product((True, False), windows):
                changes = {"init_lambd": lambd, "lr_tf": 0.0, "device": args.device}
                config = first_config(space, trainable=trainable, **changes)
                first, *others = pool.submit(epoch_times, config, args).result()
                ours = statistics.median(others)
                standin = statistics.median(pool.submit(clip_by_clip_times, config, args).result())
                yield {
                    "experiment": name,
                    "window": "trainable" if trainable else "fixed",
                    "λ": lambd,
                    "DMEL": ours,
                    "first epoch": first,
                    "clip by clip": standin,
                    "ratio": f"{standin / ours:.1f}×",
                }


def epoch_times(config, args):
    data = datasets.load(config, recordings_of(config, args))
    times = [time.perf_counter()]
    train.train(config, data, lambda metrics, snapshot: times.append(time.perf_counter()))
    return np.diff(times).tolist()


def clip_by_clip_times(config, args):
    data = datasets.load(config, recordings_of(config, args))
    return [clip_by_clip.epoch_seconds(config, data) for _ in range(config.max_epochs // 2)]


def cost(args):
    """Cost of a DMEL run, divided by that of a search among 10 fixed windows, nothing cached"""
    for name in args.experiments:
        space = read_search_space(name, 2 if args.tiny else 1 + COST_REPEATS)
        windows = space["init_lambd"]["grid_search"]
        is_slow = args.device == "cpu" and "esc50" in name  # a minute an epoch, whatever the window
        if is_slow or args.tiny:
            windows = windows[1:2]
        times = {True: [], False: []}
        for window in windows:
            for trainable in times:
                changes = {"init_lambd": window, "lr_tf": 0.0, "device": args.device}
                config = first_config(space, trainable=trainable, **changes)
                with fresh_process() as pool:
                    _, *epochs = pool.submit(epoch_times_without_cache, config, args).result()
                times[trainable].append(epochs)

        trained = np.mean(times[True], axis=0)  # over the windows, for each repetition
        fixed = np.mean(times[False], axis=0)
        quotients = trained / (SEARCHED_WINDOWS * fixed)
        yield {
            "experiment": name,
            "DMEL, s": statistics.median(trained),
            "fixed, s": statistics.median(fixed),
            "quotient": statistics.median(quotients),
            "quotients": quotients.tolist(),
        }


def epoch_times_without_cache(config, args):
    """Seconds of each epoch, where features of a fixed window are computed anew in each."""
    with mock.patch.object(train, "fixed_features", lambda *_: None):
        return epoch_times(config, args)


def step(args):
    """A training step of panns_cnn6 on 32 clips of 5 s, window 35 ms, and the layer alone, ms"""
    for precision, keys in PRECISIONS.items():
        changes = {"init_lambd": 46.7, "lr_tf": 0.0, "device": args.device, **keys}
        config = first_config(search_spaces.esc50(1), **changes)
        n_clips = 2 if args.tiny else config.batch_size
        clips = torch.randn(n_clips, config.n_points, device=args.device)

        net, loss_function, device = train.prepare(config)
        whole, alone = medians(
            args,
            step_of(config, clips, net, loss_function, device),
            forward_backward(net.spectrogram_layer, clips),
        )
        yield {
            "precision": precision,
            "step": whole,
            "layer": alone,
            "part": f"{100 * alone / whole:.1f} %",
        }


def step_of(config, clips, net, loss_function, device):
    """A call that makes one training step on all of the clips."""
    indices = torch.arange(len(clips), device=device)
    labels = indices % datasets.PULSES_CLASSES  # classes that every dataset has
    data = datasets.Data(clips, labels, splits={})
    optimizer = train.make_optimizer(net, config)
    return functools.partial(train.train_epoch, net, loss_function, optimizer, data, [indices])


def operators(args):
    """Operators that one training step starts, window trained, on one batch; views and allocations
    left out
    """
    for space in (search_spaces.time_frequency, search_spaces.audio_mnist, search_spaces.esc50):
        # On the CPU: the number is the same on every machine.
        config = first_config(space(1), window=1, lr_tf=0.0, device="cpu")
        n_clips = 2 if args.tiny else config.batch_size
        clips = torch.randn(n_clips, config.n_points)

        net, loss_function, device = train.prepare(config)
        ours = count_operators(step_of(config, clips, net, loss_function, device)).total()
        layer = count_operators(forward_backward(net.spectrogram_layer, clips)).total()
        standin = count_operators(step_of(config, clips, *clip_by_clip.prepare(config))).total()
        yield {
            "experiment": config.dataset_name,
            "clips": len(clips),
            "DMEL": ours,
            "of which the layer": layer,
            "clip by clip": standin,
            "ratio": f"{standin / ours:.0f}×",
        }


def count_operators(function):
    """Counter, by name, of the operators that a second call starts.

    The first call fills caches and optimizer state. The frames of a batch are one block, as on a
    GPU.
    """
    with mock.patch.object(dmel, "CPU_BLOCK", dmel.GPU_BLOCK):
        function()
        with OperatorCounter() as counter:
            function()
    return counter.counts


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that compute or copy, about the kernels that a GPU would start.

    Left out are views, detach and _unsafe_view among them, allocations, and what neither takes nor
    returns a tensor. Reading a number out of a tensor (_local_scalar_dense) counts: it is a copy
    that the host waits for.
    """

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        is_view = operator.is_view or torch.Tag.inplace_view in operator.tags
        is_view = is_view or name == "_unsafe_view"
        is_allocation = "empty" in name
        if not is_view and not is_allocation and "Tensor" in str(operator._schema):
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


SECTIONS = (epoch, cost, step, operators)
