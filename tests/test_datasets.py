"""The drawn dataset's statistics, the recordings' splits, padding, resampling and caches."""

import csv
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from conftest import shared

import datasets
import search_spaces
from datasets import InputError, load_recordings, pad_around, pad_at_end, split_recordings


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
        ("esc50", {"train": [1], "valid": [1], "test": [2]}, "groups of its own"),
        ("esc50", {"train": [1], "test": [2]}, "groups of its own"),
        ("esc50", {"train": [1], "valid": [2], "test": [9]}, "test split is empty"),
        ("audio_mnist", None, "train split is empty"),
    ],
)
def test_splits_that_cannot_be(name, split, message):
    groups = np.array([12, 26, 12]) if name == "audio_mnist" else np.array([1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=message):
        split_recordings(name, groups, split)


# Padding


@pytest.mark.parametrize(
    ("samples", "left"), [(7998, 2), (7999, 1), (8000, 1), (8001, 0), (8002, 0), (8003, 0), (9000, 0), (1, 4000)]
)
def test_audio_mnist_padding_sample_by_sample(samples, left):
    clip = np.arange(1, samples + 1, dtype=np.float32)
    padded = pad_around(clip, 8000)
    expected = ([0.0] * left + clip.tolist() + [0.0] * 8000)[:8000]
    assert padded.tolist() == expected


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 25])
def test_esc50_padding_sample_by_sample(samples):
    clip = np.arange(1, samples + 1, dtype=np.float32)
    assert pad_at_end(clip, 10).tolist() == (clip.tolist() + [0.0] * 10)[:10]


# Recordings and caches


def write_audio_mnist(folder, speakers=("28", "12", "26"), repetitions=2):
    """A few tones in AudioMNIST's layout: 48 kHz, of different lengths."""
    for speaker in speakers:
        (folder / "data" / speaker).mkdir(parents=True)
        for repetition in range(repetitions):
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(24000 + 4800 * repetition) / 48000)
            soundfile.write(folder / "data" / speaker / f"7_{speaker}_{repetition}.wav", tone, 48000, subtype="FLOAT")
    return folder


def write_esc50(folder, rows=3):
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for i in range(rows):
            table.writerow([f"1-{i}-A-{i}.wav", i % 5 + 1, i, "tone", "False", i, "A"])
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100 * 5) / 44100)
            soundfile.write(folder / "audio" / f"1-{i}-A-{i}.wav", np.stack([tone, 0 * tone], axis=1), 44100)
    return folder


def test_48_khz_is_resampled_and_padded(tmp_path, capsys):
    write_audio_mnist(tmp_path / "audio_mnist")
    recordings = load_recordings("audio_mnist", tmp_path, 8000, 8000)
    assert recordings.clips.shape == (6, 8000)
    assert recordings.labels.tolist() == [7] * 6
    assert recordings.groups.tolist() == [12, 12, 26, 26, 28, 28]
    left = 1 + (8000 - 4000) // 2
    assert not recordings.clips[0, :left].any() and not recordings.clips[0, left + 4000 :].any()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    np.testing.assert_allclose(recordings.clips[0, left + 100 : left + 3900], expected[100:3900], atol=2e-3)
    assert "6 of 30000 recordings" in capsys.readouterr().err


def test_stereo_is_averaged(tmp_path):
    write_esc50(tmp_path / "esc50")
    recordings = load_recordings("esc50", tmp_path, 8000, 40000)
    assert recordings.labels.tolist() == [0, 1, 2] and recordings.groups.tolist() == [1, 2, 3]
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(40000) / 8000)
    np.testing.assert_allclose(recordings.clips[0, 100:-100], expected[100:-100], atol=2e-3)


def test_recordings_are_the_same_by_either_folder(tmp_path):
    write_esc50(tmp_path / "esc50")
    by_base, by_itself = (load_recordings("esc50", path, 8000, 40000) for path in (tmp_path, tmp_path / "esc50"))
    assert np.array_equal(by_base.clips, by_itself.clips)


def test_cache_is_used_without_recordings_and_libraries(tmp_path, monkeypatch):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load_recordings("audio_mnist", tmp_path, 8000, 8000)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    monkeypatch.setitem(__import__("sys").modules, "librosa", None)
    again = load_recordings("audio_mnist", tmp_path, 8000, 8000)
    (folder / "data").rename(tmp_path / "elsewhere")
    without = load_recordings("audio_mnist", tmp_path, 8000, 8000)
    for recordings in (again, without):
        assert all(np.array_equal(a, b) for a, b in zip(recordings, before, strict=True))
    assert type(without.clips) is np.ndarray  # Ray's object store shares plain arrays only


