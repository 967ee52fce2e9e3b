"""The drawn dataset's statistics, what a config must say of its data, and the splits of recordings."""

import numpy as np
import pytest
import torch
from conftest import shared

import datasets
import search_spaces
from config import InputError
from datasets import split_recordings


def pulses_config(**changes):
    return {**search_spaces.time_frequency(1), "seed": 0} | changes


@pytest.fixture(scope="module")
def pulses():
    clips, labels = datasets.draw_pulses(pulses_config(noise_std=0.0))
    return clips.astype(np.float64), labels


# time_frequency


def test_pulses_have_the_right_shapes_and_balance(pulses):
    clips, labels = pulses
    assert clips.shape == (5000, 128)
    assert np.abs(np.bincount(labels) / 5000 - 1 / 3).max() < 0.03
    assert np.abs(clips.mean(axis=1)).max() < 1e-6
    assert datasets.draw_pulses(pulses_config())[0].dtype == np.float32


def envelope_moments(clips):
    """Centre and width of the energy of each clip, in samples: a pulse of width s has energy of width s/√2."""
    n = np.arange(clips.shape[1])
    weight = clips**2 / (clips**2).sum(axis=1, keepdims=True)
    centre = weight @ n
    return centre, np.sqrt(2 * (weight * (n - centre[:, None]) ** 2).sum(axis=1))


def test_class_0_is_one_pulse_wider_or_narrower_than_sigma(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 0])
    scale = width / 6.38
    largest = 2 * (128 / 5) / (6 * 6.38) + 1
    assert np.abs(centre - 64).max() < 1.5
    assert scale.min() == pytest.approx(1 / largest, rel=0.05)
    assert scale.max() == pytest.approx(largest, rel=0.05)
    assert (scale > 1).mean() == pytest.approx(0.5, abs=0.05)
    assert np.median(scale[scale > 1]) == pytest.approx((1 + largest) / 2, rel=0.05)  # uniform in each half


def test_class_1_is_two_pulses_of_width_sigma_apart_in_time(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 1])
    assert np.abs(centre - 64).mean() < 2
    # Two equal pulses at ±t have a spread of √(σ² + 2t²) in this measure, with t from σ to 128/5.
    assert width.min() > 6.38 and width.max() == pytest.approx(np.sqrt(6.38**2 + 2 * 25.6**2), rel=0.05)
    left, right = clips[labels == 1, :64], clips[labels == 1, 64:]
    balance = (left**2).sum(axis=1) / ((left**2).sum(axis=1) + (right**2).sum(axis=1))
    assert balance.mean() == pytest.approx(0.5, abs=0.02)


def test_class_2_is_two_pulses_at_one_time_apart_in_frequency(pulses):
    clips, labels = pulses
    centre, width = envelope_moments(clips[labels == 2])
    assert np.abs(centre - 64).mean() < 1.5
    assert np.median(width) == pytest.approx(6.38, rel=0.1)
    spectrum = np.abs(np.fft.rfft(clips[labels == 2], 1024)) ** 2
    frequency = np.fft.rfftfreq(1024)
    low, high = frequency < 0.25, frequency > 0.25
    below = frequency[low][spectrum[:, low].argmax(axis=1)]
    above = frequency[high][spectrum[:, high].argmax(axis=1)]
    np.testing.assert_allclose(np.median(above + below), 0.5, atol=0.01)
    distance = (above - below) / 2
    smallest = 6.38 / 256  # so near, the two merge; the median and the largest are told exactly
    assert np.quantile(distance, 0.05) == pytest.approx(smallest, rel=0.3)
    assert np.median(distance) == pytest.approx((smallest + 0.1) / 2, rel=0.05)
    assert distance.max() == pytest.approx(0.1, rel=0.05)


def test_amplitude_and_noise(pulses):
    clips, labels = pulses
    peak = np.abs(clips[labels == 0]).max(axis=1)
    assert 0.45 < peak.min() < 0.55 and 0.95 < peak.max() < 1.1
    noisy, noisy_labels = datasets.draw_pulses(pulses_config())
    assert np.array_equal(noisy_labels, labels)
    noise = noisy - clips
    assert noise.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.02)  # uniform in [0, 0.5), then without its mean
    assert noise.max() - noise.min() < 0.5 + 0.1


