"""The synthetic voices of `python -m benchmarks voices`, spoken by a stand-in for espeak-ng."""

import stat
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from benchmarks import voices
from config import InputError
from datasets import recordings_of

ESPEAK = """#!/bin/sh
case "$*" in
--version) echo "eSpeak NG text-to-speech: stand-in" ;;
*{refused}*) echo "voice does not exist" >&2 ;;
*) exec /bin/cat '{wav}' ;;
esac
"""
SMALL = ["--speakers=3", "--repetitions=2"]


@pytest.fixture
def espeak(tmp_path, monkeypatch):
    def install(refused="nothing"):
        path = tmp_path / "bin" / "espeak-ng"
        wav = tmp_path / "spoken.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(wav, np.pad(0.3 * np.sin(np.arange(8000) / 3), 500), 22050)
        path.write_text(ESPEAK.format(refused=refused, wav=wav))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))

    return install


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_recordings_follow_from_the_seed_and_are_those_of_the_experiment(tmp_path, espeak):
    espeak()
    first = tmp_path / "first"
    contents = []
    for folder, seed in ((first, 0), (tmp_path / "second", 0), (tmp_path / "other", 1)):
        voices.main([str(folder), *SMALL, f"--seed={seed}"])
        contents.append(content(folder))
    assert contents[0] == contents[1] and len(contents[0]) == 3 * 10 * 2 + 1
    assert contents[0]["data/01/0_01_0.wav"] != contents[2]["data/01/0_01_0.wav"]

    info = soundfile.info(first / "data/02/7_02_1.wav")
    assert (info.samplerate, info.channels, info.subtype) == (48000, 1, "PCM_16")
    config = SimpleNamespace(dataset_name="audio_mnist", resample_rate=8000, n_points=8000)
    assert recordings_of(config, first).clips.shape == (60, 8000)


def test_an_interruption_costs_what_was_not_yet_spoken(tmp_path, espeak):
    espeak()
    folder = tmp_path / "voices"
    voices.main([str(folder), *SMALL])
    whole = content(folder)

    kept = folder / "data/01/0_01_0.wav"
    (folder / "data/01/1_01_0.wav").unlink()
    before = kept.stat().st_mtime_ns
    voices.main([str(folder), *SMALL])
    assert content(folder) == whole
    assert kept.stat().st_mtime_ns == before


def test_what_is_wrong_is_said_in_one_sentence(tmp_path, espeak, monkeypatch):
    espeak()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        voices.main([str(tmp_path / "mine")])
    with pytest.raises(InputError, match="1 to 60"):
        voices.main([str(tmp_path / "new"), "--speakers=61"])

    espeak(refused="one")
    with pytest.raises(InputError, match="voice does not exist"):
        voices.main([str(tmp_path / "new")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no espeak-ng"):
        voices.main([str(tmp_path / "new")])
