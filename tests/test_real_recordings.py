"""Real recordings, from their files to a trained network: digits in WAV, environments in Ogg."""

from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

import datasets
import search_spaces
import train
from config import parse

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path))


def config_of(space, **changes):
    chosen = {"init_lambd": 46.7, "trainable": True, "seed": 0}
    return parse({**space(3), **chosen, **changes})


def test_a_network_learns_digits_and_moves_its_window():
    config = config_of(search_spaces.audio_mnist)
    recordings = datasets.recordings_of(config, DATA / "AudioMNIST")
    assert recordings.clips.shape == (60, 8000)
    assert np.bincount(recordings.labels).tolist() == [6] * 10

    data = datasets.load(config, recordings)
    assert {part: len(indices) for part, indices in data.splits.items()} == {
        "train": 40,
        "valid": 10,
        "test": 10,
    }
    rows = []
    train.train(config, data, lambda row, snapshot: rows.append(row))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["lambd_est"] != pytest.approx(46.7, abs=0.1)


def test_clips_of_environments_are_those_of_librosa():
    config = config_of(search_spaces.esc50)
    recordings = datasets.recordings_of(config, DATA / "ESC-10")
    table = (DATA / "ESC-10" / "meta" / "esc50.csv").read_text().splitlines()[1:]
    for clip, label, row in zip(recordings.clips, recordings.labels, table, strict=True):
        name, _, target, *_ = row.split(",")
        assert label == int(target)
        path = DATA / "ESC-10" / "audio" / name
        assert soundfile.info(path).samplerate == 44100
        expected, _ = librosa.load(path, sr=8000, mono=True)
        expected = expected[:40000]
        np.testing.assert_allclose(clip[: len(expected)], expected, rtol=0, atol=1e-6)
        assert not clip[len(expected) :].any()
