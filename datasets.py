"""The three datasets: two folders of recordings, prepared once, and one that is drawn from a seed.

    python datasets.py data      # resamples data/audio_mnist and data/esc50 to 8 kHz, one cache file each

A cache is one .npy of all clips, beside the recordings or in the folder that DMEL_CACHE_DIR names, and a .json of what
it was made from; it is made again when that changes. Training reads the cache only. Recordings are never written to.

    recordings = recordings_of(config, "data")
    data = load(config, recordings)    # data.clips (n, n_points), data.labels (n,), data.splits["train"] (indices)
"""

import argparse
import contextlib
import csv
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from tqdm import tqdm

from config import InputError, require
from pulses import draw_pulses

PULSES_CLASSES = 3  # of time_frequency
SAMPLE_RATE = 8000  # Hz, to which recordings are resampled
PARTS = ("train", "valid", "test")
RANDOM_FRACTIONS = [0.7, 0.1, 0.2]

# fmt: off
AUDIO_MNIST_SPEAKERS = {
    "train": [28, 56, 7, 19, 35, 1, 6, 16, 23, 34, 46, 53, 36, 57, 9, 24, 37, 2,
              8, 17, 29, 39, 48, 54, 43, 58, 14, 25, 38, 3, 10, 20, 30, 40, 49, 55],
    "valid": [12, 47, 59, 15, 27, 41, 4, 11, 21, 31, 44, 50],
    "test": [26, 52, 60, 18, 32, 42, 5, 13, 22, 33, 45, 51],
}
# fmt: on
ESC50_FOLDS = {"train": [1, 2, 3], "valid": [4], "test": [5]}
ESC50_CLASSES, ESC50_ALL_FOLDS = 50, range(1, 6)


class Dataset(NamedTuple):
    """What there is to know about a dataset of recordings; DATASETS at the end of this file lists them."""

    n_classes: int
    clip_seconds: float
    place: str  # file or folder that the dataset's folder has in it
    list_files: Callable  # folder -> rows [file, bytes, label, group]
    fit: Callable  # clip, n_points -> clip of exactly n_points samples
    splits: dict  # named values of config key split, the default first: groups of each part, or None for random
    n_recordings: int | None = None  # of the complete dataset


class Recordings(NamedTuple):
    """All clips of a dataset folder."""

    clips: np.ndarray  # (n, n_points) float32
    labels: np.ndarray  # (n,) int64
    groups: np.ndarray  # (n,) int64: speaker of audio_mnist, fold of esc50
    identity: str = "x"


class Data(NamedTuple):
    """What a trial works on."""

    clips: torch.Tensor  # (n, n_points) float32
    labels: torch.Tensor  # (n,) int64
    splits: dict  # "train", "valid", "test": indices into clips, int64
    features: torch.Tensor | None = None  # (n, frames, bands), where those of a fixed window are kept

    def to(self, device):
        splits = {part: indices.to(device) for part, indices in self.splits.items()}
        return Data(self.clips.to(device), self.labels.to(device), splits)


def load(config, recordings=None):
    """The data of a trial: drawn for time_frequency, otherwise the given recordings, split as the config says."""
    name = config["dataset_name"]
    if name == "time_frequency":
        clips, labels = draw_pulses(config)
        n_train, n_valid = len(clips) * 7 // 10, len(clips) // 10
        parts = torch.arange(len(clips)).tensor_split([n_train, n_train + n_valid])
        return Data(torch.from_numpy(clips), torch.from_numpy(labels), dict(zip(PARTS, parts, strict=True)))
    splits = split_recordings(name, recordings.groups, config.get("split"))
    with warnings.catch_warnings():  # arrays out of a cache file or Ray's object store are read-only, and only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Data(torch.from_numpy(recordings.clips), torch.from_numpy(recordings.labels), splits)


def check(config):
    """Raises InputError where a config's dataset is unknown or lacks keys."""
    name = config["dataset_name"]
    if name == "time_frequency":
        require(config, name, "n_samples", "noise_std", "sigma_ref", "center_offset")
    elif name not in DATASETS:
        raise InputError(f"config: dataset_name '{name}' is not one of time_frequency, {', '.join(DATASETS)}.")
    else:
        require(config, name, "resample_rate")


def recordings_of(config, data_dir):
    """The recordings that a config works on, see load_recordings; None for time_frequency, which needs none."""
    if config["dataset_name"] == "time_frequency":
        return None
    return load_recordings(config["dataset_name"], data_dir, config["resample_rate"], config["n_points"])


# Recordings