def test_center_offset_moves_the_pulses():
    clips, labels = datasets.draw_pulses(pulses_config(noise_std=0.0, center_offset=True))
    centre, _ = envelope_moments(clips[labels == 0].astype(np.float64))
    assert centre.min() == pytest.approx(64 - 25.6, abs=3) and centre.max() == pytest.approx(64 + 25.6, abs=3)


def test_pulses_are_drawn_from_the_seed_and_split_without_overlap():
    first, again, other = (datasets.load(pulses_config(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first.clips, again.clips) and not torch.equal(first.clips, other.clips)
    assert {part: len(indices) for part, indices in first.splits.items()} == {"train": 3500, "valid": 500, "test": 1000}
    assert torch.cat(list(first.splits.values())).sort().values.tolist() == list(range(5000))


# Splits


def test_speaker_splits_cover_all_sixty_speakers_once():
    speakers = datasets.AUDIO_MNIST_SPEAKERS
    assert sorted(speaker for part in speakers.values() for speaker in part) == list(range(1, 61))
    assert [len(speakers[part]) for part in ("train", "valid", "test")] == [36, 12, 12]


@pytest.mark.parametrize("split", [None, "folds", {"train": [5], "valid": [1, 2], "test": [3, 4]}])
def test_esc50_splits_are_disjoint_and_complete(split):
    groups = np.repeat([1, 2, 3, 4, 5], 80)
    splits = split_recordings("esc50", groups, split)
    assert torch.cat(list(splits.values())).sort().values.tolist() == list(range(400))
    if split is None:
        assert [len(indices) for indices in splits.values()] == [280, 40, 80]
        expected = torch.utils.data.random_split(range(400), [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))
        assert [indices.tolist() for indices in splits.values()] == [list(part.indices) for part in expected]
    else:
        numbers = {part: sorted(set(groups[indices])) for part, indices in splits.items()}
        assert numbers == ({"train": [1, 2, 3], "valid": [4], "test": [5]} if split == "folds" else split)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("esc50", "speakers", "split 'speakers' is not one of random, folds"),
        ("esc50", {"train": [1], "valid": [2], "test": [9]}, "test split is empty"),
        ("audio_mnist", None, "train split is empty"),
    ],
)
def test_splits_that_cannot_be(name, split, message):
    groups = np.array([12, 26, 12]) if name == "audio_mnist" else np.array([1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=message):
        split_recordings(name, groups, split)


SPOKEN = {"dataset_name": "audio_mnist", "resample_rate": 8000, "split": None}


def test_configs_that_have_what_their_data_need():
    datasets.check(pulses_config())
    datasets.check(SPOKEN)
    datasets.check(SPOKEN | {"split": "speakers"})
    datasets.check(SPOKEN | {"split": {"train": [1], "valid": [2], "test": [3]}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SPOKEN | {"dataset_name": "fsdd"}, "dataset_name 'fsdd' is not one of time_frequency, audio_mnist, esc50"),
        (SPOKEN | {"resample_rate": None}, "key 'resample_rate' is missing: audio_mnist needs it"),
        (SPOKEN | {"split": "folds"}, "split 'folds' is not one of speakers for audio_mnist"),
        (pulses_config(split="folds"), "split is for recordings"),
        *(
            (pulses_config(**{key: None}), f"key '{key}' is missing: time_frequency needs it")
            for key in ("n_samples", "noise_std", "sigma_ref", "center_offset")
        ),
    ],
)
def test_configs_that_lack_something(config, message):
    with pytest.raises(InputError, match=message) as error:
        datasets.check(config)
    assert str(error.value).startswith("config: ") and "\n" not in str(error.value)


# The real recordings


@pytest.mark.parametrize(
    ("name", "folder", "n_clips", "n_points", "sizes"),
    [
        ("audio_mnist", "data/AudioMNIST", 3000, 8000, (2000, 500, 500)),
        ("esc50", "data/ESC-10", 400, 40000, (280, 40, 80)),
    ],
)
def test_real_recordings(name, folder, n_clips, n_points, sizes, tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path))
    config = {"dataset_name": name, "resample_rate": 8000, "n_points": n_points}
    recordings = datasets.recordings_of(config, shared(folder))
    data = datasets.load(config, recordings)
    assert data.clips.shape == (n_clips, n_points) and data.clips.isfinite().all()
    assert tuple(len(indices) for indices in data.splits.values()) == sizes
    counts = data.labels.bincount()
    assert set(counts[counts > 0].tolist()) == {n_clips // 10}
    assert 0.01 < data.clips.square().mean().sqrt() < 0.3