def test_cache_follows_the_recordings(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    load_recordings("audio_mnist", tmp_path, 8000, 8000)
    changed = folder / "data" / "28" / "7_28_0.wav"
    soundfile.write(changed, np.full(30000, 0.25), 48000)
    assert load_recordings("audio_mnist", tmp_path, 8000, 8000).clips[4, 4000] == pytest.approx(0.25, abs=1e-3)
    changed.unlink()
    assert len(load_recordings("audio_mnist", tmp_path, 8000, 8000).clips) == 5
    assert load_recordings("audio_mnist", tmp_path, 4000, 4000).clips.shape == (5, 4000)  # beside the other cache
    assert len(list(folder.glob("*.npy"))) == 2


def test_damaged_cache_is_made_again(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load_recordings("audio_mnist", tmp_path, 8000, 8000).clips.copy()
    cache = folder / "audio_mnist_8000Hz_8000.npy"
    for damage in (cache.read_bytes()[:1000], b"", b"text"):
        cache.write_bytes(damage)
        assert np.array_equal(load_recordings("audio_mnist", tmp_path, 8000, 8000).clips, before)
    cache.with_suffix(".json").write_text("{")
    assert np.array_equal(load_recordings("audio_mnist", tmp_path, 8000, 8000).clips, before)


def test_recordings_are_never_written_to(tmp_path, monkeypatch):
    folder = write_esc50(tmp_path / "esc50")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "cache"))
    load_recordings("esc50", tmp_path, 8000, 40000)
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    } == before
    assert sorted(os.listdir(tmp_path / "cache")) == [f"esc50_8000Hz_40000.{kind}" for kind in ("json", "lock", "npy")]


@pytest.mark.parametrize("content", [b"", b"not audio", None])
def test_unreadable_recording_is_named_and_leaves_no_cache(content, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    bad = folder / "data" / "12" / "7_12_1.wav"
    if content is None:
        soundfile.write(bad, np.full(100, np.nan), 8000, subtype="FLOAT")
    else:
        bad.write_bytes(content)
    with pytest.raises(InputError, match=r"7_12_1\.wav"):
        load_recordings("audio_mnist", tmp_path, 8000, 8000)
    assert sorted(os.listdir(folder)) == ["audio_mnist_8000Hz_8000.lock", "data"]


def test_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    write_audio_mnist(tmp_path / "audio_mnist")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match="DMEL_CACHE_DIR"):
        load_recordings("audio_mnist", tmp_path, 8000, 8000)


def test_missing_data_and_wrong_tables(tmp_path):
    with pytest.raises(InputError, match="download_data"):
        load_recordings("esc50", tmp_path / "nowhere", 8000, 40000)
    folder = write_esc50(tmp_path / "esc50")
    (folder / "audio" / "1-1-A-1.wav").unlink()
    assert len(load_recordings("esc50", tmp_path, 8000, 40000).clips) == 2
    table = folder / "meta" / "esc50.csv"
    table.write_text(table.read_text().replace("1-2-A-2.wav,3,2", "1-2-A-2.wav,3,77"))
    with pytest.raises(InputError, match="target 77 and fold 3 of line 4"):
        load_recordings("esc50", tmp_path, 8000, 40000)
    table.write_text(table.read_text().replace("target", "class"))
    with pytest.raises(InputError, match="target"):
        load_recordings("esc50", tmp_path, 8000, 40000)


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
    recordings = load_recordings(name, shared(folder), 8000, n_points)
    data = datasets.load({"dataset_name": name}, recordings)
    assert data.clips.shape == (n_clips, n_points) and data.clips.isfinite().all()
    assert tuple(len(indices) for indices in data.splits.values()) == sizes
    counts = data.labels.bincount()
    assert set(counts[counts > 0].tolist()) == {n_clips // 10}
    assert 0.01 < data.clips.square().mean().sqrt() < 0.3
    index = json.loads((tmp_path / f"{name}_8000Hz_{n_points}.json").read_text())
    assert index["n_files"] == n_clips and index["sample_rate"] == 8000