def split_recordings(name, groups, split=None):
    """Indices of the clips of each part; split: the name of one, groups of each part, or None for the default."""
    known = DATASETS[name].splits
    split = next(iter(known)) if split is None else split
    if isinstance(split, str) and split not in known:
        raise InputError(f"config: split '{split}' is not one of {', '.join(known)} for {name}.")
    chosen = known[split] if isinstance(split, str) else split
    if chosen is None:
        generator = torch.Generator().manual_seed(0)
        parts = torch.utils.data.random_split(range(len(groups)), RANDOM_FRACTIONS, generator)
        splits = {part: torch.tensor(subset.indices) for part, subset in zip(PARTS, parts, strict=True)}
    else:
        numbers = [number for part in PARTS for number in chosen.get(part, [])]
        if set(chosen) != set(PARTS) or len(set(numbers)) < len(numbers):
            raise InputError(f"config: split must give each of {', '.join(PARTS)} groups of its own, not {chosen}.")
        splits = {part: torch.from_numpy(np.flatnonzero(np.isin(groups, chosen[part]))) for part in PARTS}
    for part, indices in splits.items():
        if len(indices) == 0:
            raise InputError(f"{name}: the {part} split is empty, there are too few recordings: complete the dataset.")
    return splits


def load_recordings(name, data_dir, sample_rate, n_points):
    """The cached clips of a dataset, memory-mapped; makes the cache where it is missing or out of date.

    data_dir: the folder that holds the dataset's folder of that name, or the dataset's folder itself. sample_rate: Hz.
    n_points: samples per clip. Raises InputError where there are no recordings, or one cannot be read.
    """
    folder = find_folder(name, data_dir)
    cache = cache_path(os.environ.get("DMEL_CACHE_DIR") or folder, name, sample_rate, n_points)
    cached = read_cache(cache)
    rows = []
    if (folder / DATASETS[name].place).exists():
        rows = DATASETS[name].list_files(folder)
    if rows:
        index = {"sample_rate": sample_rate, "n_points": n_points, "n_files": len(rows), "rows": rows}
        if cached is None or cached[1] != index:
            cached = prepare_cache(cache, folder, index, name)
    elif cached is None:
        raise InputError(
            f"{name}: no recordings in '{folder}': run `sh download_data.sh`, or name another data folder."
        )
    clips, index = cached
    complete = DATASETS[name].n_recordings
    if complete and len(clips) < complete:
        print(f"warning: {name}: {len(clips)} of {complete} recordings are there ({folder})", file=sys.stderr)
    _, _, labels, groups = zip(*index["rows"], strict=True)
    return Recordings(clips, np.array(labels), np.array(groups))


def cache_path(folder, name, sample_rate, n_points):
    """The file of a dataset's clips in a folder; its index lies beside it, as .json."""
    return Path(folder) / f"{name}_{sample_rate}Hz_{n_points}.npy"


def find_folder(name, data_dir):
    """data_dir/name, or data_dir where that is the dataset's folder itself."""
    data_dir = Path(data_dir)
    itself = not (data_dir / name).exists() and (data_dir / DATASETS[name].place).exists()
    return data_dir if itself else data_dir / name


def list_audio_mnist(folder):
    """Rows [file, bytes, label, speaker] of data/<speaker>/<digit>_<speaker>_<repetition>.wav, in that order."""
    rows = []
    for speaker in sorted(os.scandir(folder / "data"), key=lambda entry: entry.name):
        if not (speaker.is_dir() and speaker.name.isdigit()):
            continue
        for entry in os.scandir(speaker):
            match = re.fullmatch(r"(\d)_(\d+)_(\d+)\.wav", entry.name)
            if match:
                digit, number, repetition = map(int, match.groups())
                rows.append((number, digit, repetition, f"data/{speaker.name}/{entry.name}", entry.stat().st_size))
    return [[file, size, digit, number] for number, digit, _, file, size in sorted(rows)]


def list_esc50(folder):
    """Rows [file, bytes, label, fold] of the recordings in meta/esc50.csv that are present, in its order."""
    table = folder / "meta" / "esc50.csv"
    audio = folder / "audio"
    present = {entry.name: entry.stat().st_size for entry in os.scandir(audio)} if audio.is_dir() else {}
    rows, missing = [], []
    try:
        with open(table, newline="", encoding="utf-8-sig") as lines:
            entries = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read as a CSV ({error}): replace it by ESC-50's.") from None
    for number, entry in enumerate(entries, start=2):
        try:
            name, label, fold = entry["filename"], int(entry["target"]), int(entry["fold"])
        except (KeyError, TypeError, ValueError) as error:
            message = (
                f"{table}: line {number} lacks a filename, target or fold number ({error!r:.100}): replace the table."
            )
            raise InputError(message) from None
        if not (0 <= label < ESC50_CLASSES and fold in ESC50_ALL_FOLDS):
            message = f"target {label} and fold {fold} of line {number} are not ESC-50's, 0 to 49 and 1 to 5"
            raise InputError(f"{table}: {message}: replace the table.")
        if name in present:
            rows.append([f"audio/{name}", present[name], label, fold])
        else:
            missing.append(name)
    if missing:
        print(f"warning: {table} names {len(missing)} files that are not in {audio}: {missing[0]} …", file=sys.stderr)
    return rows


