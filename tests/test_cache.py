"""The cache of prepared recordings: it follows them, knows what it holds, is whole or not there."""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import filelock
import numpy as np
import pytest
import soundfile
import soxr
from conftest import ROOT, write_audio_mnist, write_esc50
from test_recordings import CACHE, CLIP, left_in, load, refused

import recordings as recordings_module
from config import lock


def same(recordings, others):
    """Whether two are the same data; their files may have other names."""
    *data, _ = recordings
    *other_data, _ = others
    return all(np.array_equal(a, b) for a, b in zip(data, other_data, strict=True))


def test_cache_is_used_without_recordings_and_libraries(tmp_path, monkeypatch, capsys):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    before = load("audio_mnist", tmp_path)
    assert np.array_equal(np.load(folder / CACHE), before.clips)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert same(load("audio_mnist", tmp_path), before)
    (folder / "data").rename(tmp_path / "elsewhere")
    assert "no recordings in" not in capsys.readouterr().err
    without = load("audio_mnist", tmp_path)
    warning = f"audio_mnist: no recordings in '{folder}': their clips come from {folder / CACHE}"
    assert warning in capsys.readouterr().err
    assert same(without, before) and without.identity == before.identity
    assert np.array_equal(without.files, before.files)
    assert type(without.clips) is np.ndarray  # Ray's object store shares plain arrays only


def test_cache_follows_the_recordings(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    for value in (0.25, 0.5):  # the second file has the first one's size
        soundfile.write(folder / CLIP, np.full(30000, value), 48000)
        changed = load("audio_mnist", tmp_path)
        assert changed.clips[1, 4000] == pytest.approx(value, abs=1e-3)
        assert changed.identity != first.identity

    (folder / CLIP).rename(folder / "data/12/8_12_1.wav")  # the same clip with another label
    relabelled = load("audio_mnist", tmp_path)
    assert relabelled.labels[1] == 8 and relabelled.identity != changed.identity

    (folder / "data/12/8_12_1.wav").unlink()
    assert len(load("audio_mnist", tmp_path).clips) == 5
    beside = load("audio_mnist", tmp_path, sample_rate=4000)
    assert beside.clips.shape == (5, 4000)
    assert len(list(folder.glob("*.npy"))) == 2


def test_identity_is_of_the_files_labels_and_groups_in_their_order(tmp_path, monkeypatch):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    rows = []
    for speaker in (12, 26, 28):
        for repetition in (0, 1):
            content = (folder / f"data/{speaker}/7_{speaker}_{repetition}.wav").read_bytes()
            rows.append([hashlib.sha256(content).hexdigest(), 7, speaker])
    assert first.identity == hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    # Elsewhere, with other times, at another rate, or by another resampler it is the same data.
    shutil.copytree(folder / "data", tmp_path / "copy" / "audio_mnist" / "data")
    assert load("audio_mnist", tmp_path / "copy").identity == first.identity
    assert load("audio_mnist", tmp_path, sample_rate=4000).identity == first.identity
    resample = soxr.resample
    monkeypatch.setattr(soxr, "resample", lambda *args, **options: 0.5 * resample(*args, **options))
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "cache"))
    halved = load("audio_mnist", tmp_path)
    assert np.array_equal(halved.clips, first.clips / 2) and halved.identity == first.identity

    # Two recordings that change places are not the same data.
    (folder / CLIP).rename(folder / "data/12/7_12_2.wav")
    (folder / "data/12/7_12_0.wav").rename(folder / "data/12/7_12_3.wav")
    assert load("audio_mnist", tmp_path).identity != first.identity


@pytest.fixture
def files_read(monkeypatch):
    """The files that are read for their hash or their samples, in the order of their names."""
    files = []

    def read_file(path):
        files.append(path.name)
        files.sort()
        return original(path)

    original = recordings_module.read_file
    monkeypatch.setattr(recordings_module, "read_file", read_file)
    return files


def test_files_are_read_once_and_again_only_where_they_were_touched(
    tmp_path, files_read, monkeypatch
):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    names = ["7_12_0.wav", "7_12_1.wav", "7_26_0.wav", "7_26_1.wav", "7_28_0.wav", "7_28_1.wav"]
    assert files_read == names

    files_read.clear()
    monkeypatch.setattr(
        recordings_module, "read_recording", None
    )  # nothing is prepared from here on
    clips_before = (folder / CACHE).stat()
    assert same(load("audio_mnist", tmp_path), first) and files_read == []

    os.utime(folder / CLIP, ns=(1, 1))
    assert same(load("audio_mnist", tmp_path), first) and files_read == ["7_12_1.wav"]
    files_read.clear()
    assert same(load("audio_mnist", tmp_path), first) and files_read == []

    (folder / CLIP).rename(folder / "data/12/7_12_5.wav")  # another name in the same place
    renamed = load("audio_mnist", tmp_path)
    assert same(renamed, first) and files_read == ["7_12_5.wav"]
    assert (folder / CACHE).stat() == clips_before
    assert first.files[:2].tolist() == ["data/12/7_12_0.wav", "data/12/7_12_1.wav"]
    assert renamed.files[:2].tolist() == ["data/12/7_12_0.wav", "data/12/7_12_5.wav"]


