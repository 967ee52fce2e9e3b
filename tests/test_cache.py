"""The cache of prepared recordings: it follows them, knows what it holds, and is whole or not
there.
"""

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


def test_cache_is_used_without_recordings_and_libraries(tmp_path, monkeypatch, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load("audio_mnist", tmp_path)
    content = b"".join(array.tobytes() for array in before[:3])
    assert before.identity == hashlib.sha256(content).hexdigest() and np.array_equal(
        np.load(folder / CACHE), before[0]
    )
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert same(load("audio_mnist", tmp_path), before)
    (folder / "data").rename(tmp_path / "elsewhere")
    assert "no recordings in" not in capsys.readouterr().err
    without = load("audio_mnist", tmp_path)
    told = f"audio_mnist: no recordings in '{folder}': their clips come from {folder / CACHE}"
    assert told in capsys.readouterr().err
    assert (
        same(without, before) and type(without.clips) is np.ndarray
    )  # Ray's object store shares plain arrays only


def test_cache_follows_the_recordings(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    for value in (0.25, 0.5):  # the second file has the first one's size
        soundfile.write(folder / CLIP, np.full(30000, value), 48000)
        changed = load("audio_mnist", tmp_path)
        assert (
            changed.clips[1, 4000] == pytest.approx(value, abs=1e-3)
            and changed.identity != first.identity
        )
    (folder / CLIP).rename(
        folder / "data" / "12" / "8_12_1.wav"
    )  # the same clip with another label
    assert load("audio_mnist", tmp_path).identity != changed.identity
    (folder / "data" / "12" / "8_12_1.wav").unlink()
    assert len(load("audio_mnist", tmp_path).clips) == 5
    assert load("audio_mnist", tmp_path, sample_rate=4000).clips.shape == (
        5,
        4000,
    )  # beside the other cache
    assert len(list(folder.glob("*.npy"))) == 2


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-20000] ^= 1
    path.write_bytes(content)


def rewritten(change):
    def damage(path):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(change(index)))

    return damage


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "text": lambda path: path.write_text("text"),
    "one bit": flipped,
    "another shape": lambda path: np.save(path, np.load(path).reshape(6, 2, -1)),
    "another type": lambda path: np.save(path, np.load(path).view(np.int32)),
    "gone": lambda path: path.unlink(),
    "index cut": lambda path: path.with_suffix(".json").write_text("{"),
    "index of another kind": rewritten(lambda index: [index]),
    "another label": rewritten(
        lambda index: index | {"rows": [[*row[:3], 8, row[4]] for row in index["rows"]]}
    ),
    "another fit": rewritten(lambda index: index | {"fit": "pad_at_end"}),
    "rows cut": rewritten(lambda index: index | {"rows": [row[:3] for row in index["rows"]]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again_or_refused(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    clips, *others = load("audio_mnist", tmp_path)
    before = np.array(clips), *others
    DAMAGES[damage](folder / CACHE)
    (folder / "data").rename(tmp_path / "elsewhere")
    refused(load, "audio_mnist", tmp_path, match="no intact cache .*download_data")
    (tmp_path / "elsewhere").rename(folder / "data")
    assert same(load("audio_mnist", tmp_path), before)


def test_recordings_are_never_written_to_and_leftovers_go(tmp_path, monkeypatch):
    folder, cache = write_esc50(tmp_path / "esc50"), tmp_path / "cache"
    before = {
        path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }
    cache.mkdir()
    (cache / "esc50_8000Hz_40000.npy.123.tmp").write_text("of a process that was killed")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(cache))
    load("esc50", tmp_path)
    after = {
        path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }
    assert after == before
    assert sorted(os.listdir(cache)) == [
        f"esc50_8000Hz_40000.{kind}" for kind in ("json", "lock", "npy")
    ]


def prepare(data_dir, **options):
    """`python datasets.py data_dir` in a process of its own."""
    command = [sys.executable, ROOT / "datasets.py", data_dir]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_full_disk_leaves_the_cache_that_was(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = np.array(load("audio_mnist", tmp_path).clips)
    (folder / "data" / "12" / "7_12_2.wav").write_bytes((folder / CLIP).read_bytes())
    process = prepare(
        tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    )
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert (
        error.splitlines()[-1].startswith("datasets.py: cannot write the cache")
        and "DMEL_CACHE_DIR" in error
    )
    assert left_in(folder) == [f"{CACHE[:-4]}.json", CACHE]
    assert np.array_equal(np.load(folder / CACHE), before)


def test_two_processes_prepare_the_same_data_at_once_without_a_home(tmp_path):
    folder = write_audio_mnist(
        tmp_path / "audio_mnist", [str(speaker) for speaker in range(1, 61)], repetitions=10
    )
    environment = {"PATH": os.environ["PATH"], "TMPDIR": "/nonexistent", "HOME": "/nonexistent"}
    processes = [prepare(tmp_path, env=environment) for _ in range(2)]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("audio_mnist: 600 clips of 1 s" in output for output, _ in outputs)
    assert sorted("100%" in error for _, error in outputs) == [False, True]
    assert left_in(folder) == [f"{CACHE[:-4]}.json", CACHE]
