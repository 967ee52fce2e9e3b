"""The three datasets, two of recordings and a drawn one; `python datasets.py data` resamples the
recordings once.
"""

import argparse
import warnings
from functools import partial
from types import SimpleNamespace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import PARTS, InputError, require, run
from recordings import (
    Recordings,
    list_audio_mnist,
    list_esc50,
    load_recordings,
    pad_around,
    pad_at_end,
)

PULSES_CLASSES = 3  # of time_frequency
SAMPLE_RATE = 8000  # Hz, to which recordings are resampled

AUDIO_MNIST_SPEAKERS = {
    "valid": [12, 47, 59, 15, 27, 41, 4, 11, 21, 31, 44, 50],
    "test": [26, 52, 60, 18, 32, 42, 5, 13, 22, 33, 45, 51],
}
AUDIO_MNIST_SPEAKERS["train"] = sorted(set(range(1, 61)).difference(*AUDIO_MNIST_SPEAKERS.values()))
ESC50_FOLDS = {"train": [1, 2, 3], "valid": [4], "test": [5]}


class Dataset(NamedTuple):
    """What there is to know about a dataset of recordings; DATASETS lists them."""

    n_classes: int
    clip_seconds: float
    place: str  # file or folder that the dataset's folder has in it
    list_files: Any  # function: folder -> rows [file, label, group]
    fit: Any  # function: clip, n_points -> clip of exactly n_points samples
    splits: dict  # named values of config key split, the default first: groups of each part, or None for random
    n_recordings: int | None = None  # of the complete dataset


DATASETS = {
    "audio_mnist": Dataset(
        10, 1, "data", list_audio_mnist, pad_around, {"speakers": AUDIO_MNIST_SPEAKERS}, 30000
    ),
    "esc50": Dataset(
        50,
        5,
        "meta/esc50.csv",
        list_esc50,
        pad_at_end,
        {"random": None, "folds": ESC50_FOLDS},
        2000,
    ),
}


class Data(NamedTuple):
    """What a trial works on, as tensors."""

    clips: Any  # (n, n_points) float32
    labels: Any  # (n,) int64
    splits: dict  # "train", "valid", "test": indices into clips, int64

    def to(self, device):
        splits = {part: indices.to(device) for part, indices in self.splits.items()}
        return Data(self.clips.to(device), self.labels.to(device), splits)


def check(config):
    """Raises InputError where a config lacks what its dataset needs; config: a complete one."""
    name, split = config.dataset_name, config.split
    if name == "time_frequency":
        require(config, name, "n_samples", "noise_std", "sigma_ref", "center_offset")
        if split is not None:
            raise InputError(
                "config: split is for recordings, and time_frequency has none: remove the key."
            )
    elif name in DATASETS:
        require(config, name, "resample_rate")
        named = DATASETS[name].splits
        if isinstance(split, str) and split not in named:
            raise InputError(
                f"config: split '{split}' is not one of {', '.join(named)} for {name}."
            )
    else:
        raise InputError(
            f"config: dataset_name '{name}' is not one of time_frequency, {', '.join(DATASETS)}."
        )


def load(config, recordings: Recordings | None = None):
    """The Data of a trial: drawn for time_frequency, otherwise the given recordings, split as the
    config says.
    """
    import torch  # here, as preparing recordings does without

    name, split = config.dataset_name, config.split
    if name == "time_frequency":
        clips, labels = draw_pulses(config)
        n_train, n_valid = len(clips) * 7 // 10, len(clips) // 10
        parts = torch.arange(len(clips)).tensor_split([n_train, n_train + n_valid])
    else:
        clips, labels, groups, _ = recordings
        named = DATASETS[name].splits
        chosen = split if isinstance(split, dict) else named[split or next(iter(named))]
        if chosen is None:
            generator = torch.Generator().manual_seed(0)
            subsets = torch.utils.data.random_split(range(len(clips)), [0.7, 0.1, 0.2], generator)
            parts = [torch.tensor(subset.indices) for subset in subsets]
        else:
            parts = [
                torch.from_numpy(np.flatnonzero(np.isin(groups, chosen[part]))) for part in PARTS
            ]
    splits = dict(zip(PARTS, parts, strict=True))
    if empty := [part for part in PARTS if len(splits[part]) == 0]:
        raise InputError(
            f"{name}: the {empty[0]} split is empty, there are too few recordings: complete the dataset."
        )
    # Arrays out of a cache file or Ray's object store are read-only, and only read.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return Data(torch.from_numpy(clips), torch.from_numpy(labels), splits)


