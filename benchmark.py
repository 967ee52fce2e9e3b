"""Measures the layer, the epochs and the grid beside the usual way of doing the same, in one run on one machine.

    python benchmark.py                                                  # layer, memory, epoch: about a minute
    python benchmark.py --sections scaling jumps                         # the layer as the work grows, and λ
    python benchmark.py --sections epoch --experiments audio_mnist esc50 --data_dir=data
    python benchmark.py --sections start copies grid                     # trials through Ray
    python benchmark.py --sections layer step epoch grid --experiments audio_mnist esc50 --complete     # on a GPU

Prints Markdown tables; --output names a JSON file for the same, with versions and hardware. Times are medians after a
warm-up, the compared ones taken in turns; compare only numbers of one run. "Clip by clip" stands in for the original
software, see clip_by_clip.py. Epochs are training and validation, with λ held at its initial value. All of them keep
freed memory for later, as trials of main.py do (main.MEMORY).
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torchaudio

import benchmark_ray
import datasets
import main
import search_spaces
import train
from clip_by_clip import ClipByClip, clip_by_clip_epoch
from datasets import InputError
from dmel import CPU_BLOCK, DMEL, WINDOW_SIGMAS
from results import provenance, write_whole

HOP_LENGTH, N_MELS, SAMPLE_RATE = 80, 64, datasets.SAMPLE_RATE
PRECISIONS = {"float32": {}, "TF32": {"tf32": True}, "bfloat16": {"bf16": True}}


# The layer


def forward_backward(way, clips):
    """A call that computes features and, from a given upstream gradient, the gradient of λ."""
    upstream = torch.randn_like(way(clips))
    return lambda: way(clips).backward(upstream)


def layer(args):
    """Layer, 32 clips of 5 s, forward and backward in λ, ms"""
    for seconds in search_spaces.WINDOW_SECONDS:
        clips = torch.randn(2 if args.tiny else 32, 5 * SAMPLE_RATE, device=args.device)
        dmel = make_layer(seconds, args.device)
        library = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=dmel.n_fft, hop_length=HOP_LENGTH, n_mels=N_MELS
        ).to(args.device)
        n_ffts = 2 * len(clips) * (clips.shape[1] // HOP_LENGTH + 1)
        block = torch.randn(max(1, min(n_ffts, CPU_BLOCK // dmel.n_fft)), dmel.n_fft, device=args.device)
        ours, standin, forward, ffts = medians(
            args,
            forward_backward(dmel, clips),
            forward_backward(ClipByClip(dmel), clips),
            functools.partial(library, clips),
            functools.partial(ffts_of, block, n_ffts // len(block)),
        )
        yield {
            "window": f"{1000 * seconds:.0f} ms (FFT {dmel.n_fft})",
            "DMEL": ours,
            "clip by clip": standin,
            "ratio": f"{standin / ours:.1f}×",
            "torchaudio, forward alone": forward,
            "its ratio": f"{forward / ours:.2f}×",
            "the FFTs alone": ffts,
        }


def ffts_of(block, n_blocks):
    for _ in range(n_blocks):
        torch.fft.rfft(block)


def make_layer(seconds, device):
    return DMEL(SAMPLE_RATE, N_MELS, HOP_LENGTH, SAMPLE_RATE * seconds / WINDOW_SIGMAS).to(device)


def memory(args):
    """Memory of forward and backward beyond input and output, 32 clips of 5 s, window 300 ms"""
    for name in ("DMEL", "clip by clip"):
        with fresh_process() as pool:  # where nothing is left over from before
            n_bytes = pool.submit(extra_memory, name, 2 if args.tiny else 32, args.device).result()
        yield {"way": name, "MiB": n_bytes / 2**20}


def extra_memory(name, n_clips, device):
    dmel = make_layer(0.300, device)
    way = dmel if name == "DMEL" else ClipByClip(dmel)
    clips = torch.randn(n_clips, 5 * SAMPLE_RATE, device=device)
    upstream = torch.randn_like(way(clips[:1]))  # libraries load and threads start here
    way(clips[:1]).backward(upstream)
    upstream = upstream.expand(n_clips, -1, -1)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
        before = psutil.Process().memory_info().rss
    features = way(clips)
    features.backward(upstream)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return peak - before - features.numel() * features.element_size()


def scaling(args):
    """Layer, forward and backward, as the work grows"""
    n_clips, clip_seconds, window = (4, 1, 0.035) if args.tiny else (16, 5, 0.035)
    grids = [
        [(n_clips * factor, clip_seconds, window) for factor in (1, 2, 4, 8)],
        [(n_clips, clip_seconds * factor, window) for factor in (1, 2, 4, 8)],
        [(n_clips, clip_seconds, seconds) for seconds in (0.010, 0.035, 0.070, 0.150, 0.300, 0.600)],
    ]
    for n, length, seconds in [cell for grid in grids for cell in grid]:
        dmel = make_layer(seconds, args.device)
        clips = torch.randn(n, length * SAMPLE_RATE, device=args.device)
        (ours,) = medians(args, forward_backward(dmel, clips))
        samples = n * (length * SAMPLE_RATE // HOP_LENGTH + 1) * dmel.n_fft
        yield {
            "clips": n,
            "seconds": length,
            "window": f"{1000 * seconds:.0f} ms (FFT {dmel.n_fft})",
            "ms": ours,
            "ns per sample of a frame": 1e6 * ours / samples,
        }


@torch.no_grad()
def jumps(args):
    """Change of the log-Mel where the FFT size doubles: white noise, pure tones in the band where they are strongest"""
    time_axis = torch.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    noise = torch.randn(2 if args.tiny else 64, len(time_axis))
    tones = torch.sin(2 * torch.pi * torch.linspace(60, 3900, 97)[:, None] * time_axis)
    for n_fft in (128, 256, 512, 1024):
        doubling = (n_fft + 1) / WINDOW_SIGMAS
        for continuous in (False, True):
            layers = [
                DMEL(SAMPLE_RATE, N_MELS, HOP_LENGTH, doubling + side * 1e-3, continuous=continuous) for side in (-1, 1)
            ]
            of_bands = (layers[1](noise) - layers[0](noise)).mean(dim=(0, 2))
            before, after = (way(tones).mean(dim=2) for way in layers)
            of_tones = (after - before).gather(1, before.argmax(dim=1, keepdim=True))
            yield {
                "λ": f"{doubling:.2f}",
                "FFT": f"{n_fft} to {2 * n_fft}",
                "continuous": str(continuous),
                "noise, mean over bands": f"{of_bands.mean():.3f}",
                "noise, largest of a band": f"{of_bands.abs().max():.3f}",
                "tones, largest": f"{of_tones.abs().max():.3f}",
            }


# Epochs and steps


def epoch(args):
    """An epoch, s; the first one also warms up and computes the features of a fixed window"""
    for name in args.experiments:
        is_slow = args.device == "cpu" and "esc50" in name  # a minute an epoch, whatever the window
        space = main.select_search_space(name)(2 if args.tiny or is_slow else 4)
        windows = space["init_lambd"]["grid_search"][: 1 if is_slow or args.tiny else None]
        with fresh_process() as pool:
            for trainable, lambd in itertools.product((True, False), windows):
                config = {**space, "trainable": trainable, "init_lambd": lambd, "seed": 0, "lr_tf": 0.0}
                config["device"] = args.device
                first, *ours = pool.submit(epoch_times, config, args).result()
                standin = pool.submit(clip_by_clip_times, config, args).result()
                ours, standin = statistics.median(ours), statistics.median(standin)
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
    data = datasets.load(config, benchmark_ray.recordings_of(config, args))
    times = [time.perf_counter()]
    train.train(config, data, lambda metrics, snapshot: times.append(time.perf_counter()))
    return np.diff(times).tolist()


def clip_by_clip_times(config, args):
    data = datasets.load(config, benchmark_ray.recordings_of(config, args))
    return [clip_by_clip_epoch(config, data) for _ in range(config["max_epochs"] // 2)]


def step(args):
    """A training step of panns_cnn6 on 32 clips of 5 s, window 35 ms, and the layer alone, ms"""
    for precision, keys in PRECISIONS.items():
        config = {**search_spaces.esc50(1), "init_lambd": 46.7, "trainable": True, "lr_tf": 0.0, **keys}
        config["device"] = args.device
        clips = torch.randn(2 if args.tiny else config["batch_size"], config["n_points"], device=args.device)
        data = datasets.Data(clips, torch.arange(len(clips), device=args.device), {})
        net, loss_function, _ = train.prepare(config)
        optimizer = train.make_optimizer(net, config)
        whole, alone = medians(
            args,
            functools.partial(train.train_epoch, net, loss_function, optimizer, data, [data.labels]),
            forward_backward(net.spectrogram_layer, clips),
        )
        yield {"precision": precision, "step": whole, "layer": alone, "part": f"{100 * alone / whole:.1f} %"}


# Measuring


def medians(args, *functions):
    """Median milliseconds of each function: bursts of calls in turns, the first of each burst to warm up."""
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


SECTIONS = {
    function.__name__: function for function in (layer, memory, scaling, jumps, epoch, step, *benchmark_ray.SECTIONS)
}


def markdown(title, rows):
    def text(value):
        return str(value) if not isinstance(value, float) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    cells = [list(rows[0]), ["---" for _ in rows[0]], *([text(value) for value in row.values()] for row in rows)]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)


def run():
    parser = argparse.ArgumentParser(description="Measure the layer, the epochs and the grid.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["layer", "memory", "epoch"])
    parser.add_argument("--experiments", nargs="+", default=["time_frequency"], help="for epoch and grid")
    parser.add_argument("--data_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--complete", action="store_true", help="repeat recordings up to the complete dataset's number")
    parser.add_argument("--epochs", type=int, default=300, help="epochs of a trial, to project a grid's time (300)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="to try it out: small sizes, numbers without meaning")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device=cuda: there is no CUDA device here.")
    if not main.MEMORY.items() <= os.environ.items():  # it holds from the start of a process: all ways are measured so
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | main.MEMORY | {"PYTHONWARNINGS": "ignore"})
    report = {**provenance(), "device": args.device, "threads": torch.get_num_threads(), "sections": {}}
    for name in args.sections:
        title = SECTIONS[name].__doc__
        rows = list(SECTIONS[name](args))
        print(markdown(title, rows), flush=True)
        report["sections"][name] = {"title": title, "rows": rows}
        if args.output:
            write_whole(args.output, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"benchmark.py: {error}")
