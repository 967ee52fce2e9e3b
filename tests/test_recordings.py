"""Recordings: lists, reading, padding, and the cache, whatever lies in its way."""

import os

import librosa
import numpy as np
import pytest
import soundfile
from conftest import write_audio_mnist, write_esc50

import datasets
from config import InputError
from recordings import pad_around, pad_at_end, read_recording

SAMPLES = {"audio_mnist": 8000, "esc50": 40000}
CACHE = "audio_mnist_8000Hz_8000.npy"
CLIP = "data/12/7_12_1.wav"


def load(name, data_dir, sample_rate=8000):
    n_points = SAMPLES[name] * sample_rate // 8000
    return datasets.recordings_of({"dataset_name": name, "resample_rate": sample_rate, "n_points": n_points}, data_dir)


def refused(function, *args, match):
    """The message of the InputError that a call raises: one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".lock")


# Padding


@pytest.mark.parametrize(
    ("samples", "left"), [(7998, 2), (7999, 1), (8000, 1), (8001, 0), (8002, 0), (8003, 0), (9000, 0), (1, 4000)]
)
def test_audio_mnist_padding_sample_by_sample(samples, left):
    clip = np.arange(1, samples + 1, dtype=np.float32)
    assert pad_around(clip, 8000).tolist() == ([0.0] * left + clip.tolist() + [0.0] * 8000)[:8000]


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 25])
def test_esc50_padding_sample_by_sample(samples):
    clip = np.arange(1, samples + 1, dtype=np.float32)
    assert pad_at_end(clip, 10).tolist() == (clip.tolist() + [0.0] * 10)[:10]


# Reading


@pytest.mark.parametrize(
    ("container", "subtype", "channels", "rate", "tolerance"),
    [
        ("WAV", "PCM_U8", 1, 8000, 2**-7),
        ("WAV", "PCM_16", 1, 8000, 2**-15),
        ("WAV", "PCM_16", 2, 44100, 1e-3),
        ("WAV", "PCM_24", 3, 48000, 1e-3),
        ("WAVEX", "PCM_32", 8, 11025, 1e-3),
        ("WAV", "FLOAT", 1, 96000, 1e-3),
        ("WAV", "DOUBLE", 1, 8001, 1e-3),
        ("RF64", "PCM_16", 1, 44100, 1e-3),
        ("FLAC", "PCM_16", 1, 44100, 1e-3),
        ("AIFF", "PCM_16", 1, 22050, 1e-3),
        ("OGG", "VORBIS", 1, 44100, 0.05),
        ("MP3", "MPEG_LAYER_III", 1, 44100, 0.1),
    ],
)
def test_a_tone_in_any_file(container, subtype, channels, rate, tolerance, tmp_path):
    path = tmp_path / "tone"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(path, np.stack([tone, *[0 * tone] * (channels - 1)], axis=1), rate, subtype, format=container)
    clip = read_recording(path, 8000)
    assert clip.dtype == np.float32 and len(clip) == 8000
    expected = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(clip[100:-100], expected[100:-100], rtol=0, atol=tolerance)
    content = path.read_bytes()
    for n_cut in (1, 100, len(content) // 2, len(content) - 50):
        path.write_bytes(content[:-n_cut])
        refused(read_recording, path, 8000, match="replace or remove it")


@pytest.mark.parametrize("rate", [7, 8000, 16000, 44100, 48000, 1000003])
@pytest.mark.parametrize("n_samples", [1, 2, 1000, 31234])
def test_samples_are_those_of_librosa(rate, n_samples, tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, n_samples).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", samples, rate, "FLOAT")
    clip = read_recording(tmp_path / "noise.wav", 8000)
    assert np.array_equal(clip, librosa.resample(samples, orig_sr=rate, target_sr=8000, res_type="soxr_hq"))


def test_silence_streams_and_estimated_lengths_are_read(tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, np.zeros(500), 8000)
    assert not read_recording(path, 8000).any()
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # who streams does not know the length
    path.write_bytes(content)
    assert len(read_recording(path, 8000)) == 500
    quiet_first = np.random.default_rng(0).uniform(-0.1, 0.1, 44100 * 4) * (np.arange(44100 * 4) > 44100 * 2)
    options = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(path, quiet_first, 44100, **options)
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xfb", 4) :])  # without its first frame, which tells the length
    assert len(read_recording(path, 8000)) == pytest.approx(32000, rel=0.02)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_its_last_page_is_cut_short(subtype, tmp_path):
    path = tmp_path / "recording.ogg"
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000 * 5)
    soundfile.write(path, noise, 48000, subtype, format="OGG")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])
    assert len(soundfile.read(path)[0]) > 48000  # libsndfile reads what is there
    refused(read_recording, path, 8000, match="is cut short")
    path.write_bytes(content + b"TAG of some program")
    assert len(read_recording(path, 8000)) == pytest.approx(40000, abs=10)


def with_endless_header(path):
    soundfile.write(path, np.zeros(500), 8000, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] |= 15
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)


RECORDINGS = {
    "empty": lambda path: path.write_bytes(b""),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:44]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("not audio"),
    "no samples": lambda path: soundfile.write(path, np.zeros(0), 8000),
    "NaN": lambda path: soundfile.write(path, np.full(100, np.nan), 8000, subtype="FLOAT"),
    "one infinite": lambda path: soundfile.write(path, np.array([0, 1e300, 0]), 8000, subtype="DOUBLE"),
    "of 69 billion samples by its header": with_endless_header,
    "of a day by its rate": lambda path: soundfile.write(path, np.zeros(100000), 1),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "looping link": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", RECORDINGS)
def test_damaged_recordings_are_named_and_leave_no_cache(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    RECORDINGS[damage](folder / CLIP)
    refused(load, "audio_mnist", tmp_path, match=r"7_12_1\.wav: .*replace or remove it\.$")
    assert left_in(folder) == []


# Whole folders


def test_audio_mnist_is_resampled_padded_and_ordered(tmp_path, capsys):
    write_audio_mnist(tmp_path / "audio_mnist")
    recordings = load("audio_mnist", tmp_path)
    assert recordings.clips.shape == (6, 8000)
    assert recordings.labels.tolist() == [7] * 6 and recordings.groups.tolist() == [12, 12, 26, 26, 28, 28]
    assert recordings.labels.dtype == recordings.groups.dtype == np.int64
    left = 1 + (8000 - 4000) // 2
    assert not recordings.clips[0, :left].any() and not recordings.clips[0, left + 4000 :].any()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    np.testing.assert_allclose(recordings.clips[0, left + 100 : left + 3900], expected[100:3900], atol=2e-3)
    assert "6 of 30000 recordings" in capsys.readouterr().err


def test_esc50_by_either_folder_and_its_short_clips(tmp_path, capsys):
    folder = write_esc50(tmp_path / "esc50")
    by_base, by_itself = load("esc50", tmp_path), load("esc50", folder)
    assert by_base.labels.tolist() == [0, 1, 2] and by_base.groups.tolist() == [1, 2, 3]
    assert np.array_equal(by_base.clips, by_itself.clips) and by_base.identity == by_itself.identity
    assert "shorter" not in capsys.readouterr().err
    soundfile.write(folder / "audio" / "2-101-A-1.wav", np.ones(44100 * 4), 44100)
    assert not load("esc50", tmp_path).clips[1, 32000:].any()
    assert "1 recordings are shorter than 5 s, zeros follow them: 'audio/2-101-A-1.wav'" in capsys.readouterr().err


def copied(folder, file, to):
    (folder / to).parent.mkdir(exist_ok=True)
    (folder / to).write_bytes((folder / file).read_bytes())


LAYOUTS = {
    "same clip in 12 and 012": (lambda folder: copied(folder, CLIP, "data/012/7_12_1.wav"), "is the same clip as"),
    "same clip in two names": (lambda folder: copied(folder, CLIP, "data/12/7_12_01.wav"), "is the same clip as"),
    "another's folder": (
        lambda folder: copied(folder, CLIP, "data/26/7_12_1.wav"),
        "speaker 12 must be that of the folder",
    ),
    "speaker 61": (lambda folder: copied(folder, CLIP, "data/61/7_61_0.wav"), "speaker 61 must be .* 1 to 60"),
    "file in place of data": (lambda folder: replaced_by_file(folder / "data"), "data: cannot be read"),
    "file in place of a speaker": (lambda folder: replaced_by_file(folder / "data" / "12"), "12: cannot be read"),
    "link to nowhere": (lambda folder: (folder / "data" / "13").symlink_to("nowhere"), "13: cannot be read"),
}


def replaced_by_file(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.write_text("")


@pytest.mark.parametrize("damage", LAYOUTS)
def test_layouts_that_contradict_themselves(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    change, message = LAYOUTS[damage]
    change(folder)
    refused(load, "audio_mnist", tmp_path, match=message)
    assert left_in(folder) in ([], ["data"])


def test_other_files_are_left_out_and_named(tmp_path, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    for other in ("data/12/10_12_0.wav", "data/12/7_12_1 (copy).wav", "data/old/7_12_1.wav", "data/.x/7_12_1.wav"):
        copied(folder, CLIP, other)
    assert len(load("audio_mnist", tmp_path).clips) == 6
    assert "3 entries are no recordings" in (error := capsys.readouterr().err) and "'data/12/10_12_0.wav'" in error


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere"])
def test_table_that_is_no_file(kind, tmp_path):
    folder = write_esc50(tmp_path / "esc50")
    table = folder / "meta" / "esc50.csv"
    table.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to nowhere": lambda path: path.symlink_to("nowhere")}[kind](table)
    refused(load, "esc50", tmp_path, match="is not a file|no recordings in .*download_data")


def test_a_folder_that_is_not_there_is_not_another_one(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "birds", datasets.Dataset(2, 3, ".", list, pad_at_end, {"random": None}))
    assert datasets.find_folder("birds", tmp_path) == tmp_path / "birds"
    assert datasets.find_folder("esc50", write_esc50(tmp_path / "ESC-50")) == tmp_path / "ESC-50"


def test_missing_data_and_missing_files(tmp_path, capsys):
    refused(load, "esc50", tmp_path / "nowhere", match="no recordings in .*download_data")
    folder = write_esc50(tmp_path / "esc50")
    (folder / "audio" / "2-101-A-1.wav").rename(folder / "audio" / "other.wav")
    assert load("esc50", tmp_path).labels.tolist() == [0, 2]
    error = capsys.readouterr().err
    assert "names 1 files that are not in" in error and "2-101-A-1.wav" in error
    assert "1 entries are not in" in error and "'other.wav'" in error
