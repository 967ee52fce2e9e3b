"""The three datasets, two of recordings and a drawn one.

    python datasets.py data

prepares the recordings in data/audio_mnist and data/esc50: resamples them once, into caches.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import PARTS, InputError, check_parts, require, run
from recordings import (
    Recordings,
    list_audio_mnist,
    list_esc50,
    load_recordings,
    pad_around,
    pad_at_end,
    read_esc50_classes,
)

PULSES_CLASSES = 3  # of time_frequency
SAMPLE_RATE = 8000  # Hz, to which recordings are resampled

AUDIO_MNIST_SPEAKERS = {
    "valid": [12, 47, 59, 15, 27, 41, 4, 11, 21, 31, 44, 50],
    "test": [26, 52, 60, 18, 32, 42, 5, 13, 22, 33, 45, 51],
}
AUDIO_MNIST_SPEAKERS["train"] = sorted(set(range(1, 61)).difference(*AUDIO_MNIST_SPEAKERS.values()))
ESC50_FOLDS = {"train": [1, 2, 3], "valid": [4], "test": [5]}
RANDOM_PARTS = [0.7, 0.1, 0.2]  # of a split at random


class Dataset(NamedTuple):
    """What there is to know about a dataset of recordings; DATASETS lists them."""

    n_classes: int
    clip_seconds: float
    place: str  # file or folder that the dataset's folder has in it
    list_files: Any  # function: folder -> rows [file, label, group]
    fit: Any  # function: clip, n_points -> clip of exactly n_points samples
    splits: dict  # by name, the default first: the groups of each part, or None for random
    n_recordings: int | None = None  # of the complete dataset
    read_classes: Any = None  # function: folder -> names of classes by label; None: numbers


DATASETS = {
    "audio_mnist": Dataset(
        n_classes=10,
        clip_seconds=1,
        place="data",
        list_files=list_audio_mnist,
        fit=pad_around,
        splits={"speakers": AUDIO_MNIST_SPEAKERS},
        n_recordings=30000,
    ),
    "esc50": Dataset(
        n_classes=50,
        clip_seconds=5,
        place="meta/esc50.csv",
        list_files=list_esc50,
        fit=pad_at_end,
        splits={"random": None, "folds": ESC50_FOLDS},
        n_recordings=2000,
        read_classes=read_esc50_classes,
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
    """Raises InputError where a Config lacks what its dataset needs."""
    name = config.dataset_name
    if name == "time_frequency":
        require(config, name, "n_samples", "noise_std", "sigma_ref", "center_offset")
        if config.split is not None:
            raise InputError(
                "config: split is for recordings, and time_frequency has none: remove the key."
            )
    elif name in DATASETS:
        require(config, name, "resample_rate")
        splits = DATASETS[name].splits
        if isinstance(config.split, str) and config.split not in splits:
            raise InputError(
                f"config: split '{config.split}' is not one of {', '.join(splits)} for {name}."
            )
        for split_name, parts in splits.items():
            if parts is not None:
                check_parts(parts, f"datasets.py: split '{split_name}' of {name}")
    else:
        raise InputError(
            f"config: dataset_name '{name}' is not one of time_frequency, {', '.join(DATASETS)}."
        )


def load(config, recordings: Recordings | None = None):
    """The Data of a trial: drawn for time_frequency, otherwise the given recordings.

    They are split as the config says. Raises InputError where a part is empty.
    """
    import torch  # here, as preparing recordings does without

    if config.dataset_name == "time_frequency":
        clips, labels = draw_pulses(config)
    else:
        clips = recordings.clips
        labels = recordings.labels
    splits = split_clips(config, recordings)

    # Arrays out of a cache file or Ray's object store are read-only, and only read.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return Data(torch.from_numpy(clips), torch.from_numpy(labels), splits)


def split_clips(config, recordings: Recordings | None = None):
    """Indices of the clips of each part, int64 tensors by its name: the splits of a trial's Data.

    Raises InputError where a part is empty.
    """
    if config.dataset_name == "time_frequency":
        parts = split_in_order(config.n_samples)
    else:
        parts = split_recordings(config, recordings.groups)

    splits = dict(zip(PARTS, parts, strict=True))
    for part, indices in splits.items():
        if len(indices) == 0:
            raise InputError(
                f"{config.dataset_name}: the {part} split is empty, there are too few recordings: "
                "complete the dataset."
            )
    return splits


def default_split(dataset_name):
    """The name of the split that a dataset has where a config names none; pulses have no name."""
    if dataset_name not in DATASETS:
        return None
    return next(iter(DATASETS[dataset_name].splits))


def split_in_order(n_clips):
    """Indices of the clips to train, validate and test on: the first 70 %, 10 %, the last 20 %."""
    import torch

    n_train = n_clips * 7 // 10
    n_valid = n_clips // 10
    return torch.arange(n_clips).tensor_split([n_train, n_train + n_valid])


def split_recordings(config, groups):
    """Indices of the recordings to train, validate and test on, by their groups or at random."""
    import torch

    if isinstance(config.split, dict):
        chosen = config.split
    else:
        name = config.split or default_split(config.dataset_name)
        chosen = DATASETS[config.dataset_name].splits[name]

    if chosen is None:
        generator = torch.Generator().manual_seed(0)  # the same split for all trials
        subsets = torch.utils.data.random_split(range(len(groups)), RANDOM_PARTS, generator)
        return [torch.tensor(subset.indices) for subset in subsets]

    parts = []
    for part in PARTS:
        indices = np.flatnonzero(np.isin(groups, chosen[part]))
        parts.append(torch.from_numpy(indices))
    return parts


def recordings_of(config, data_dir):
    """The Recordings that a Config works on, None for time_frequency.

    data_dir: see find_folder. Raises InputError where they are missing or damaged.
    """
    name = config.dataset_name
    if name not in DATASETS:
        return None
    return load_recordings(
        DATASETS[name],
        find_folder(name, data_dir),
        name=name,
        sample_rate=config.resample_rate,
        n_points=config.n_points,
    )


def n_classes(config):
    """The number of classes that a Config's network tells apart."""
    if config.dataset_name in DATASETS:
        return DATASETS[config.dataset_name].n_classes
    return PULSES_CLASSES


