"""The cache of prepared recordings: it follows them, knows what it holds, and is whole or not there."""

import hashlib
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import ROOT, write_audio_mnist, write_esc50
from test_recordings import CACHE, CLIP, left_in, load, refused


def same(recordings, others):
    return all(np.array_equal(a, b) for a, b in zip(recordings, others, strict=True))


def test_identity_is_the_hash_of_clips_labels_and_groups(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    clips, labels, groups, identity = load("audio_mnist", tmp_path)
    content = clips.tobytes() + labels.astype("<i8").tobytes() + groups.astype("<i8").tobytes()
    assert identity == hashlib.sha256(content).hexdigest()
    assert json.loads((folder / CACHE).with_suffix(".json").read_text())["identity"] == identity
    assert np.array_equal(np.load(folder / CACHE), clips)
    (folder / CLIP).rename(folder / "data" / "12" / "8_12_1.wav")  # the same clip with another label
    assert load("audio_mnist", tmp_path).identity != identity


def test_cache_is_used_without_recordings_and_libraries(tmp_path, monkeypatch):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load("audio_mnist", tmp_path)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    again = load("audio_mnist", tmp_path)
    (folder / "data").rename(tmp_path / "elsewhere")
    without = load("audio_mnist", tmp_path)
    assert same(again, before) and same(without, before)
    assert type(without.clips) is np.ndarray  # Ray's object store shares plain arrays only


def test_cache_follows_the_recordings(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    for value in (0.25, 0.5):  # the second file has the first one's size
        soundfile.write(folder / CLIP, np.full(30000, value), 48000)
        changed = load("audio_mnist", tmp_path)
        assert changed.clips[1, 4000] == pytest.approx(value, abs=1e-3) and changed.identity != first.identity
    (folder / CLIP).unlink()
    assert len(load("audio_mnist", tmp_path).clips) == 5
    assert load("audio_mnist", tmp_path, sample_rate=4000).clips.shape == (5, 4000)  # beside the other cache
    assert len(list(folder.glob("*.npy"))) == 2


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-20000] ^= 1
    path.write_bytes(content)


def with_nan(path):
    np.lib.format.open_memmap(path, mode="r+")[2, 3000] = np.nan


def of_another_shape(path):
    np.save(path, np.load(path).reshape(3, -1))


def rewritten(change):
    def damage(path):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(change(index)))

    return damage


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("text"),
    "one bit": flipped,
    "NaN": with_nan,
    "another shape": of_another_shape,
    "gone": lambda path: path.unlink(),
    "index cut": lambda path: path.with_suffix(".json").write_text("{"),
    "index of another kind": rewritten(lambda index: [index]),
    "index of an earlier version": rewritten(lambda index: index | {"n_files": 6}),
    "identity of others": rewritten(lambda index: index | {"identity": "0" * 64}),
    "another label": rewritten(lambda index: index | {"rows": [[*row[:3], 8, row[4]] for row in index["rows"]]}),
    "rows cut": rewritten(lambda index: index | {"rows": [row[:3] for row in index["rows"]]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again_or_refused(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    clips, labels, groups, identity = load("audio_mnist", tmp_path)
    before = np.array(clips), labels, groups, identity
    del clips
    DAMAGES[damage](folder / CACHE)
    (folder / "data").rename(tmp_path / "elsewhere")
    refused(load, "audio_mnist", tmp_path, match="no intact cache .*download_data")
    (tmp_path / "elsewhere").rename(folder / "data")
    assert same(load("audio_mnist", tmp_path), before)


def test_recordings_are_never_written_to_and_leftovers_go(tmp_path, monkeypatch):
    folder = write_esc50(tmp_path / "esc50")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "esc50_8000Hz_40000.npy.123.tmp").write_text("of a process that was killed")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(cache))
    load("esc50", tmp_path)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert sorted(os.listdir(cache)) == [f"esc50_8000Hz_40000.{kind}" for kind in ("json", "lock", "npy")]


def test_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    write_audio_mnist(tmp_path / "audio_mnist")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "file"))
    refused(load, "audio_mnist", tmp_path, match="DMEL_CACHE_DIR")


def prepare(data_dir, **options):
    """`python datasets.py data_dir` in a process of its own."""
    command = [sys.executable, ROOT / "datasets.py", data_dir]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def ends_in_one_sentence(result, *words):
    """A failed run whose last line, after the progress bar, is a sentence with these words."""
    message = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert message.startswith("datasets.py: cannot write the cache") and all(word in message for word in words)


def test_full_disk(small_disk, tmp_path):
    write_audio_mnist(tmp_path / "audio_mnist", repetitions=20)  # 60 clips of 32 kB
    result = prepare(tmp_path, env=os.environ | {"DMEL_CACHE_DIR": str(small_disk)})
    ends_in_one_sentence(result, "No space left", "DMEL_CACHE_DIR")
    assert left_in(small_disk) == []


def test_full_disk_leaves_the_cache_that_was(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load("audio_mnist", tmp_path)
    copy = np.array(before.clips)
    (folder / "data" / "12" / "7_12_2.wav").write_bytes((folder / CLIP).read_bytes())
    result = prepare(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    ends_in_one_sentence(result, "DMEL_CACHE_DIR")
    assert left_in(folder) == [f"{CACHE[:-4]}.json", CACHE]
    assert np.array_equal(np.load(folder / CACHE), copy)


def test_without_a_home_and_a_temporary_folder(tmp_path):
    write_audio_mnist(tmp_path / "audio_mnist")
    for home in ({}, {"HOME": "/nonexistent"}):
        result = prepare(tmp_path, env={"PATH": os.environ["PATH"], "TMPDIR": "/nonexistent", **home})
        assert result.returncode == 0 and "audio_mnist: 6 clips of 1 s" in result.stdout, result.stderr


def test_two_processes_prepare_the_same_data_at_once(tmp_path):
    folder = tmp_path / "audio_mnist"
    for speaker in range(1, 61):
        (folder / "data" / f"{speaker:02}").mkdir(parents=True)
        for digit in range(10):
            path = folder / "data" / f"{speaker:02}" / f"{digit}_{speaker:02}_0.wav"
            soundfile.write(path, np.sin(np.arange(48000) * 0.01 * (digit + 1)), 48000)
    command = [sys.executable, ROOT / "datasets.py", tmp_path]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("600 clips of 1 s" in output for output, _ in outputs)
    worked = ["100%" in error for _, error in outputs]
    assert sorted(worked) == [False, True]
    assert left_in(folder) == ["audio_mnist_8000Hz_8000.json", CACHE]
