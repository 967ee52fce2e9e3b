"""Recordings of a dataset's folder: listed, read, resampled and fitted once, and kept in a cache for training.

A cache is one .npy of all clips, beside the recordings or in the folder that DMEL_CACHE_DIR names, and an index (.json)
of the files it was made from and the identity of what it holds. It is made again where these changed or it is damaged.
Training reads the cache only. Recordings are never written to.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pandas as pd
from tqdm import tqdm

from config import InputError
from storage import whole_file

AUDIO_MNIST_NAME = r"([0-9])_([0-9]+)_([0-9]+)\.wav"  # digit, speaker, repetition
AUDIO_MNIST_ALL_SPEAKERS = range(1, 61)
ESC50_NAME = r"([1-5])-[0-9]+-[A-Z]-([0-9]|[1-4][0-9])\.\w+"  # fold, clip, take, target
LONGEST = 10**8  # samples of a resampled recording: more is a mistake in its header


class Recordings(NamedTuple):
    """All clips of a dataset folder."""

    clips: np.ndarray  # (n, n_points) float32
    labels: np.ndarray  # (n,) int64
    groups: np.ndarray  # (n,) int64: speaker of audio_mnist, fold of esc50
    identity: str = ""  # SHA-256 of the three, as identity_of gives it


def identity_of(clips, labels, groups):
    """The hexadecimal SHA-256 of all clips' bytes, then the labels', then the groups'."""
    digest = hashlib.sha256(clips.reshape(-1))
    digest.update(labels)
    digest.update(groups)
    return digest.hexdigest()


def load_recordings(name, dataset, folder, sample_rate, n_points):
    """The cached clips of a dataset's folder, memory-mapped; makes the cache where it is missing or out of date.

    dataset: a Dataset. sample_rate: Hz. n_points: samples per clip. Raises InputError where there are no recordings, or
    one of them cannot be read.
    """
    cache = cache_path(os.environ.get("DMEL_CACHE_DIR") or folder, name, sample_rate, n_points)
    index = {"sample_rate": sample_rate, "n_points": n_points, "rows": list_recordings(dataset, folder)}
    recordings = read_cache(cache, index)
    if recordings is None and not index["rows"]:
        reason = f"no recordings in '{folder}', and no intact cache {cache}"
        raise InputError(f"{name}: {reason}: run `sh download_data.sh`, or name another data folder.")
    if recordings is None:
        recordings = prepare_cache(cache, index, name, dataset, folder)
    n = len(recordings.clips)
    if dataset.n_recordings and n < dataset.n_recordings:
        warn(f"{name}: {n} of {dataset.n_recordings} recordings are there ({folder})")
    return recordings


def list_recordings(dataset, folder):
    """Rows [file, bytes, last change in ns, label, group] of a dataset's folder, none where it is missing."""
    try:
        listed = dataset.list_files(folder) if (folder / dataset.place).exists() else []
        rows = [(row, os.stat(folder / row[0])) for row in listed]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}): replace or remove it.") from None
    for (file, _, _), status in rows:
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise InputError(f"{folder / file}: is a folder or a special file, not a recording: replace or remove it.")
    return [[file, status.st_size, status.st_mtime_ns, label, group] for (file, label, group), status in rows]


def list_audio_mnist(folder):
    """Rows [file, label, speaker] of data/<speaker>/<digit>_<speaker>_<repetition>.wav, by these three numbers."""
    files, others = {}, []
    for place in sorted(os.listdir(folder / "data")):
        if not re.fullmatch("[0-9]+", place):
            if place.endswith(".wav") or (folder / "data" / place).is_dir():
                others.append(f"data/{place}")
            continue
        for name in sorted(os.listdir(folder / "data" / place)):
            file = f"data/{place}/{name}"
            match = re.fullmatch(AUDIO_MNIST_NAME, name)
            if not match:
                others.append(file)
                continue
            digit, speaker, repetition = map(int, match.groups())
            if speaker not in AUDIO_MNIST_ALL_SPEAKERS or speaker != int(place):
                reason = f"speaker {speaker} must be that of the folder, and 1 to 60"
                raise InputError(f"{folder / file}: {reason}: rename or remove it.")
            clip = speaker, digit, repetition
            if clip in files:
                raise InputError(f"{folder / file}: is the same clip as {files[clip]}: remove one of them.")
            files[clip] = file
    warn_of_others(others, folder, "are no recordings data/SPEAKER/DIGIT_SPEAKER_REPETITION.wav")
    return [[file, digit, speaker] for (speaker, digit, _), file in sorted(files.items())]


