"""Synthetic voices in AudioMNIST's layout: the experiment at its full size without a download.

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
ACCENTS = ["en-gb", "en-us", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp"]
ACCENTS += ["en-gb-x-gbcwmd", "en-029"]
MALE_VARIANTS = [f"m{i}" for i in range(1, 9)]
FEMALE_VARIANTS = [f"f{i}" for i in range(1, 6)]
VARIANTS = MALE_VARIANTS + FEMALE_VARIANTS
N_SPEAKERS = 60
N_REPETITIONS = 50
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
            f"voices: --speakers must be 1 to {N_SPEAKERS}, --repetitions 1 or more, "
            "--seed 0 or more."
        )
    if not shutil.which("espeak-ng"):
        raise InputError(
            "voices: there is no espeak-ng: install it, such as by `apt-get install espeak-ng`."
        )
    speak_all(args)


def speak_all(args):
    """Writes what is missing of the recordings; raises InputError where the folder holds others."""
    prepare_folder(args)
    all_voices = list(product(ACCENTS, VARIANTS))
    voices = np.random.default_rng(args.seed).permutation(all_voices)[:N_SPEAKERS]

    clips = list(product(range(1, args.speakers + 1), range(10), range(args.repetitions)))
    missing = []
    for clip in clips:
        path = path_of(clip, args.folder)
        if not path.exists():
            missing.append((path, clip))

    def speak_one(job):
        path, clip = job
        accent, variant = voices[clip[0] - 1]
        speak(path, clip, f"{accent}+{variant}", args.seed)

    try:
        for path, _ in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        n_done = len(clips) - len(missing)
        progress = tqdm(desc="synthetic voices", unit="clip", total=len(clips), initial=n_done)
        with progress, ThreadPoolExecutor(machine.cpus()) as pool:
            try:
                for _ in pool.map(speak_one, missing):
                    progress.update()
            finally:
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise cannot_write(args.folder, error) from None
    print(f"{len(clips)} recordings of synthetic voices are in {args.folder}")


def prepare_folder(args):
    """Makes the folder, with a note of what is in it; raises InputError where it holds others."""
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout
    version = version.split("  ")[0].strip()
    about = ABOUT.format(args.speakers, args.repetitions, version, args.seed)

    note = args.folder / "SYNTHETIC.txt"
    is_empty = not args.folder.exists() or not any(args.folder.iterdir())
    is_the_same = note.is_file() and note.read_text() == about
    if not is_empty and not is_the_same:
        raise InputError(
            f"'{args.folder}' holds something else than these recordings: name another folder."
        )

    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(about)
    except OSError as error:
        raise cannot_write(args.folder, error) from None


def cannot_write(folder, error):
    return InputError(f"voices: cannot write to '{folder}' ({error}): name another folder.")


def path_of(clip, folder):
    """Path of a clip's recording; clip: speaker, digit and repetition."""
    speaker, digit, repetition = clip
    return folder / "data" / f"{speaker:02}" / f"{digit}_{speaker:02}_{repetition}.wav"


def speak(path, clip, voice, seed):
    """Writes one recording, 16 bit.

    clip: speaker, digit and repetition, from which its pitch, speed, gain and noise are drawn.
    """
    speaker, digit, _ = clip
    of_speaker = np.random.default_rng([seed, speaker])
    of_clip = np.random.default_rng([seed, *clip])

    pitch = of_speaker.uniform(35, 65) + of_clip.normal(0, 5)
    speed = of_speaker.uniform(100, 150) + of_clip.normal(0, 10)
    pitch = round(np.clip(pitch, 0, 99))
    speed = round(np.clip(speed, 80, 300))
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout"]
    spoken = subprocess.run([*command, WORDS[digit]], capture_output=True)

    try:
        samples, rate = soundfile.read(io.BytesIO(spoken.stdout))
    except soundfile.SoundFileError:
        reason = " ".join(spoken.stderr.decode(errors="replace").split())
        raise InputError(
            f"voices: espeak-ng cannot speak as {voice} ({reason:.200}): install all its voices."
        ) from None

    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    samples = soxr.resample(samples[loud[0] : loud[-1] + 1], rate, SAMPLE_RATE)
    samples *= 10 ** of_clip.uniform(-1.5, -0.2) / np.abs(samples).max()
    samples += 10 ** of_clip.uniform(-4, -2.5) * of_clip.standard_normal(len(samples))
    with whole_file(path) as file:
        soundfile.write(file, samples, SAMPLE_RATE, subtype="PCM_16", format="WAV")