def read_cache(cache):
    """Clips (memory-mapped) and index of a cache file, None where it is missing or damaged."""
    try:
        index = json.loads(cache.with_suffix(".json").read_text())
        clips = np.load(cache, mmap_mode="r")
        intact = clips.shape == (index["n_files"], index["n_points"]) and clips.dtype == np.float32
    except (OSError, ValueError, EOFError, KeyError, TypeError):
        return None
    return (np.asarray(clips), index) if intact else None


def prepare_cache(cache, folder, index, name):
    """Makes a cache, or waits for another process that does; returns what read_cache gives."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache.with_suffix(".lock"))  # freed when its process ends, whatever happens to it
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"{name}: another process prepares {cache}: waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            cached = read_cache(cache)
            if cached is None or cached[1] != index:
                write_cache(cache, folder, index, name)
                cached = read_cache(cache)
            return cached
        finally:
            lock.release()
    except OSError as error:
        raise InputError(f"cannot write the cache {cache} ({error}): set DMEL_CACHE_DIR to another folder.") from None


def write_cache(cache, folder, index, name):
    """Reads, resamples and fits all recordings of an index and writes the cache, whole or not at all."""
    sample_rate, n_points, rows = index["sample_rate"], index["n_points"], index["rows"]

    def prepare(row):
        return DATASETS[name].fit(read_recording(folder / row[0], sample_rate), n_points)

    temporary = cache.with_suffix(".tmp")
    try:
        clips = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(rows), n_points))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            progress = tqdm(pool.map(prepare, rows), total=len(rows), desc=f"{name} at {sample_rate} Hz", unit="clip")
            try:
                for i, clip in enumerate(progress):
                    clips[i] = clip
            finally:
                pool.shutdown(cancel_futures=True)  # or an interruption would wait for all of them
        clips.flush()
        cache.with_suffix(".json").unlink(missing_ok=True)  # the index comes last: without it a cache does not count
        temporary.rename(cache)
        temporary.write_text(json.dumps(index))
        temporary.rename(cache.with_suffix(".json"))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_recording(path, sample_rate):
    """A recording as mono float32 samples at sample_rate (Hz), shape = (time,)."""
    import soundfile  # here, as training does without

    try:
        cut_short = is_cut_short(path)
        samples, recorded_rate = soundfile.read(path, dtype="float32", always_2d=True)  # (time, channels)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path}: cannot be read as audio ({error}): replace or remove it.") from None
    if cut_short or len(samples) == 0 or not np.isfinite(samples).all():
        raise InputError(f"{path}: is cut short, empty or has samples that are not numbers: replace or remove it.")
    mono = samples.mean(axis=1)
    if recorded_rate == sample_rate:
        return mono
    import librosa  # takes seconds

    return librosa.resample(mono, orig_sr=recorded_rate, target_sr=sample_rate, res_type="soxr_hq")


def is_cut_short(path):
    """Whether a WAV file is shorter than its header says: libsndfile reads what is there."""
    with open(path, "rb") as file:
        header = file.read(8)
    n_bytes = int.from_bytes(header[4:], "little")  # of what follows; 0 or all ones where a stream did not know it
    return header[:4] == b"RIFF" and n_bytes not in (0, 2**32 - 1) and 8 + n_bytes > os.path.getsize(path)


def pad_around(clip, n_points):
    """Zeros before the clip, then zeros after it or a cut, to exactly n_points samples."""
    return pad_at_end(np.pad(clip, (max(0, 1 + (n_points - len(clip)) // 2), 0)), n_points)


def pad_at_end(clip, n_points):
    """Zeros after the clip or a cut, to exactly n_points samples."""
    return np.pad(clip[:n_points], (0, max(0, n_points - len(clip))))


def n_classes(name):
    """Number of classes of a dataset, the drawn one included."""
    return PULSES_CLASSES if name == "time_frequency" else DATASETS[name].n_classes


DATASETS = {
    "audio_mnist": Dataset(
        10, 1, "data", list_audio_mnist, pad_around, {"speakers": AUDIO_MNIST_SPEAKERS}, n_recordings=30000
    ),
    "esc50": Dataset(
        ESC50_CLASSES, 5, "meta/esc50.csv", list_esc50, pad_at_end, {"random": None, "folds": ESC50_FOLDS}, 2000
    ),
}


def main():
    parser = argparse.ArgumentParser(description="Resample the recordings once and cache them.")
    parser.add_argument("data_dir", help="folder that holds audio_mnist/ and esc50/, or one of them")
    data_dir = parser.parse_args().data_dir
    names = [name for name in DATASETS if find_folder(name, data_dir).exists()]
    if not names:
        raise InputError(f"'{data_dir}' holds neither {' nor '.join(DATASETS)}: run `sh download_data.sh`.")
    for name in names:
        seconds = DATASETS[name].clip_seconds
        recordings = load_recordings(name, data_dir, SAMPLE_RATE, round(SAMPLE_RATE * seconds))
        print(f"{name}: {len(recordings.clips)} clips of {seconds} s at {SAMPLE_RATE} Hz are ready")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"datasets.py: {error}")