def recordings_of(config, data_dir):
    """The Recordings that a config works on, None for time_frequency; InputError where they are
    missing or damaged.
    """
    name = config.dataset_name
    return (
        load_recordings(config, DATASETS[name], find_folder(name, data_dir))
        if name in DATASETS
        else None
    )


def find_folder(name, data_dir):
    """data_dir/name, or data_dir where that is the dataset's folder itself."""
    folder, place = Path(data_dir, name), DATASETS[name].place
    itself = (
        place != "." and Path(data_dir, place).exists()
    )  # by place "." every folder would be the dataset's
    return Path(data_dir) if itself and not folder.exists() else folder


def draw_pulses(config):
    """Draws n_samples noisy pulses of three classes: one pulse, two apart in time, two apart in
    frequency.

    The best window to tell them apart is sigma_ref, the width of a pulse. Returns clips, shape =
    (n_samples, n_points) float32, and labels, int64. Times and widths are in samples, frequencies
    in cycles per sample. Source: the paper.
    """
    random = np.random.default_rng(config.seed)
    n, n_points, sigma = config.n_samples, config.n_points, config.sigma_ref
    uniform = partial(random.uniform, size=(n, 1, 1))
    scale_max = 2 * (n_points / 5) / (6 * sigma) + 1
    labels = random.integers(PULSES_CLASSES, size=n)
    one, apart_in_time, apart_in_frequency = (
        labels[:, None, None] == label for label in range(PULSES_CLASSES)
    )
    # Two pulses for everyone, all of shape (n, 2, n_points) or one that fits it.
    time, frequency, side = n_points / 2, 0.25, np.array([[-1.0], [1.0]])
    if config.center_offset:
        time = time + uniform(-n_points / 5, n_points / 5)
        frequency = frequency + uniform(-0.1, 0.1)
    time = time + apart_in_time * side * uniform(sigma, n_points / 5)
    frequency = frequency + apart_in_frequency * side * uniform(sigma / (2 * n_points), 0.1)
    wider, narrower = uniform(1, scale_max), uniform(1 / scale_max, 1)
    width = sigma * np.where(one, np.where(uniform(0, 1) < 0.5, wider, narrower), 1.0)
    k = np.arange(n_points)
    envelope = np.exp(-0.5 * ((k - time) / width) ** 2)
    carrier = np.sin(2 * np.pi * frequency * k + random.uniform(0, 2 * np.pi, (n, 2, 1)))
    pulses = envelope / envelope.max(-1, keepdims=True) * carrier / carrier.max(-1, keepdims=True)
    pulses -= pulses.mean(-1, keepdims=True)
    pulses[labels == 0, 1] = 0  # only one of them
    clips = uniform(0.5, 1)[:, 0] * pulses.sum(axis=1) + config.noise_std * random.random(
        (n, n_points)
    )
    clips -= clips.mean(-1, keepdims=True)
    return clips.astype(np.float32), labels


def main():
    parser = argparse.ArgumentParser(description="Resample the recordings once and cache them.")
    parser.add_argument(
        "data_dir", help="folder that holds audio_mnist/ and esc50/, or one of them"
    )
    data_dir = parser.parse_args().data_dir
    if not (names := [name for name in DATASETS if find_folder(name, data_dir).exists()]):
        raise InputError(
            f"'{data_dir}' holds neither {' nor '.join(DATASETS)}: run `sh download_data.sh`."
        )
    for name in names:
        seconds = DATASETS[name].clip_seconds
        config = SimpleNamespace(
            dataset_name=name, resample_rate=SAMPLE_RATE, n_points=round(SAMPLE_RATE * seconds)
        )
        recordings = recordings_of(config, data_dir)
        print(f"{name}: {len(recordings.clips)} clips of {seconds} s at {SAMPLE_RATE} Hz are ready")


if __name__ == "__main__":
    run(main)
