"""Recordings of a dataset's folder: listed, read, resampled, fitted, and kept in a cache.

A cache is one .npy of all clips and its index, a .json, which says what they were made from. The
identity of recordings follows from the bytes of their files, with labels and groups: other names
and times, another processor or another version of the resampler make no other data.
"""

import csv
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.contrib.concurrent import thread_map

import machine
from config import InputError, digest, lock, whole_file

AUDIO_MNIST_FILE = r"data/([0-9]+)/([0-9])_([0-9]+)_([0-9]+)\.wav"  # speaker, digit_speaker_number
AUDIO_MNIST_N_SPEAKERS = 60
ESC50_FILE = r"(([1-5])-[0-9]+-[A-Z]-([0-9]|[1-4][0-9]))\.\w+"  # FOLD-CLIP-TAKE-TARGET.wav

MAX_SAMPLES = 10**8  # of a resampled recording: at 8 kHz three and a half hours
MAX_NAMED = 10  # damaged recordings that an error names; it counts the others


class Recordings(NamedTuple):
    """All clips of a dataset folder."""

    clips: np.ndarray  # (n, n_points) float32
    labels: np.ndarray  # (n,) int64
    groups: np.ndarray  # (n,) int64: speaker of audio_mnist, fold of esc50
    identity: str = ""  # see identity_of
    files: np.ndarray = np.array([], str)  # (n,) relative to the dataset's folder


class Source(NamedTuple):
    """The file of a recording as it was when it was listed, and what its dataset says of it."""

    file: str  # relative to the dataset's folder
    n_bytes: int
    changed: int  # time of the last change, ns
    label: int
    group: int
    sha256: str | None = None  # of the file's bytes, hexadecimal; None before they are read


def load_recordings(dataset, folder, *, name, sample_rate, n_points):
    """The Recordings of a Dataset's folder, memory-mapped; makes the cache where it must.

    name: the dataset's, of its cache and in messages. sample_rate: Hz. n_points: samples per clip.
    Where the folder has no recordings, an intact cache stands for them. Raises InputError where
    there is neither, where a recording is damaged and where the cache cannot be written.
    """
    cache_folder = os.environ.get("DMEL_CACHE_DIR") or folder
    cache = Path(cache_folder, f"{name}_{sample_rate}Hz_{n_points}.npy")
    settings = {
        "sample_rate": sample_rate,
        "n_points": n_points,
        "fit": getattr(dataset.fit, "__name__", ""),
    }
    sources = list_recordings(dataset, folder)

    recordings = read_cache(cache, settings, sources)
    if recordings is None and sources:
        print(
            f"{name}: bringing {cache} up to date, or waiting for another process that does",
            file=sys.stderr,
        )
        recordings = make_cache(cache, settings, sources, dataset, folder)
    if recordings is None:
        raise InputError(
            f"{name}: no recordings in '{folder}', and no intact cache {cache}: "
            "run `sh download_data.sh`, or name another data folder."
        )

    if not sources:
        print(
            f"warning: {name}: no recordings in '{folder}': their clips come from {cache}",
            file=sys.stderr,
        )
    n_recordings = len(recordings.clips)
    if dataset.n_recordings is not None and n_recordings < dataset.n_recordings:
        print(
            f"warning: {name}: {n_recordings} of {dataset.n_recordings} recordings are there "
            f"({folder})",
            file=sys.stderr,
        )
    return recordings


# Lists of recordings


def list_recordings(dataset, folder):
    """The Sources of a dataset's folder, in the order of the dataset; none where it is missing."""
    sources = []
    try:
        if (folder / dataset.place).exists():
            for file, label, group in dataset.list_files(folder):
                status = os.stat(folder / file)
                source = Source(file, status.st_size, status.st_mtime_ns, int(label), int(group))
                sources.append(source)
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}): replace or remove it."
        ) from None
    return sources


