"""Recordings of a dataset's folder: listed, read, resampled, fitted, and kept in a cache, one .npy
of all clips.
"""

import csv
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from tqdm.contrib.concurrent import thread_map

from config import InputError, whole_file

ESC50_ENTRY = r"(([1-5])-[0-9]+-[A-Z]-([0-9]|[1-4][0-9]))\.\w+ \2 \3"  # FOLD-CLIP-TAKE-TARGET.wav, fold, target


class Recordings(NamedTuple):
    """All clips of a dataset folder."""

    clips: np.ndarray  # (n, n_points) float32
    labels: np.ndarray  # (n,) int64
    groups: np.ndarray  # (n,) int64: speaker of audio_mnist, fold of esc50
    identity: str = ""  # hexadecimal SHA-256 of the bytes of the three


def load_recordings(config, dataset, folder):
    """The Recordings of a Dataset's folder, memory-mapped; makes the cache where it is missing or
    out of date.
    """
    name, sample_rate, n_points = (
        getattr(config, key) for key in ("dataset_name", "resample_rate", "n_points")
    )
    cache = Path(
        os.environ.get("DMEL_CACHE_DIR") or folder, f"{name}_{sample_rate}Hz_{n_points}.npy"
    )
    index = {
        "sample_rate": sample_rate,
        "n_points": n_points,
        "fit": getattr(dataset.fit, "__name__", ""),
    }
    index["rows"] = list_recordings(dataset, folder)
    recordings = read_cache(cache, index)
    if recordings is None and index["rows"]:
        print(
            f"{name}: preparing {cache}, or waiting for another process that does", file=sys.stderr
        )
        try:
            with filelock.FileLock(
                cache.with_suffix(".lock")
            ):  # freed when its process ends, whatever happens to it
                if read_cache(cache, index) is None:  # another process may have made it
                    write_cache(cache, index, prepare(index, dataset, folder))
                recordings = read_cache(cache, index)
        except (
            OSError,
            MemoryError,
            NotImplementedError,
        ) as error:  # the last where a file system knows no locks
            raise InputError(
                f"cannot write the cache {cache} ({error}): set DMEL_CACHE_DIR to another one."
            ) from None
    if recordings is None:
        reason = f"no recordings in '{folder}', and no intact cache {cache}"
        raise InputError(
            f"{name}: {reason}: run `sh download_data.sh`, or name another data folder."
        )
    if not index["rows"]:
        print(
            f"warning: {name}: no recordings in '{folder}': their clips come from {cache}",
            file=sys.stderr,
        )
    if (n := len(recordings.clips)) < (dataset.n_recordings or 0):
        print(
            f"warning: {name}: {n} of {dataset.n_recordings} recordings are there ({folder})",
            file=sys.stderr,
        )
    return recordings


def list_recordings(dataset, folder):
    """Rows [file, bytes, last change in ns, label, group] of a dataset's folder, none where it is
    missing.
    """
    rows = []
    try:
        for file, label, group in (
            dataset.list_files(folder) if (folder / dataset.place).exists() else ()
        ):
            status = os.stat(folder / file)
            rows.append([file, status.st_size, status.st_mtime_ns, label, group])
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}): replace or remove it."
        ) from None
    return rows


def list_audio_mnist(folder):
    """Rows [file, label, speaker] of data/<speaker>/<digit>_<speaker>_<repetition>.wav, by these
    three numbers.
    """
    data = folder / "data"
    places = [place for place in os.listdir(data) if (data / place).is_dir()]
    others = [
        f"data/{name}"
        for name in os.listdir(data)
        if name not in places and name != "audioMNIST_meta.txt"
    ]
    files = {}
    for file in sorted(
        f"data/{place}/{name}" for place in places for name in os.listdir(data / place)
    ):
        if not (match := re.fullmatch(r"data/([0-9]+)/([0-9])_([0-9]+)_([0-9]+)\.wav", file)):
            others.append(file)
            continue
        place, digit, speaker, repetition = map(int, match.groups())
        if speaker != place or speaker not in range(1, 61) or (speaker, digit, repetition) in files:
            raise InputError(
                f"{folder / file}: is there twice, or not of its folder's speaker, 1 to 60: remove it."
            )
        files[speaker, digit, repetition] = file
    tell(
        others,
        f"entries of {folder} are not data/SPEAKER/DIGIT_SPEAKER_REPETITION.wav, and are left out",
    )
    return [[file, digit, speaker] for (speaker, digit, _), file in sorted(files.items())]


