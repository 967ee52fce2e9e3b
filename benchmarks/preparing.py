"""The section that prepares recordings for training."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

import datasets
from cluster import MEMORY

SCRIPT = "import datasets; datasets.main(); print(open('/proc/self/status').read())"  # Linux: with the peak of memory


def prepare(args):
    """Preparation of 48 kHz recordings that lie in the page cache, as `python datasets.py` does it,
    start included
    """
    n_clips = 60 if args.tiny else args.clips
    with tempfile.TemporaryDirectory() as folder:
        n_bytes = write_recordings(Path(folder, "audio_mnist", "data"), n_clips)
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in {*MEMORY, "DMEL_CACHE_DIR"}
        }
        command = [sys.executable, "-c", SCRIPT, folder]
        begin = time.perf_counter()
        result = subprocess.run(
            command,
            cwd=Path(datasets.__file__).parent,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begin
        cache_bytes = sum(path.stat().st_size for path in Path(folder, "audio_mnist").glob("*.*"))
    yield {
        "clips": n_clips,
        "recordings, MiB": n_bytes / 2**20,
        "time, s": seconds,
        "peak memory, MiB": int(result.stdout.split("VmHWM:")[1].split()[0]) / 2**10,
        "cache, MiB": cache_bytes / 2**20,
    }


def write_recordings(folder, n_clips):
    """Noise bursts of 0.45 to 0.85 s in AudioMNIST's layout, 48 kHz and 16 bit; returns their
    bytes.
    """
    random = np.random.default_rng(0)
    noise = (3000 * random.standard_normal(2 * 48000)).astype(np.int16)
    n_bytes = 0
    for i in range(n_clips):
        speaker, digit, repetition = i % 60 + 1, i // 60 % 10, i // 600
        path = folder / f"{speaker:02}" / f"{digit}_{speaker:02}_{repetition}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, length = random.integers(48000), random.integers(21600, 40800)
        soundfile.write(path, noise[begin : begin + length], 48000)
        n_bytes += path.stat().st_size
    return n_bytes


SECTIONS = (prepare,)
