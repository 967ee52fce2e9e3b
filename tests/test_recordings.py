"""Recordings: lists, reading and padding, whatever lies in a dataset's folder."""

import hashlib
import io
import os
from types import SimpleNamespace

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
    config = SimpleNamespace(
        dataset_name=name,
        resample_rate=sample_rate,
        n_points=SAMPLES[name] * sample_rate // 8000,
    )
    return datasets.recordings_of(config, data_dir)


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
def test_a_tone_in_any_format(container, subtype, channels, rate, tolerance, tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = np.zeros((rate, channels))
    samples[:, 0] = tone
    content = encoded(samples, rate, subtype, container)

    clip = samples_of(content, tmp_path)
    assert clip.dtype == np.float32 and len(clip) == 8000
    expected = 0.5 / channels * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    np.testing.assert_allclose(clip[100:-100], expected[100:-100], rtol=0, atol=tolerance)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "FLAC", "AIFF", "OGG", "MP3"])
def test_a_wav_that_is_cut_off_is_refused_and_of_others_what_is_there_is_read(container, tmp_path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    content = encoded(noise, 8000, container=container)
    for n_cut in (1, 100, len(content) // 2, len(content) - 50):
        cut = content[:-n_cut]
        if container in ("WAV", "WAVEX"):
            with pytest.raises(ValueError, match="it is a WAV that is cut off"):
                samples_of(cut, tmp_path)
        else:
            try:
                assert 0 < len(samples_of(cut, tmp_path)) <= 8000
            except ValueError as error:
                assert str(error) in ("libsndfile cannot read it", "it is empty")


def encoded(samples, rate, subtype=None, container="WAV"):
    """The bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=container)
    return file.getvalue()


def samples_of(content, folder):
    """The samples of a recording at 8 kHz, out of a file with this content."""
    path = folder / "recording"
    path.write_bytes(content)
    samples, sha256 = read_recording(path, 8000)
    assert sha256 == hashlib.sha256(content).hexdigest()
    return samples


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 1000003])
def test_samples_are_those_of_librosa(rate, channels, tmp_path):
    for n_samples in (1, 2, 31234):
        samples = np.random.default_rng(0).uniform(-1, 1, (n_samples, channels))
        content = encoded(samples, rate, "FLOAT")
        expected, _ = librosa.load(io.BytesIO(content), sr=8000, mono=True)
        assert np.array_equal(samples_of(content, tmp_path), expected)


def test_a_stream_that_does_not_know_its_length_is_read(tmp_path):
    content = bytearray(encoded(np.zeros(500), 8000))
    content[4:8] = content[40:44] = b"\xff" * 4
    assert samples_of(content, tmp_path).tolist() == [0.0] * 500


def with_endless_header(path):
    content = bytearray(encoded(np.zeros(500), 8000, container="FLAC"))
    content[21] |= 15
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def with_an_infinite_sample(path):
    path.write_bytes(encoded(np.array([0, 1e300, 0]), 8000, "DOUBLE"))


def with_a_rate_of_1_hz(path):
    path.write_bytes(encoded(np.zeros(100000), 1))


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


ENDLESS = "its header promises more than fits into memory|libsndfile cannot read it"
DAMAGES = {  # how, and the reason that the error gives
    "empty": (lambda path: path.write_bytes(b""), "libsndfile cannot read it"),
    "text": (lambda path: path.write_text("not audio"), "libsndfile cannot read it"),
    "cut off": (cut_off, "it is a WAV that is cut off"),
    "no samples": (lambda path: path.write_bytes(encoded(np.zeros(0), 8000)), "it is empty"),
    "one infinite": (with_an_infinite_sample, "it has samples that are not numbers"),
    "of 69 billion samples by its header": (with_endless_header, ENDLESS),
    "of a day by its rate": (with_a_rate_of_1_hz, "it is too long"),
    "folder": (replaced_by_a_folder, "it is not a regular file"),
    "pipe": (replaced_by_a_pipe, "it is not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_recordings_are_named_and_leave_no_cache(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    change, reason = DAMAGES[damage]
    change(folder / CLIP)
    refused(
        load,
        "audio_mnist",
        tmp_path,
        match=rf"^1 of 6 recordings in {folder} cannot be used: "
        rf"replace or remove {CLIP} \(({reason})\)\.$",
    )
    assert left_in(folder) == []


def test_damaged_recordings_are_named_all_at_once(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist", ["1", "2", "3"], repetitions=10)
    (folder / "data/1/7_1_4.wav").write_text("not audio")
    cut_off(folder / "data/2/7_2_0.wav")
    (folder / "data/3/7_3_9.wav").write_bytes(encoded(np.zeros(0), 8000))
    refused(
        load,
        "audio_mnist",
        tmp_path,
        match=rf"^3 of 30 recordings in {folder} cannot be used: replace or remove "
        r"data/1/7_1_4\.wav \(libsndfile cannot read it\), "
        r"data/2/7_2_0\.wav \(it is a WAV that is cut off\), "
        r"data/3/7_3_9\.wav \(it is empty\)\.$",
    )

    for repetition in range(10):
        (folder / f"data/1/7_1_{repetition}.wav").write_text("not audio")
    refused(
        load,
        "audio_mnist",
        tmp_path,
        match=r"^12 of 30 recordings .* data/1/7_1_9\.wav \([\w ]*\), and 2 more\.$",
    )


def test_a_file_without_a_header_is_refused(tmp_path):
    path = tmp_path / "recording.raw"
    path.write_bytes(bytes(16000))
    with pytest.raises(ValueError, match="libsndfile cannot read it"):
        read_recording(path, 8000)


def test_a_link_to_nowhere_is_named(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    (folder / CLIP).unlink()
    (folder / CLIP).symlink_to("nowhere")
    refused(load, "audio_mnist", tmp_path, match=r"7_12_1\.wav: .*replace or remove it\.$")


def test_audio_mnist_is_resampled_padded_and_ordered(tmp_path, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist", ["28", "12", "3"])
    (folder / CLIP).rename(folder / "data/12/0_12_3.wav")
    (folder / "data" / "audioMNIST_meta.txt").touch()
    recordings = load("audio_mnist", tmp_path)
    assert recordings.clips.shape == (6, 8000)
    assert recordings.labels.tolist() == [7, 7, 0, 7, 7, 7]
    assert recordings.groups.tolist() == [3, 3, 12, 12, 28, 28]
    assert recordings.labels.dtype == recordings.groups.dtype == np.int64
    left = 1 + (8000 - 4000) // 2
    assert not recordings.clips[0, :left].any() and not recordings.clips[0, left + 4000 :].any()
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    middle = recordings.clips[0, left + 100 : left + 3900]
    np.testing.assert_allclose(middle, expected[100:3900], atol=2e-3)
    error = capsys.readouterr().err
    assert "6 of 30000 recordings" in error and "left out" not in error


def test_audio_mnist_names_what_it_leaves_out(tmp_path, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    others = ["12/10_12_0", "12/7_12_1 (copy)", "12/²_12_0", "old/7_12_1", "7_12_1", "12/._7_12_1"]
    for other in others:
        path = folder / "data" / f"{other}.wav"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / CLIP).read_bytes())
    assert load("audio_mnist", tmp_path).groups.tolist() == [12, 12, 26, 26, 28, 28]
    error = capsys.readouterr().err
    assert "5 entries of" in error and "are left out: 'data/12/10_12_0.wav'" in error


@pytest.mark.parametrize("other", ["12/7_12_01", "012/7_12_1", "26/3_12_1", "61/7_61_0", "0/7_0_0"])
def test_audio_mnist_that_contradicts_itself_is_refused(other, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    path = folder / "data" / f"{other}.wav"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / CLIP).read_bytes())
    message = r"_[0-9]+\.wav: is there twice, or not of its folder's speaker"
    refused(load, "audio_mnist", tmp_path, match=message)


def test_esc50_by_either_folder_and_with_missing_files(tmp_path, capsys):
    refused(load, "esc50", tmp_path, match="no recordings in .*download_data")
    folder = write_esc50(tmp_path / "esc50")
    by_base = load("esc50", tmp_path)
    by_itself = load("esc50", folder)
    assert by_base.labels.tolist() == [0, 1, 2] and by_base.groups.tolist() == [1, 2, 3]
    assert np.array_equal(by_base.clips, by_itself.clips)
    assert by_base.identity == by_itself.identity
    error = capsys.readouterr().err
    assert "left out" not in error and "shorter" not in error

    soundfile.write(folder / "audio" / "2-101-A-1.wav", np.ones(44100 * 4), 44100)
    assert not load("esc50", tmp_path).clips[1, 32000:].any()
    shorter = "1 recordings are shorter than 5 s, and zeros follow them"
    assert f"{shorter}: 'audio/2-101-A-1.wav'" in capsys.readouterr().err

    (folder / "audio" / "2-101-A-1.wav").rename(folder / "audio" / "other.wav")
    assert load("esc50", tmp_path).labels.tolist() == [0, 2]
    error = capsys.readouterr().err
    assert "1 files that" in error and "missing: 'audio/2-101-A-1.wav'" in error
    assert "1 entries of" in error and "are left out: 'audio/other.wav'" in error


def test_an_ogg_that_is_cut_off_is_read_as_far_as_it_goes_and_counted(tmp_path, capsys):
    folder = write_esc50(tmp_path / "esc50")
    table = folder / "meta" / "esc50.csv"
    table.write_text(table.read_text().replace("2-101-A-1.wav", "2-101-A-1.ogg"))
    (folder / "audio" / "2-101-A-1.wav").unlink()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44100 * 5)
    content = encoded(noise, 44100, "VORBIS", "OGG")
    (folder / "audio" / "2-101-A-1.ogg").write_bytes(content[: len(content) // 2])

    clip = load("esc50", tmp_path).clips[1]
    assert clip[:8000].any() and not clip[32000:].any()
    message = "1 recordings are shorter than 5 s, and zeros follow them: 'audio/2-101-A-1.ogg'"
    assert message in capsys.readouterr().err


def test_tables_of_esc50_that_are_written_differently(tmp_path):
    for place in ("meta", "audio"):
        (tmp_path / place).mkdir()
    (tmp_path / "audio" / "2-101-A-1.flac").touch()
    header = b'\xef\xbb\xbf"take","target","filename","fold"\r\n\r\n'
    (tmp_path / "meta" / "esc50.csv").write_bytes(
        header + b'"a, b","1","2-101-A-1.flac","2"\r\n\r\n'
    )
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
    refused(list_esc50, tmp_path, match="it is not a regular file")


def test_a_folder_that_is_not_there_is_not_another_one(tmp_path, monkeypatch):
    monkeypatch.setitem(
        datasets.DATASETS, "birds", datasets.Dataset(2, 3, ".", list, pad_at_end, {"random": None})
    )
    assert datasets.find_folder("birds", tmp_path) == tmp_path / "birds"
    assert datasets.find_folder("esc50", write_esc50(tmp_path / "ESC-50")) == tmp_path / "ESC-50"


def test_an_archive_that_was_unpacked_one_level_too_deep(tmp_path):
    archives = {
        "audio_mnist": write_audio_mnist(tmp_path / "audio_mnist" / "AudioMNIST-master"),
        "esc50": write_esc50(tmp_path / "esc50" / "ESC-50-master"),
    }
    for name, archive in archives.items():
        assert datasets.find_folder(name, tmp_path) == archive
        assert len(load(name, tmp_path).clips) > 0

    write_esc50(tmp_path / "esc50" / "ESC-50-copy")  # which of the two is meant?
    assert datasets.find_folder("esc50", tmp_path) == tmp_path / "esc50"
    refused(load, "esc50", tmp_path, match="no recordings in")