def list_esc50(folder):
    """Rows [file, label, fold] of the recordings in meta/esc50.csv that are present, in its order."""
    table, audio = folder / "meta" / "esc50.csv", folder / "audio"
    rows = {}
    try:
        if not table.is_file():
            raise ValueError("it is a folder or a special file")
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", strict=True)
            for entry in reader:
                name, fold, target = entry["filename"], entry["fold"], entry["target"]
                if (
                    not (match := re.fullmatch(ESC50_ENTRY, f"{name} {fold} {target}"))
                    or match[1] in rows
                ):
                    reason = (
                        "is not FOLD-CLIP-TAKE-TARGET.wav of its fold and target, or is there twice"
                    )
                    raise ValueError(f"{name!r:.80} in line {reader.line_num} {reason}")
                rows[match[1]] = [f"audio/{name}", int(target), int(fold)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        reason = f"cannot be used as a CSV with filename, fold and target ({error})"
        raise InputError(f"{table}: {reason}: replace it by ESC-50's.") from None
    named = {file for file, _, _ in rows.values()}
    present = {f"audio/{name}" for name in os.listdir(audio)} if audio.exists() else set()
    tell(named - present, f"files that {table} names are missing")
    tell(present - named, f"entries of {folder} are not in {table}, and are left out")
    return [row for row in rows.values() if row[0] in present]


def tell(files, what):
    """Prints a warning that counts the files and shows the first one; hidden ones are passed over."""
    files = sorted(file for file in files if "/." not in file)
    if files:
        print(f"warning: {len(files)} {what}: {files[0]!r} …", file=sys.stderr)


def read_recording(path, sample_rate):
    """A recording as mono float32 samples at sample_rate (Hz), shape = (time,); InputError where it
    is damaged.
    """
    import soundfile  # here, as soxr, for training does without
    import soxr

    try:
        if not os.path.isfile(path):  # to open a pipe would wait for its writer
            raise ValueError("it is a folder or a special file")
        content = Path(path).read_bytes()
        with soundfile.SoundFile(path) as file:
            samples, recorded_rate = (
                file.read(dtype="float32", always_2d=True),
                file.samplerate,
            )  # (time, channels)
            counted = (
                file.format != "MP3" or b"Xing" in content or b"Info" in content
            )  # and not estimated
            cut_short = is_cut_short(content) or (counted and len(samples) < file.frames)
        mono = samples.mean(axis=1)
        n_resampled = int(
            np.ceil(len(mono) * (sample_rate / recorded_rate))
        )  # as librosa.resample rounds
        if cut_short or not 0 < n_resampled <= 10**8 or not np.isfinite(mono).all():
            raise ValueError("it is cut short, empty, too long or has samples that are not numbers")
    except (
        soundfile.SoundFileError,
        OSError,
        MemoryError,
        ValueError,
    ) as error:  # MemoryError by a false length
        raise InputError(
            f"{path}: cannot be read as audio ({error}): replace or remove it."
        ) from None
    return pad_at_end(soxr.resample(mono, recorded_rate, sample_rate, quality="HQ"), n_resampled)


def is_cut_short(content):
    """Whether a file is shorter than its header says, or an Ogg lacks its last page: libsndfile
    reads what is there.
    """
    end, flags = 0, 4
    while (header := content[end : end + 27].ljust(27, b"\0")).startswith(
        b"OggS"
    ):  # pages: RFC 3533, section 6
        flags, n_segments = header[5], header[26]
        end += 27 + n_segments + sum(content[end + 27 : end + 27 + n_segments])
    if content[:4] in (b"RIFF", b"RIFX", b"FORM", b"RF64", b"BW64"):
        size = content[4:8] if content[2:4] != b"64" else content[20:28]
        n_bytes = int.from_bytes(size, "big" if content[:4] in (b"RIFX", b"FORM") else "little")
        end = (
            8 + n_bytes if n_bytes not in (2**32 - 1, 2**64 - 1) else 0
        )  # who streams does not know the length
    return end > len(content) or not flags & 4


def pad_around(clip, n_points):
    """Zeros before the clip, then zeros after it or a cut, to exactly n_points samples."""
    return pad_at_end(np.pad(clip, (max(0, 1 + (n_points - len(clip)) // 2), 0)), n_points)


def pad_at_end(clip, n_points):
    """Zeros after the clip or a cut, to exactly n_points samples."""
    return np.pad(clip[:n_points], (0, max(0, n_points - len(clip))))


def read_cache(cache, index):
    """The Recordings in a cache file; None where it is missing or damaged, or made from other rows
    than the index's.
    """
    try:
        stored = json.loads(cache.with_suffix(".json").read_text())
        rows = index["rows"] or stored["rows"]
        recordings = with_labels(np.asarray(np.load(cache, mmap_mode="r")), rows)
    except (OSError, ValueError, EOFError, LookupError, TypeError, OverflowError):
        return None
    right = recordings.clips.shape == (
        len(rows),
        index["n_points"],
    ) and recordings.clips.dtype == np.dtype("<f4")
    return (
        recordings
        if right and stored == index | {"rows": rows, "identity": recordings.identity}
        else None
    )


def write_cache(cache, index, clips):
    """Writes clips in the order of the index's rows, then the index, as .json, without which they
    do not count.
    """
    for left in cache.parent.glob(f"{cache.stem}.*.tmp"):
        left.unlink()  # of a process that was killed
    with whole_file(cache) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(clips))
        file.write(clips)  # and not np.save, which does not say that a disk is full
    identity = with_labels(clips, index["rows"]).identity
    with whole_file(cache.with_suffix(".json")) as file:
        file.write(json.dumps(index | {"identity": identity}).encode())


def with_labels(clips, rows):
    """The Recordings of clips and of the labels and groups in their rows of an index."""
    labels_and_groups = np.array([row[3:] for row in rows], np.int64).T.copy()
    digest = hashlib.sha256(clips)
    digest.update(labels_and_groups)
    return Recordings(clips, *labels_and_groups, digest.hexdigest())


def prepare(index, dataset, folder):
    """The recordings of an index, read, resampled and fitted several at a time: shape = (n,
    n_points) float32.
    """
    files, n_points = [row[0] for row in index["rows"]], index["n_points"]
    clips, short = np.empty((len(files), n_points), np.float32), []

    def prepare_clip(file, clip):
        samples = read_recording(folder / file, index["sample_rate"])
        if dataset.fit is pad_at_end and len(samples) < n_points:  # such clips have one length
            short.append(file)
        clip[:] = dataset.fit(samples, n_points)

    thread_map(prepare_clip, files, clips, max_workers=os.cpu_count(), unit="clip")
    tell(
        short,
        f"recordings are shorter than {n_points / index['sample_rate']:g} s, and zeros follow them",
    )
    return clips