def list_esc50(folder):
    """Rows [file, label, fold] of the recordings in meta/esc50.csv that are present, in its order."""
    table, audio = folder / "meta" / "esc50.csv", folder / "audio"
    if not table.is_file():
        raise InputError(f"{table}: is not a file: replace it by ESC-50's.")
    try:
        entries = pd.read_csv(table, dtype=str, keep_default_na=False, skip_blank_lines=False)
        entries = entries[["filename", "fold", "target"]]
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        message = f"cannot be read as a CSV with filename, fold and target ({reason:.200})"
        raise InputError(f"{table}: {message}: replace it by ESC-50's.") from None
    present = set(os.listdir(audio)) if os.path.lexists(audio) else set()
    rows, lines = {}, {}
    for line, (name, fold, target) in enumerate(entries.itertuples(index=False), start=2):
        if name == fold == target == "":
            continue  # an empty line
        match = re.fullmatch(ESC50_NAME, name)
        clip = name.rpartition(".")[0]
        reason = None
        if not match:
            reason = f"{name!r:.80} is not FOLD-CLIP-TAKE-TARGET.wav with folds 1 to 5 and targets 0 to 49"
        elif (fold, target) != match.groups():
            reason = f"fold {fold!r:.20} and target {target!r:.20} are not those in the name {name!r:.80}"
        elif clip in lines:
            reason = f"{name!r:.80} is in line {lines[clip]} already"
        if reason:
            raise InputError(f"{table}: line {line}: {reason}: replace the table by ESC-50's.")
        lines[clip] = line
        rows[name] = [f"audio/{name}", int(target), int(fold)]
    missing = [name for name in rows if name not in present]
    if missing:
        warn(f"{table} names {len(missing)} files that are not in {audio}: {missing[0]} …")
    warn_of_others(sorted(present - rows.keys()), audio, f"are not in {table}")
    return [row for name, row in rows.items() if name in present]


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


def warn_of_others(names, folder, reason):
    names = [name for name in names if not Path(name).name.startswith(".")]
    if names:
        warn(f"{folder}: {len(names)} entries {reason}, and are left out: {names[0]!r} …")


def read_recording(path, sample_rate):
    """A recording as mono float32 samples at sample_rate (Hz), shape = (time,); InputError where it is damaged."""
    import soundfile  # here, as training does without

    try:
        content = Path(path).read_bytes()
        with soundfile.SoundFile(path) as file:
            samples, recorded_rate = file.read(dtype="float32", always_2d=True), file.samplerate  # (time, channels)
            counted = file.format != "MP3" or b"Xing" in content or b"Info" in content  # and not estimated
            cut_short = is_cut_short(content) or (counted and len(samples) < file.frames)
    except (soundfile.SoundFileError, OSError, MemoryError, ValueError) as error:  # the last two by a false length
        raise InputError(f"{path}: cannot be read as audio ({error}): replace or remove it.") from None
    mono = samples.mean(axis=1)
    if cut_short or len(samples) == 0 or not np.isfinite(mono).all():
        raise InputError(f"{path}: is cut short, empty or has samples that are not numbers: replace or remove it.")
    if recorded_rate == sample_rate:
        return mono
    if len(mono) * sample_rate > LONGEST * recorded_rate:
        raise InputError(f"{path}: {len(mono)} samples at {recorded_rate} Hz are too long: replace or remove it.")
    import soxr

    resampled = soxr.resample(mono, recorded_rate, sample_rate, quality="HQ")
    return pad_at_end(resampled, math.ceil(len(mono) * (sample_rate / recorded_rate)))  # as librosa.resample rounds


def is_cut_short(content):
    """Whether a file is shorter than its header says, or an Ogg lacks its last page: libsndfile reads what is there."""
    kind, n_bytes = content[:4], 0  # of what follows
    if kind == b"OggS":
        return not ends_as_ogg(content)
    if kind in (b"RIFF", b"RIFX", b"FORM"):
        n_bytes = int.from_bytes(content[4:8], "little" if kind == b"RIFF" else "big")
    elif kind in (b"RF64", b"BW64"):
        n_bytes = int.from_bytes(content[20:28], "little")
    streamed = n_bytes in (0, 2**32 - 1, 2**64 - 1)  # whoever wrote it did not know
    return not streamed and 8 + n_bytes > len(content)


