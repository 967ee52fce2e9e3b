"""The drawn dataset's statistics, what a config must say of its data, the splits of recordings."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, whole_dataset, write_digits, write_sounds

import datasets
import search_spaces
from config import InputError


def pulses_config(**changes):
    keys = {**search_spaces.time_frequency(1), "seed": 0, "split": None} | changes
    return SimpleNamespace(**keys)


def spoken_config(**changes):
    keys = {"dataset_name": "audio_mnist", "resample_rate": 8000, "split": None} | changes
    return SimpleNamespace(**keys)


@pytest.fixture(scope="module")
def pulses():
    clips, labels = datasets.draw_pulses(pulses_config(noise_std=0.0))
    return clips.astype(np.float64), labels


def envelope_moments(clips):
    """Centre and width of each clip's pulse, in samples, by its energy.

    A pulse of width s has energy of width s/√2.
    """
    n = np.arange(clips.shape[1])
    weight = clips**2 / (clips**2).sum(axis=1, keepdims=True)
    centre = weight @ n
    variance = (weight * (n - centre[:, None]) ** 2).sum(axis=1)
    return centre, np.sqrt(2 * variance)


def test_class_0_is_one_pulse_wider_or_narrower_than_sigma(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 0])
    scale = width / 6.38
    largest = 2 * (128 / 5) / (6 * 6.38) + 1
    assert np.abs(centre - 64).max() < 1.5
    assert scale.min() == pytest.approx(1 / largest, rel=0.05)
    assert scale.max() == pytest.approx(largest, rel=0.05)
    assert (scale > 1).mean() == pytest.approx(0.5, abs=0.05)
    wider = scale[scale > 1]  # uniform in each half
    assert np.median(wider) == pytest.approx((1 + largest) / 2, rel=0.05)


def test_class_1_is_two_pulses_of_width_sigma_apart_in_time(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 1])
    assert np.abs(centre - 64).mean() < 2
    # Two equal pulses at ±t have a spread of √(σ² + 2t²) in this measure, with t from σ to 128/5.
    median_time = (6.38 + 25.6) / 2
    median_width = np.sqrt(6.38**2 + 2 * median_time**2)
    largest_width = np.sqrt(6.38**2 + 2 * 25.6**2)
    assert np.median(width) == pytest.approx(median_width, rel=0.05)
    assert width.max() == pytest.approx(largest_width, rel=0.05)

    left, right = (clips[labels == 1] ** 2).reshape(-1, 2, 64).sum(axis=2).T
    assert (left / (left + right)).mean() == pytest.approx(0.5, abs=0.02)


def test_class_2_is_two_pulses_at_one_time_apart_in_frequency(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 2])
    assert np.abs(centre - 64).mean() < 1.5
    assert np.median(width) == pytest.approx(6.38, rel=0.1)

    power = np.abs(np.fft.rfft(clips[labels == 2], 1024)) ** 2
    centre = 256  # bin of 0.25 cycles per sample
    below = power[:, :centre].argmax(axis=1) / 1024
    above = (centre + 1 + power[:, centre + 1 :].argmax(axis=1)) / 1024
    np.testing.assert_allclose(np.median(above + below), 0.5, atol=0.01)
    distance = (above - below) / 2
    smallest = 6.38 / 256  # so near, the two merge; the median and the largest are told exactly
    assert np.quantile(distance, 0.05) == pytest.approx(smallest, rel=0.3)
    assert np.median(distance) == pytest.approx((smallest + 0.1) / 2, rel=0.05)
    assert distance.max() == pytest.approx(0.1, rel=0.05)


def test_balance_amplitude_noise_and_offset(pulses):
    clips, labels = pulses
    assert clips.shape == (5000, 128) and np.abs(clips.mean(axis=1)).max() < 1e-6
    assert np.abs(np.bincount(labels) / 5000 - 1 / 3).max() < 0.03
    peak = np.abs(clips[labels == 0]).max(axis=1)
    assert 0.45 < peak.min() < 0.55 and 0.95 < peak.max() < 1.1

    noisy, noisy_labels = datasets.draw_pulses(pulses_config())
    assert noisy.dtype == np.float32 and np.array_equal(noisy_labels, labels)
    noise = noisy - clips  # uniform in [0, 0.5), then without its mean
    assert noise.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.02)
    assert noise.max() - noise.min() < 0.5 + 0.1

    clips, labels = datasets.draw_pulses(pulses_config(noise_std=0.0, center_offset=True))
    centre, _ = envelope_moments(clips[labels == 0].astype(np.float64))
    assert centre.min() == pytest.approx(64 - 25.6, abs=3)
    assert centre.max() == pytest.approx(64 + 25.6, abs=3)


def test_pulses_are_drawn_from_the_seed_and_split_without_overlap():
    first = datasets.load(pulses_config(seed=3))
    again = datasets.load(pulses_config(seed=3))
    other = datasets.load(pulses_config(seed=4))
    assert torch.equal(first.clips, again.clips)
    assert not torch.equal(first.clips, other.clips)

    sizes = {part: len(indices) for part, indices in first.splits.items()}
    assert sizes == {"train": 3500, "valid": 500, "test": 1000}
    assert torch.cat(list(first.splits.values())).sort().values.tolist() == list(range(5000))


def test_speakers_are_those_of_the_paper():
    train = [28, 56, 7, 19, 35, 1, 6, 16, 23, 34, 46, 53, 36, 57, 9, 24, 37, 2]
    train += [8, 17, 29, 39, 48, 54, 43, 58, 14, 25, 38, 3, 10, 20, 30, 40, 49, 55]
    speakers = datasets.AUDIO_MNIST_SPEAKERS
    assert speakers["train"] == sorted(train)
    assert speakers["valid"] == [12, 47, 59, 15, 27, 41, 4, 11, 21, 31, 44, 50]
    assert speakers["test"] == [26, 52, 60, 18, 32, 42, 5, 13, 22, 33, 45, 51]


FOLDS = {"train": [1, 2, 3], "valid": [4], "test": [5]}  # the dataset's own
OWN = {"train": [5], "valid": [1, 2], "test": [3, 4]}


def splits_of(name, groups, split=None):
    clips = np.zeros((len(groups), 2), np.float32)
    labels = np.zeros(len(groups), np.int64)
    recordings = datasets.Recordings(clips, labels, groups)
    config = spoken_config(dataset_name=name, split=split)
    return datasets.load(config, recordings).splits


@pytest.mark.parametrize(("split", "groups"), [("folds", FOLDS), (OWN, OWN), (None, None)])
def test_esc50_splits_are_disjoint_and_complete(split, groups):
    folds = np.repeat([1, 2, 3, 4, 5], 80)
    splits = splits_of("esc50", folds, split)
    assert torch.cat(list(splits.values())).sort().values.tolist() == list(range(400))
    if groups is not None:
        for part, indices in splits.items():
            assert sorted(set(folds[indices])) == groups[part]
    else:
        generator = torch.Generator().manual_seed(0)
        expected = torch.utils.data.random_split(range(400), [0.7, 0.1, 0.2], generator)
        for indices, subset in zip(splits.values(), expected, strict=True):
            assert indices.tolist() == list(subset.indices)


def test_an_empty_split_is_refused():
    with pytest.raises(InputError, match="train split is empty"):
        splits_of("audio_mnist", np.array([12, 26, 12]))


def lacks(config, message):
    with pytest.raises(InputError, match=rf"^config: .*{message}"):
        datasets.check(config)


def test_configs_that_lack_something():
    known = "time_frequency, audio_mnist, esc50"
    lacks(spoken_config(dataset_name="fsdd"), f"dataset_name 'fsdd' is not one of {known}")
    missing = "key 'resample_rate' is missing: audio_mnist needs it"
    lacks(spoken_config(resample_rate=None), missing)
    unknown = "split 'folds' is not one of speakers for audio_mnist"
    lacks(spoken_config(split="folds"), unknown)
    lacks(pulses_config(split="folds"), "split is for recordings")
    for key in ("n_samples", "noise_std", "sigma_ref", "center_offset"):
        lacks(pulses_config(**{key: None}), key)


def test_configs_that_lack_nothing():
    datasets.check(pulses_config())
    datasets.check(spoken_config(split="speakers"))
    datasets.check(spoken_config(split=OWN))


def load_whole(name, folder, n_points):
    config = spoken_config(dataset_name=name, n_points=n_points)
    data = datasets.load(config, datasets.recordings_of(config, folder))
    assert data.clips.shape == (len(data.labels), n_points) and data.clips.isfinite().all()
    assert 0.01 < data.clips.square().mean().sqrt() < 0.3
    sizes = [len(indices) for indices in data.splits.values()]
    return data, sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder", "n_clips", "n_points", "expected_sizes"),
    [
        ("audio_mnist", "AudioMNIST", 3000, 8000, [2000, 500, 500]),
        ("esc50", "ESC-10", 400, 40000, [280, 40, 80]),
    ],
)
def test_real_recordings(name, folder, n_clips, n_points, expected_sizes, tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path))
    data, sizes = load_whole(name, whole_dataset(folder), n_points)
    assert len(data.clips) == n_clips and sizes == expected_sizes
    assert set(data.labels.bincount().tolist()) <= {0, n_clips // 10}


@pytest.mark.parametrize("parts", [{"train": [1, 2], "valid": [2], "test": [3]}, {"train": [1]}])
def test_a_split_of_a_dataset_has_three_parts_without_overlap(parts, monkeypatch):
    digits = datasets.DATASETS["audio_mnist"]
    monkeypatch.setitem(datasets.DATASETS, "audio_mnist", digits._replace(splits={"own": parts}))
    with pytest.raises(InputError, match=r"datasets\.py: split 'own' of audio_mnist = .* each of"):
        datasets.check(spoken_config())


@pytest.mark.parametrize(
    ("name", "write", "n_clips", "n_points", "expected_sizes"),
    [
        ("audio_mnist", write_digits, 60, 8000, [40, 10, 10]),
        ("esc50", write_sounds, 10, 40000, [7, 1, 2]),
    ],
)
def test_a_folder_of_recordings(name, write, n_clips, n_points, expected_sizes, tmp_path):
    data, sizes = load_whole(name, write(tmp_path), n_points)
    assert len(data.clips) == n_clips and sizes == expected_sizes
    assert data.labels.bincount().tolist() == [n_clips // 10] * 10


def test_preparation_needs_no_torch(tmp_path):
    write_digits(tmp_path / "audio_mnist")
    code = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = [{str(tmp_path)!r}]\n"
    code += "import datasets; datasets.main()"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "audio_mnist: 60 clips of 1 s" in result.stdout, result.stderr