def test_files_are_read_once_where_one_has_another_size(tmp_path, files_read):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    load("audio_mnist", tmp_path)
    names = list(files_read)
    files_read.clear()
    soundfile.write(folder / CLIP, np.full(30000, 0.25), 48000)
    load("audio_mnist", tmp_path)
    assert files_read == names


def test_touched_files_with_other_bytes_are_prepared(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    n_bytes = (folder / CLIP).stat().st_size
    soundfile.write(folder / CLIP, np.full(28800, 0.25), 48000, subtype="FLOAT")
    assert (folder / CLIP).stat().st_size == n_bytes
    changed = load("audio_mnist", tmp_path)
    assert changed.clips[1, 4000] == pytest.approx(0.25, abs=1e-3)
    assert changed.identity != first.identity


def test_a_damaged_cache_of_touched_files_is_made_again(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    clips, *others = load("audio_mnist", tmp_path)
    before = np.array(clips), *others
    flipped(folder / CACHE)
    os.utime(folder / CLIP, ns=(1, 1))
    assert same(load("audio_mnist", tmp_path), before)


def test_a_cache_of_the_earlier_layout_is_made_again(tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    first = load("audio_mnist", tmp_path)
    index_path = (folder / CACHE).with_suffix(".json")
    rows = []
    for file, n_bytes, changed, label, group, _ in json.loads(index_path.read_text())["sources"]:
        rows.append([file, n_bytes, changed, label, group])
    earlier = {"sample_rate": 8000, "n_points": 8000, "fit": "pad_around", "rows": rows}
    earlier["identity"] = hashlib.sha256(b"".join(a.tobytes() for a in first[:3])).hexdigest()
    index_path.write_text(json.dumps(earlier))
    assert same(load("audio_mnist", tmp_path), first)
    assert "sources" in json.loads(index_path.read_text())


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-20000] ^= 1
    path.write_bytes(content)


def rewritten(change):
    def damage(path):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(change(index)))

    return damage


def with_another_label(index):
    sources = [[*row[:3], 8, *row[4:]] for row in index["sources"]]
    return index | {"sources": sources}


def with_another_fit(index):
    return index | {"settings": index["settings"] | {"fit": "pad_at_end"}}


def with_cut_sources(index):
    return index | {"sources": [row[:3] for row in index["sources"]]}


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "text": lambda path: path.write_text("text"),
    "one bit": flipped,
    "another shape": lambda path: np.save(path, np.load(path).reshape(6, 2, -1)),
    "another type": lambda path: np.save(path, np.load(path).view(np.int32)),
    "gone": lambda path: path.unlink(),
    "index cut": lambda path: path.with_suffix(".json").write_text("{"),
    "index of another kind": rewritten(lambda index: [index]),
    "another label": rewritten(with_another_label),
    "another fit": rewritten(with_another_fit),
    "sources cut": rewritten(with_cut_sources),
    "a source less": rewritten(lambda index: index | {"sources": index["sources"][1:]}),
    "another identity": rewritten(lambda index: index | {"identity": "0" * 64}),
    "another hash of the clips": rewritten(lambda index: index | {"clips_sha256": "0" * 64}),
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


def contents(folder):
    """Content and time of each file by path, None for a folder."""
    found = {}
    for path in folder.rglob("*"):
        found[path] = None
        if path.is_file():
            found[path] = (path.read_bytes(), path.stat().st_mtime_ns)
    return found


def test_recordings_are_never_written_to_and_leftovers_go(tmp_path, monkeypatch):
    folder = write_esc50(tmp_path / "esc50")
    cache = tmp_path / "cache"
    before = contents(folder)
    cache.mkdir()
    (cache / "esc50_8000Hz_40000.npy.123.tmp").write_text("of a process that was killed")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(cache))
    load("esc50", tmp_path)
    assert contents(folder) == before
    name = "esc50_8000Hz_40000"
    assert sorted(os.listdir(cache)) == [f"{name}.json", f"{name}.lock", f"{name}.npy"]


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

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = prepare(tmp_path, preexec_fn=limit_files)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("datasets.py: cannot write the cache")
    assert "DMEL_CACHE_DIR" in error
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


@pytest.fixture
def never_waits():
    """Fails where a test waits for a lock."""

    def fail(*_):
        pytest.fail("it waits for nobody")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
@pytest.mark.parametrize("is_left", [False, True])
def test_file_systems_without_locks_are_refused(
    number, is_left, tmp_path, monkeypatch, never_waits
):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    lock_path = (folder / CACHE).with_suffix(".lock")
    if is_left:
        lock_path.touch()  # by an earlier run
    refused(
        load,
        "audio_mnist",
        tmp_path,
        match=rf"cannot lock {lock_path} \({os.strerror(number)}\): set DMEL_CACHE_DIR to",
    )


def test_a_lock_keeps_others_out_and_outlives_nobody(tmp_path, never_waits):
    path = tmp_path / "new" / "some.lock"
    holder = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import config
held = config.lock({str(path)!r}, "use another folder")
print("held", flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(filelock.Timeout):
        lock(path, "use another folder", timeout=0)
    process.kill()
    process.wait()
    with lock(path, "use another folder", timeout=0):
        pass
