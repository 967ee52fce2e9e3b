"""Recordings: lists, reading and padding, whatever lies in a dataset's folder."""

import os

import librosa
import numpy as np
import pytest
import soundfile
from conftest import write_audio_mnist, write_esc50

import datasets
from config import InputError
from recordings import list_esc50, pad_around, pad_at_end, read_recording

SAMPLES = {"audio_mnist": 8000, "esc50": 40000}
CACHE = "audio_mnist_8000Hz_8000.npy"
CLIP = "data/12/7_12_1.wav"


def load(name, data_dir, sample_rate=8000):
    n_points = SAMPLES[name] * sample_rate // 8000
    return datasets.recordings_of(
        {"dataset_name": name, "resample_rate": sample_rate, "n_points": n_points}, data_dir
    )


def refused(function, *args, match):
    """Asserts that a call raises an InputError of one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        function(*args)
    assert "\n" not in str(error.value)


def left_in(folder):
    return sorted(
        path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"
    )


@pytest.mark.parametrize(
    ("n_samples", "left"), [(1, 4000), (7999, 1), (8000, 1), (8001, 0), (8003, 0), (9000, 0)]
)
def test_padding_sample_by_sample(n_samples, left):
    clip = np.arange(1, n_samples + 1, dtype=np.float32)
    assert pad_around(clip, 8000).tolist() == ([0.0] * left + clip.tolist() + [0.0] * 8000)[:8000]
    assert pad_at_end(clip, 8000).tolist() == (clip.tolist() + [0.0] * 8000)[:8000]


@pytest.mark.parametrize(
    ("container", "subtype", "channels", "rate", "tolerance"),
    [
        ("WAV", "PCM_U8", 1, 8000, 2**-7),
        ("WAV", "PCM_16", 2, 44100, 1e-3),
        ("WAVEX", "PCM_24", 8, 48000, 1e-3),
        ("RF64", "PCM_16", 1, 44100, 1e-3),
        ("WAV", "DOUBLE", 1, 8001, 1e-3),
        ("FLAC", "PCM_16", 1, 44100, 1e-3),
        ("AIFF", "PCM_16", 1, 22050, 1e-3),
        ("OGG", "VORBIS", 1, 44100, 0.05),
        ("MP3", "MPEG_LAYER_III", 1, 44100, 0.1),
    ],
)
def test_a_tone_in_any_file(container, subtype, channels, rate, tolerance, tmp_path):
    path = tmp_path / "tone"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(
        path,
        np.stack([tone, *[0 * tone] * (channels - 1)], axis=1),
        rate,
        subtype,
        format=container,
    )
    clip = read_recording(path, 8000)
    assert clip.dtype == np.float32 and len(clip) == 8000
    expected = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(clip[100:-100], expected[100:-100], rtol=0, atol=tolerance)
    content = path.read_bytes()
    for n_cut in (1, 100, len(content) // 2, len(content) - 50, len(content)):
        path.write_bytes(content[: len(content) - n_cut])
        refused(read_recording, path, 8000, match="replace or remove it")


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 1000003])
def test_samples_are_those_of_librosa(rate, tmp_path):
    for n_samples in (1, 2, 31234):
        samples = np.random.default_rng(0).uniform(-1, 1, n_samples).astype(np.float32)
        soundfile.write(tmp_path / "noise.wav", samples, rate, "FLOAT")
        clip = read_recording(tmp_path / "noise.wav", 8000)
        assert np.array_equal(
            clip, librosa.resample(samples, orig_sr=rate, target_sr=8000, res_type="soxr_hq")
        )


def test_silence_streams_and_estimated_lengths_are_read(tmp_path):
    path = tmp_path / "recording.wav"
    soundfile.write(path, np.zeros(500), 8000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4  # who streams does not know the length
    path.write_bytes(content)
    assert read_recording(path, 8000).tolist() == [0.0] * 500
    quiet_first = np.random.default_rng(0).uniform(-0.1, 0.1, 44100 * 4) * (
        np.arange(44100 * 4) > 44100 * 2
    )
    soundfile.write(
        path, quiet_first, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5
    )
    content = path.read_bytes()
    path.write_bytes(
        content[content.index(b"\xff\xfb", 4) :]
    )  # without its first frame, which tells the length
    assert len(read_recording(path, 8000)) == pytest.approx(32000, rel=0.02)


def test_ogg_without_its_last_page_is_cut_short(tmp_path):
    path = tmp_path / "recording.ogg"
    soundfile.write(
        path, np.random.default_rng(0).uniform(-0.5, 0.5, 48000 * 5), 48000, "OPUS", format="OGG"
    )
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


DAMAGES = {
    "text": lambda path: path.write_text("not audio"),
    "no samples": lambda path: soundfile.write(path, np.zeros(0), 8000),
    "one infinite": lambda path: soundfile.write(
        path, np.array([0, 1e300, 0]), 8000, subtype="DOUBLE"
    ),
    "of 69 billion samples by its header": with_endless_header,
    "of a day by its rate": lambda path: soundfile.write(path, np.zeros(100000), 1),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_recordings_are_named_and_leave_no_cache(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    DAMAGES[damage](folder / CLIP)
    refused(load, "audio_mnist", tmp_path, match=r"7_12_1\.wav: .*replace or remove it\.$")
    assert left_in(folder) == []


def test_audio_mnist_is_resampled_padded_and_ordered(tmp_path, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist", ["28", "12", "3"])
    (folder / CLIP).rename(folder / "data/12/0_12_3.wav")
    (folder / "data" / "audioMNIST_meta.txt").touch()
    recordings = load("audio_mnist", tmp_path)
    assert recordings.clips.shape == (6, 8000)
    assert recordings.labels.tolist() == [7, 7, 0, 7, 7, 7] and recordings.groups.tolist() == [
        3,
        3,
        12,
        12,
        28,
        28,
    ]
    assert recordings.labels.dtype == recordings.groups.dtype == np.int64
    left = 1 + (8000 - 4000) // 2
    assert not recordings.clips[0, :left].any() and not recordings.clips[0, left + 4000 :].any()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    np.testing.assert_allclose(
        recordings.clips[0, left + 100 : left + 3900], expected[100:3900], atol=2e-3
    )
    error = capsys.readouterr().err
    assert "6 of 30000 recordings" in error and "left out" not in error


def test_audio_mnist_names_what_it_leaves_out(tmp_path, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    others = ["12/10_12_0", "12/7_12_1 (copy)", "12/²_12_0", "old/7_12_1", "7_12_1", "12/._7_12_1"]
    for other in (f"data/{other}.wav" for other in others):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes((folder / CLIP).read_bytes())
    assert load("audio_mnist", tmp_path).groups.tolist() == [12, 12, 26, 26, 28, 28]
    error = capsys.readouterr().err
    assert "5 entries of" in error and "are left out: 'data/12/10_12_0.wav'" in error


@pytest.mark.parametrize("other", ["12/7_12_01", "012/7_12_1", "26/3_12_1", "61/7_61_0", "0/7_0_0"])
def test_audio_mnist_that_contradicts_itself_is_refused(other, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    path = folder / "data" / f"{other}.wav"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / CLIP).read_bytes())
    refused(
        load,
        "audio_mnist",
        tmp_path,
        match=r"_[0-9]+\.wav: is there twice, or not of its folder's speaker",
    )


def test_esc50_by_either_folder_and_with_missing_files(tmp_path, capsys):
    refused(load, "esc50", tmp_path, match="no recordings in .*download_data")
    folder = write_esc50(tmp_path / "esc50")
    by_base, by_itself = load("esc50", tmp_path), load("esc50", folder)
    assert by_base.labels.tolist() == [0, 1, 2] and by_base.groups.tolist() == [1, 2, 3]
    assert np.array_equal(by_base.clips, by_itself.clips) and by_base.identity == by_itself.identity
    assert "left out" not in (error := capsys.readouterr().err) and "shorter" not in error
    soundfile.write(folder / "audio" / "2-101-A-1.wav", np.ones(44100 * 4), 44100)
    assert not load("esc50", tmp_path).clips[1, 32000:].any()
    assert (
        "1 recordings are shorter than 5 s, and zeros follow them: 'audio/2-101-A-1.wav'"
        in capsys.readouterr().err
    )
    (folder / "audio" / "2-101-A-1.wav").rename(folder / "audio" / "other.wav")
    assert load("esc50", tmp_path).labels.tolist() == [0, 2]
    error = capsys.readouterr().err
    assert "1 files that" in error and "missing: 'audio/2-101-A-1.wav'" in error
    assert "1 entries of" in error and "are left out: 'audio/other.wav'" in error


def test_tables_of_esc50_that_are_written_differently(tmp_path):
    for place in ("meta", "audio"):
        (tmp_path / place).mkdir()
    (tmp_path / "audio" / "2-101-A-1.flac").touch()
    table = b'\xef\xbb\xbf"take","target","filename","fold"\r\n\r\n"a, b","1","2-101-A-1.flac","2"\r\n\r\n'
    (tmp_path / "meta" / "esc50.csv").write_bytes(table)
    assert list_esc50(tmp_path) == [["audio/2-101-A-1.flac", 1, 2]]


LINES = {
    "another fold": b"1-100-A-0.wav,2,0\n",
    "another target": b"1-100-A-0.wav,1,1\n",
    "no number": b"1-100-A-0.wav,1,\n",
    "fold 6": b"6-100-A-0.wav,6,0\n",
    "target 50": b"1-100-A-50.wav,1,50\n",
    "no UTF-8": b"\xff\n",
    "open quote": b'"1-100-A-0.wav,1,0\n',
    "there twice": b"2-101-A-1.wav,2,1\n",
}


@pytest.mark.parametrize("kind", LINES)
def test_tables_of_esc50_that_contradict_themselves(kind, tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_bytes(
        b"filename,fold,target\n\n2-101-A-1.flac,2,1\n" + LINES[kind]
    )
    line = "" if kind in ("no UTF-8", "open quote") else "in line 4 "
    refused(
        list_esc50,
        tmp_path,
        match=rf"esc50\.csv: cannot be used.* {line}.*replace it by ESC-50's\.$",
    )


def test_table_that_is_a_pipe_is_not_opened(tmp_path):
    (tmp_path / "meta").mkdir()
    os.mkfifo(tmp_path / "meta" / "esc50.csv")
    refused(list_esc50, tmp_path, match="a folder or a special file")


def test_a_folder_that_is_not_there_is_not_another_one(tmp_path, monkeypatch):
    monkeypatch.setitem(
        datasets.DATASETS, "birds", datasets.Dataset(2, 3, ".", list, pad_at_end, {"random": None})
    )
    assert datasets.find_folder("birds", tmp_path) == tmp_path / "birds"
    assert datasets.find_folder("esc50", write_esc50(tmp_path / "ESC-50")) == tmp_path / "ESC-50"
