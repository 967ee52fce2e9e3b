"""Synthetic voices in AudioMNIST's layout, to try the experiment at its full size without a
download.

    python -m benchmarks voices DIR
    export DATA_DIR=data_voices RAY_RESULTS_DIR=ray_results_voices
    AUDIO_MNIST_URL=DIR EXPERIMENTS=audio_mnist sh doit.sh

60 speakers, an accent and a voice of espeak-ng each, say ten digits 50 times, every time with
another pitch, speed, gain and noise. All of it follows from --seed. The same command again goes on
where it was interrupted.
"""

import argparse
import io
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import machine
from config import InputError, whole_file

SAMPLE_RATE = 48000  # Hz, as AudioMNIST's
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
    "en-gb",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
)
VARIANTS = (*(f"m{i}" for i in range(1, 9)), *(f"f{i}" for i in range(1, 6)))
N_SPEAKERS, N_REPETITIONS = 60, 50
QUIET = 0.01  # of the largest sample: what is below it at both ends is no speech
ABOUT = (
    "{0} speakers, {1} repetitions, spoken by {2} (synthetic voices, not AudioMNIST), seed {3}\n"
)


def main(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks voices", description="Speak digits with espeak-ng."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--speakers", type=int, default=N_SPEAKERS, help=f"the first ones only ({N_SPEAKERS})"
    )
    parser.add_argument(
        "--repetitions", type=int, default=N_REPETITIONS, help=f"of each digit ({N_REPETITIONS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of voices and repetitions (0)")
    args = parser.parse_args(arguments)
    if not (1 <= args.speakers <= N_SPEAKERS and args.repetitions >= 1 and args.seed >= 0):
        raise InputError(
            f"voices: --speakers must be 1 to {N_SPEAKERS}, --repetitions 1 or more, --seed 0 or more."
        )
    if not shutil.which("espeak-ng"):
        raise InputError(
            "voices: there is no espeak-ng: install it, such as by `apt-get install espeak-ng`."
        )
    speak_all(args)


def speak_all(args):
    """Writes what is missing of the recordings; raises InputError where the folder holds others."""
    version = subprocess.run(
        ["espeak-ng", "--version"], capture_output=True, text=True
    ).stdout.split("  ")[0]
    about = ABOUT.format(args.speakers, args.repetitions, version.strip(), args.seed)
    note = args.folder / "SYNTHETIC.txt"
    if (
        args.folder.exists()
        and any(args.folder.iterdir())
        and not (note.is_file() and note.read_text() == about)
    ):
        raise InputError(
            f"'{args.folder}' holds something else than these recordings: name another folder."
        )
    clips = list(product(range(1, args.speakers + 1), range(10), range(args.repetitions)))
    paths = [
        args.folder / "data" / f"{s:02}" / f"{digit}_{s:02}_{repetition}.wav"
        for s, digit, repetition in clips
    ]
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        note.write_text(about)
        voices = np.random.default_rng(args.seed).permutation(list(product(ACCENTS, VARIANTS)))[
            :N_SPEAKERS
        ]
        jobs = [(path, clip) for path, clip in zip(paths, clips, strict=True) if not path.exists()]
        with ThreadPoolExecutor(machine.cpus()) as pool:
            try:
                work = pool.map(
                    lambda job: speak(*job, "+".join(voices[job[1][0] - 1]), args.seed), jobs
                )
                for _ in tqdm(
                    work,
                    desc="synthetic voices",
                    unit="clip",
                    total=len(paths),
                    initial=len(paths) - len(jobs),
                ):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise InputError(
            f"voices: cannot write to '{args.folder}' ({error}): name another folder."
        ) from None
    print(f"{len(paths)} recordings of synthetic voices are in {args.folder}")


def speak(path, clip, voice, seed):
    """Writes one recording, 16 bit; clip: speaker, digit and repetition, from which its pitch,
    speed, … are drawn.
    """
    speaker, digit, _ = clip
    of_speaker, random = (
        np.random.default_rng([seed, speaker]),
        np.random.default_rng([seed, *clip]),
    )
    pitch, speed = (
        of_speaker.uniform(35, 65) + random.normal(0, 5),
        of_speaker.uniform(100, 150) + random.normal(0, 10),
    )
    prosody = ["-p", str(round(np.clip(pitch, 0, 99))), "-s", str(round(np.clip(speed, 80, 300)))]
    spoken = subprocess.run(
        ["espeak-ng", "-v", voice, *prosody, "--stdout", WORDS[digit]], capture_output=True
    )
    try:
        samples, rate = soundfile.read(io.BytesIO(spoken.stdout))
    except soundfile.SoundFileError:
        reason = " ".join(spoken.stderr.decode(errors="replace").split())
        raise InputError(
            f"voices: espeak-ng cannot speak as {voice} ({reason:.200}): install all its voices."
        ) from None
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    samples = soxr.resample(samples[loud[0] : loud[-1] + 1], rate, SAMPLE_RATE)
    samples *= 10 ** random.uniform(-1.5, -0.2) / np.abs(samples).max()
    samples += 10 ** random.uniform(-4, -2.5) * random.standard_normal(len(samples))
    with whole_file(path) as file:
        soundfile.write(file, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")