def class_names(config, data_dir):
    """Names of a Config's classes, by label, all different.

    They are numbers where the dataset's folder has no names. data_dir: see find_folder.
    """
    numbers = [str(label) for label in range(n_classes(config))]
    dataset = DATASETS.get(config.dataset_name)
    if dataset is None or dataset.read_classes is None:
        return numbers

    found = dataset.read_classes(find_folder(config.dataset_name, data_dir))
    names = [found.get(label, number) for label, number in enumerate(numbers)]
    return names if len(set(names)) == len(names) else numbers


def find_folder(name, data_dir):
    """The folder of a dataset: data_dir/name, or data_dir where that is the dataset's folder.

    Where data_dir/name holds another folder around the dataset, as an unpacked archive does, it is
    that one.
    """
    folder = Path(data_dir, name)
    place = DATASETS[name].place
    if not folder.is_dir():
        # By place "." every folder would be the dataset's.
        is_dataset = place != "." and Path(data_dir, place).exists()
        return Path(data_dir) if is_dataset else folder

    if not (folder / place).exists():
        inner = [path for path in folder.iterdir() if (path / place).exists()]
        if len(inner) == 1:
            return inner[0]
    return folder


def draw_pulses(config):
    """Draws n_samples noisy pulses of three classes: one pulse, two apart in time or in frequency.

    The best window to tell them apart is sigma_ref, the width of a pulse. Returns clips, shape =
    (n_samples, n_points) float32, and labels, (n_samples,) int64. Times and widths are in samples,
    frequencies in cycles per sample. Source: the paper.
    """
    random = np.random.default_rng(config.seed)
    n = config.n_samples
    n_points = config.n_points
    sigma = config.sigma_ref

    def uniform(low, high):  # one number for each clip: (n, pulses, samples) = (n, 1, 1)
        return random.uniform(low, high, size=(n, 1, 1))

    labels = random.integers(PULSES_CLASSES, size=n)
    is_one = labels[:, None, None] == 0
    is_apart_in_time = labels[:, None, None] == 1
    is_apart_in_frequency = labels[:, None, None] == 2

    # Two pulses for each clip, (n, 2, 1), on either side of a centre.
    time = n_points / 2
    frequency = 0.25
    if config.center_offset:
        time = time + uniform(-n_points / 5, n_points / 5)
        frequency = frequency + uniform(-0.1, 0.1)
    side = np.array([[-1.0], [1.0]])
    time = time + is_apart_in_time * side * uniform(sigma, n_points / 5)
    frequency = frequency + is_apart_in_frequency * side * uniform(sigma / (2 * n_points), 0.1)

    # A single pulse is wider or narrower than sigma, up to this factor, both equally often.
    max_scale = 2 * (n_points / 5) / (6 * sigma) + 1
    wider = uniform(1, max_scale)
    narrower = uniform(1 / max_scale, 1)
    scale = np.where(uniform(0, 1) < 0.5, wider, narrower)
    width = sigma * np.where(is_one, scale, 1.0)

    # The pulses, (n, 2, n_points): a Gaussian and a sine, each with a largest value of 1.
    k = np.arange(n_points)
    phase = random.uniform(0, 2 * np.pi, (n, 2, 1))
    envelope = np.exp(-0.5 * ((k - time) / width) ** 2)
    carrier = np.sin(2 * np.pi * frequency * k + phase)
    pulses = envelope / envelope.max(-1, keepdims=True) * carrier / carrier.max(-1, keepdims=True)
    pulses -= pulses.mean(-1, keepdims=True)
    pulses[labels == 0, 1] = 0  # only one of them

    # The clips, (n, n_points): noise is uniform from 0 to noise_std, as in the original.
    amplitude = uniform(0.5, 1)[:, 0]
    noise = config.noise_std * random.random((n, n_points))
    clips = amplitude * pulses.sum(axis=1) + noise
    clips -= clips.mean(-1, keepdims=True)
    return clips.astype(np.float32), labels


def main():
    parser = argparse.ArgumentParser(description="Resample the recordings once and cache them.")
    parser.add_argument(
        "data_dir", help="folder that holds audio_mnist/ and esc50/, or one of them"
    )
    data_dir = parser.parse_args().data_dir

    names = [name for name in DATASETS if find_folder(name, data_dir).exists()]
    if not names:
        raise InputError(
            f"'{data_dir}' holds neither {' nor '.join(DATASETS)}: run `sh download_data.sh`."
        )

    for name in names:
        seconds = DATASETS[name].clip_seconds
        recordings = load_recordings(
            DATASETS[name],
            find_folder(name, data_dir),
            name=name,
            sample_rate=SAMPLE_RATE,
            n_points=round(SAMPLE_RATE * seconds),
        )
        print(f"{name}: {len(recordings.clips)} clips of {seconds} s at {SAMPLE_RATE} Hz are ready")


if __name__ == "__main__":
    run(main)