def list_audio_mnist(folder):
    """Rows [file, digit, speaker] of a folder, sorted by speaker, digit and repetition.

    Files are data/SPEAKER/DIGIT_SPEAKER_REPETITION.wav; others are left out with a warning.
    """
    data = folder / "data"
    files = []
    others = []
    for name in os.listdir(data):
        if (data / name).is_dir():
            files.extend(f"data/{name}/{file}" for file in os.listdir(data / name))
        elif name != "audioMNIST_meta.txt":
            others.append(f"data/{name}")

    rows = {}  # by speaker, digit and repetition
    for file in sorted(files):
        match = re.fullmatch(AUDIO_MNIST_FILE, file)
        if match is None:
            others.append(file)
            continue

        folder_speaker, digit, speaker, repetition = map(int, match.groups())
        key = (speaker, digit, repetition)
        is_known = 1 <= speaker <= AUDIO_MNIST_N_SPEAKERS
        if speaker != folder_speaker or not is_known or key in rows:
            raise InputError(
                f"{folder / file}: is there twice, or not of its folder's speaker, "
                f"1 to {AUDIO_MNIST_N_SPEAKERS}: remove it."
            )
        rows[key] = [file, digit, speaker]

    warn_of(
        others,
        f"entries of {folder} are not data/SPEAKER/DIGIT_SPEAKER_REPETITION.wav, and are left out",
    )
    return [rows[key] for key in sorted(rows)]


def list_esc50(folder):
    """Rows [file, target, fold] of a folder, in the order of its meta/esc50.csv."""
    table = folder / "meta" / "esc50.csv"
    audio = folder / "audio"
    try:
        rows = read_esc50_table(table)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(
            f"{table}: cannot be used as a CSV with filename, fold and target ({error}): "
            "replace it by ESC-50's."
        ) from None

    named = {file for file, _, _ in rows}
    present = set()
    if audio.exists():
        present = {f"audio/{name}" for name in os.listdir(audio)}
    warn_of(named - present, f"files that {table} names are missing")
    warn_of(present - named, f"entries of {folder} are not in {table}, and are left out")
    return [row for row in rows if row[0] in present]


def read_esc50_table(table):
    """Rows [file, target, fold] of esc50.csv; ValueError where a name contradicts its columns."""
    if not table.is_file():  # to open a pipe would wait for its writer
        raise ValueError("it is not a regular file")

    rows = {}  # by FOLD-CLIP-TAKE-TARGET
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        for entry in reader:
            name = entry["filename"]
            fold = entry["fold"]
            target = entry["target"]
            match = re.fullmatch(ESC50_FILE, name)
            if match is None or (fold, target) != (match[2], match[3]) or match[1] in rows:
                raise ValueError(
                    f"{name!r:.80} in line {reader.line_num} is not FOLD-CLIP-TAKE-TARGET.wav of "
                    "its fold and target, or is there twice"
                )
            rows[match[1]] = [f"audio/{name}", int(target), int(fold)]
    return list(rows.values())


