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

# What `python datasets.py FOLDER` does; then Linux tells the peak of its memory.
SCRIPT = "import datasets; datasets.main(); print(open('/proc/self/status').read())"


def prepare(args):
    """Preparation of 48 kHz recordings that lie in the page cache, as `python datasets.py` does it,
    start included; then once more with the cache as it is, and with all files touched
    """
    n_clips = 60 if args.tiny else args.clips
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder, "audio_mnist")
        n_bytes = write_recordings(dataset / "data", n_clips)

        seconds, peak_memory = run_datasets(folder)
        seconds_again, _ = run_datasets(folder)
        for path in dataset.glob("data/*/*.wav"):
            path.touch()
        seconds_touched, _ = run_datasets(folder)

        cache_bytes = sum(path.stat().st_size for path in dataset.glob("*.*"))
    yield {
        "clips": n_clips,
        "recordings, MiB": n_bytes / 2**20,
        "time, s": seconds,
        "again, s": seconds_again,
        "touched, s": seconds_touched,
        "peak memory, MiB": peak_memory,
        "cache, MiB": cache_bytes / 2**20,
    }


def run_datasets(folder):
    """Seconds and peak memory (MiB) of a process that prepares the recordings of a folder."""
    environment = dict(os.environ)
    for key in (*MEMORY, "DMEL_CACHE_DIR"):
        environment.pop(key, None)

    begin = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder],
        cwd=Path(datasets.__file__).parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - begin

    peak_kib = int(result.stdout.split("VmHWM:")[1].split()[0])
    return seconds, peak_kib / 2**10


def write_recordings(folder, n_clips):
    """Writes noise bursts of 0.45 to 0.85 s in AudioMNIST's layout, 48 kHz and 16 bit.

    Returns their bytes.
    """
    random = np.random.default_rng(0)
    noise = (3000 * random.standard_normal(2 * 48000)).astype(np.int16)
    n_bytes = 0
    for i in range(n_clips):
        speaker = i % 60 + 1
        digit = i // 60 % 10
        repetition = i // 600
        path = folder / f"{speaker:02}" / f"{digit}_{speaker:02}_{repetition}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = random.integers(48000)
        length = random.integers(21600, 40800)
        soundfile.write(path, noise[begin : begin + length], 48000)
        n_bytes += path.stat().st_size
    return n_bytes


SECTIONS = (prepare,)