def ends_as_ogg(content):
    """Whether the pages of an Ogg file are whole and the last one is marked as such. Source: RFC 3533, section 6."""
    place, flags = 0, 0
    while content[place : place + 4] == b"OggS" and len(content) >= place + 27:
        flags, n_segments = content[place + 5], content[place + 26]
        place += 27 + n_segments + sum(content[place + 27 : place + 27 + n_segments])
    return place <= len(content) and bool(flags & 4)


def pad_around(clip, n_points):
    """Zeros before the clip, then zeros after it or a cut, to exactly n_points samples."""
    return pad_at_end(np.pad(clip, (max(0, 1 + (n_points - len(clip)) // 2), 0)), n_points)


def pad_at_end(clip, n_points):
    """Zeros after the clip or a cut, to exactly n_points samples."""
    return np.pad(clip[:n_points], (0, max(0, n_points - len(clip))))


def cache_path(folder, name, sample_rate, n_points):
    """The file of a dataset's clips in a folder; its index lies beside it, as .json."""
    return Path(folder) / f"{name}_{sample_rate}Hz_{n_points}.npy"


def read_cache(cache, index):
    """The Recordings in a cache file; None where it is missing or damaged, or made from other rows than the index's."""
    try:
        stored = json.loads(cache.with_suffix(".json").read_text())
        identity = stored.pop("identity")
        if stored != (index if index["rows"] else index | {"rows": stored["rows"]}):
            return None
        labels, groups = labels_and_groups(stored["rows"])
        clips = np.asarray(np.lib.format.open_memmap(cache, mode="r"))
        intact = clips.shape == (len(labels), index["n_points"]) and clips.dtype == np.dtype("<f4")
        intact = intact and identity_of(clips, labels, groups) == identity
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError):
        return None
    return Recordings(clips, labels, groups, identity) if intact else None


def labels_and_groups(rows):
    return (np.array([row[i] for row in rows], np.int64) for i in (3, 4))


def prepare_cache(cache, index, name, dataset, folder):
    """Makes a cache, or waits for another process that does; returns what read_cache gives."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache.with_suffix(".lock"))  # freed when its process ends, whatever happens to it
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"{name}: another process prepares {cache}: waiting for it", file=sys.stderr)
            held = lock.acquire()
        with held:
            recordings = read_cache(cache, index)
            if recordings is None:
                for left in cache.parent.glob(f"{cache.stem}.*.tmp"):
                    left.unlink()  # of a process that was killed
                write_cache(cache, index, prepare_clips(index, name, dataset, folder))
                recordings = read_cache(cache, index)
            if recordings is None:
                raise OSError("it does not hold what was written")
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        raise InputError(f"cannot write the cache {cache} ({error}): set DMEL_CACHE_DIR to another folder.") from None
    return recordings


def prepare_clips(index, name, dataset, folder):
    """Reads, resamples and fits the recordings of an index, several at a time; yields the clips in its order."""
    sample_rate, n_points, rows = index["sample_rate"], index["n_points"], index["rows"]
    short = []

    def prepare(row):
        samples = read_recording(folder / row[0], sample_rate)
        if dataset.fit is pad_at_end and len(samples) < n_points:  # such clips have one length
            short.append(row[0])
        return dataset.fit(samples, n_points)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from tqdm(pool.map(prepare, rows), total=len(rows), desc=f"{name} at {sample_rate} Hz", unit="clip")
        finally:
            pool.shutdown(cancel_futures=True)  # or an interruption would wait for all of them
    if short:
        length = f"{n_points / sample_rate:g} s"
        warn(f"{name}: {len(short)} recordings are shorter than {length}, zeros follow them: {min(short)!r} …")


def write_cache(cache, index, clips):
    """Writes the clips, in the order of the index's rows, and then the index: whole, or nothing."""
    rows = index["rows"]
    digest = hashlib.sha256()
    labels, groups = labels_and_groups(rows)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), index["n_points"])}
    with contextlib.closing(clips), whole_file(cache.with_suffix(".json")) as index_file, whole_file(cache) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for clip in clips:
            clip = np.ascontiguousarray(clip, np.float32)
            digest.update(clip)
            file.write(clip)
        digest.update(labels)
        digest.update(groups)
        index_file.write(json.dumps(index | {"identity": digest.hexdigest()}).encode())
        index_file.flush()  # the cache takes its place first: without an index it does not count