def read_esc50_classes(folder):
    """Names of classes by target, from the column category of a folder's meta/esc50.csv.

    There are none where that cannot be read, or gives a target no name or several.
    """
    table = folder / "meta" / "esc50.csv"
    if not table.is_file():
        return {}

    names = {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            for entry in csv.DictReader(file, restval="", strict=True):
                target = int(entry["target"])
                name = entry["category"].strip()
                if not name or names.setdefault(target, name) != name:
                    return {}
    except (OSError, ValueError, KeyError, csv.Error):
        return {}
    return names


def warn_of(files, message):
    """Prints a warning that counts the files and shows the first; hidden ones are passed over."""
    visible = sorted(file for file in files if "/." not in file)
    if visible:
        print(f"warning: {len(visible)} {message}: {visible[0]!r} …", file=sys.stderr)


# From a file to a clip


def read_file(path):
    """The bytes of a recording's file; ValueError, with the reason, where they cannot be read."""
    if not os.path.isfile(path):  # to open a pipe would wait for its writer
        raise ValueError("it is not a regular file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from None


def read_recording(path, sample_rate):
    """Mono samples of an audio file at sample_rate (Hz), and the SHA-256 of its bytes.

    Samples: shape = (time,), float32. Channels are averaged, and soxr resamples at its quality HQ,
    which gives the samples of librosa.load. Librosa itself is not used: its import takes 2.5 s and
    200 MiB, half a minute where numba has no cache yet, and fails where numba can write none,
    neither beside the packages nor at home.

    The format is any that libsndfile reads. Raises ValueError, with the reason, for a WAV that is
    cut off, and where there are no samples, too many, or some that are no numbers. Of other formats
    that are cut off, such as Ogg and MP3, it gives what libsndfile reads.
    """
    import soundfile  # here, as soxr, for training does without
    import soxr

    content = read_file(path)
    if wav_is_cut_off(content):
        raise ValueError("it is a WAV that is cut off")

    # libsndfile opens the file itself, now in the system's memory: of damaged bytes in a BytesIO
    # soundfile prints tracebacks. Threads mix up libsndfile's messages, so they are left out.
    try:
        with soundfile.SoundFile(path) as file:
            recorded_rate = file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (time, channels)
    except (soundfile.SoundFileError, TypeError):  # the latter of a .raw, which has no header
        raise ValueError("libsndfile cannot read it") from None
    except MemoryError:
        raise ValueError("its header promises more than fits into memory") from None

    mono = samples.mean(axis=1)
    n_resampled = int(np.ceil(len(mono) * (sample_rate / recorded_rate)))  # as librosa rounds it
    if n_resampled == 0:
        raise ValueError("it is empty")
    if n_resampled > MAX_SAMPLES:
        raise ValueError("it is too long")
    if not np.isfinite(mono).all():
        raise ValueError("it has samples that are not numbers")

    resampled = soxr.resample(mono, recorded_rate, sample_rate, quality="HQ")
    return pad_at_end(resampled, n_resampled), hashlib.sha256(content).hexdigest()


def wav_is_cut_off(content):
    """Whether these are the bytes of a WAV that is shorter than its header says."""
    if content[:4] != b"RIFF":
        return False
    n_bytes = int.from_bytes(content[4:8], "little")  # behind these eight
    is_stream = n_bytes == 2**32 - 1  # who wrote it did not know the length
    return 8 + n_bytes > len(content) and not is_stream


def pad_around(clip, n_points):
    """Zeros before the clip, then zeros after it or a cut, to exactly n_points samples."""
    n_before = max(0, 1 + (n_points - len(clip)) // 2)
    return pad_at_end(np.pad(clip, (n_before, 0)), n_points)


def pad_at_end(clip, n_points):
    """Zeros after the clip or a cut, to exactly n_points samples."""
    n_after = max(0, n_points - len(clip))
    return np.pad(clip[:n_points], (0, n_after))


# The cache


def read_cache(cache, settings, sources):
    """The Recordings in a cache; None where it is missing, damaged, or of something else.

    settings: what the clips depend on beside the sources. sources: what list_recordings gave; where
    that is nothing, the cache's own.
    """
    index = read_index(cache, settings)
    if index is None:
        return None
    cached_sources, clips_sha256 = index
    if sources and sources != [source._replace(sha256=None) for source in cached_sources]:
        return None

    try:
        clips = np.asarray(np.load(cache, mmap_mode="r"))  # Ray's store shares plain arrays only
    except (OSError, ValueError, EOFError):
        return None
    shape = (len(cached_sources), settings["n_points"])
    if clips.shape != shape or clips.dtype != np.dtype("<f4"):
        return None
    if hashlib.sha256(clips).hexdigest() != clips_sha256:
        return None

    labels = np.array([source.label for source in cached_sources], np.int64)
    groups = np.array([source.group for source in cached_sources], np.int64)
    files = np.array([source.file for source in cached_sources], str)
    return Recordings(clips, labels, groups, identity_of(cached_sources), files)


def read_index(cache, settings):
    """The Sources of a cache and the SHA-256 of its clips, out of its index.

    None where the index is missing, damaged, of an earlier layout or of other settings.
    """
    try:
        index = json.loads(cache.with_suffix(".json").read_text())
        sources = [Source(*values) for values in index["sources"]]
        clips_sha256 = index["clips_sha256"]
        if index["settings"] != settings or index["identity"] != identity_of(sources):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return sources, clips_sha256


def identity_of(sources):
    """SHA-256, hexadecimal, of recordings: of their bytes, labels and groups, in this order."""
    return digest([[source.sha256, source.label, source.group] for source in sources])


def make_cache(cache, settings, sources, dataset, folder):
    """Makes a cache, or finds that another process has made it, and returns its Recordings.

    Where files were only touched or renamed, their clips stay, and the index alone is written.
    """
    try:
        lock_path = cache.with_suffix(".lock")
        with lock(lock_path, "set DMEL_CACHE_DIR to a folder where files can be locked"):
            recordings = read_cache(cache, settings, sources)  # made while this process waited
            if recordings is None and update_index(cache, settings, sources, folder):
                recordings = read_cache(cache, settings, sources)
            if recordings is None:
                prepare_cache(cache, settings, sources, dataset, folder)
                recordings = read_cache(cache, settings, sources)
    except (OSError, MemoryError) as error:
        raise InputError(
            f"cannot write the cache {cache} ({error}): set DMEL_CACHE_DIR to another folder."
        ) from None
    return recordings


def update_index(cache, settings, sources, folder):
    """Whether the cached clips are those of the sources, by their bytes; the index then says so.

    A file whose name, size and time of last change are those in the index is not read.
    """
    index = read_index(cache, settings)
    if index is None:
        return False
    cached_sources, clips_sha256 = index

    # What can be seen without reading: the same sizes, labels and groups, in the same order.
    outline = [(source.n_bytes, source.label, source.group) for source in sources]
    cached_outline = [(source.n_bytes, source.label, source.group) for source in cached_sources]
    if outline != cached_outline:
        return False

    def hash_source(source, cached):
        if source == cached._replace(sha256=None):
            return cached
        content = read_file(folder / source.file)
        return source._replace(sha256=hashlib.sha256(content).hexdigest())

    try:
        hashed_sources = in_threads(hash_source, sources, cached_sources)
    except ValueError:
        return False  # prepare will name the damaged ones
    if identity_of(hashed_sources) != identity_of(cached_sources):
        return False
    write_index(cache, settings, hashed_sources, clips_sha256)
    return True


def prepare_cache(cache, settings, sources, dataset, folder):
    """Makes a cache from the recordings; their clips leave memory before they are read from it."""
    clips, hashed_sources = prepare(settings, sources, dataset, folder)
    write_cache(cache, settings, hashed_sources, clips)


def prepare(settings, sources, dataset, folder):
    """Reads, resamples and fits recordings, several at a time.

    Returns their clips, shape = (n, n_points) float32, and the sources with the hashes of what was
    read. Raises InputError that names the damaged ones.
    """
    sample_rate = settings["sample_rate"]
    n_points = settings["n_points"]
    clips = np.empty((len(sources), n_points), np.float32)
    short = []
    damages = {}  # by file

    def prepare_clip(source, clip):
        try:
            samples, sha256 = read_recording(folder / source.file, sample_rate)
        except ValueError as error:
            damages[source.file] = error
            return source

        if dataset.fit is pad_at_end and len(samples) < n_points:  # such clips have one length
            short.append(source.file)
        clip[:] = dataset.fit(samples, n_points)
        return source._replace(sha256=sha256)

    hashed_sources = in_threads(prepare_clip, sources, clips)
    if damages:
        raise InputError(describe_damages(damages, len(sources), folder))
    warn_of(
        short, f"recordings are shorter than {n_points / sample_rate:g} s, and zeros follow them"
    )
    return clips, hashed_sources


def describe_damages(damages, n_recordings, folder):
    """A sentence that names damaged recordings with their reasons, up to a number, then counts."""
    named = [f"{file} ({damages[file]})" for file in sorted(damages)[:MAX_NAMED]]
    if len(damages) > MAX_NAMED:
        named.append(f"and {len(damages) - MAX_NAMED} more")
    return (
        f"{len(damages)} of {n_recordings} recordings in {folder} cannot be used: "
        f"replace or remove {', '.join(named)}."
    )


def in_threads(function, *arguments):
    """What a function gives for each clip, a list; as many threads as this process has CPUs."""
    return thread_map(function, *arguments, max_workers=machine.cpus(), unit="clip")


def write_cache(cache, settings, sources, clips):
    """Writes clips, in the order of their sources, then the index, without which none counts."""
    for leftover in cache.parent.glob(f"{cache.stem}.*.tmp"):
        leftover.unlink()  # of a process that was killed

    with whole_file(cache) as file:  # and not np.save, which does not say that a disk is full
        header = np.lib.format.header_data_from_array_1_0(clips)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(clips)
    write_index(cache, settings, sources, hashlib.sha256(clips).hexdigest())


def write_index(cache, settings, sources, clips_sha256):
    """Writes the index of a cache: what its clips were made from, and their own SHA-256."""
    index = {
        "settings": settings,
        "identity": identity_of(sources),
        "clips_sha256": clips_sha256,
        "sources": sources,
    }
    with whole_file(cache.with_suffix(".json")) as file:
        file.write(json.dumps(index).encode())
