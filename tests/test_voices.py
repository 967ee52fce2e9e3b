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
        path, wav = tmp_path / "bin" / "espeak-ng", tmp_path / "spoken.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(wav, np.pad(0.3 * np.sin(np.arange(8000) / 3), 500), 22050)
        path.write_text(ESPEAK.format(refused=refused, wav=wav))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent))

    return install


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_recordings_follow_from_the_seed_and_are_those_of_the_experiment(tmp_path, espeak):
    espeak()
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    voices.main([str(first), *SMALL])
    voices.main([str(second), *SMALL])
    voices.main([str(other), *SMALL, "--seed=1"])
    assert content(first) == content(second) and len(content(first)) == 3 * 10 * 2 + 1
    assert (
        content(first)[voices.Path("data/01/0_01_0.wav")]
        != content(other)[voices.Path("data/01/0_01_0.wav")]
    )
    info = soundfile.info(first / "data/02/7_02_1.wav")
    assert (info.samplerate, info.channels, info.subtype) == (48000, 1, "PCM_16")
    config = SimpleNamespace(dataset_name="audio_mnist", resample_rate=8000, n_points=8000)
    assert recordings_of(config, first).clips.shape == (60, 8000)


def test_an_interruption_costs_what_was_not_yet_spoken(tmp_path, espeak):
    espeak()
    voices.main([str(tmp_path / "voices"), *SMALL])
    whole = content(tmp_path / "voices")
    kept, lost = tmp_path / "voices/data/01/0_01_0.wav", tmp_path / "voices/data/01/1_01_0.wav"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    voices.main([str(tmp_path / "voices"), *SMALL])
    assert content(tmp_path / "voices") == whole and kept.stat().st_mtime_ns == before


def test_what_is_wrong_is_said_in_one_sentence(tmp_path, espeak, monkeypatch):
    espeak()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for arguments, told in [
        ([str(tmp_path / "mine")], "holds something else"),
        ([str(tmp_path / "new"), "--speakers=61"], "1 to 60"),
    ]:
        with pytest.raises(InputError, match=told):
            voices.main(arguments)
    espeak(refused="one")
    with pytest.raises(InputError, match="voice does not exist"):
        voices.main([str(tmp_path / "new")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no espeak-ng"):
        voices.main([str(tmp_path / "new")])
