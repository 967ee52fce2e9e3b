"""Bad input of every kind is one sentence that names it and the remedy; nothing is left half-written."""

import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from ray import tune
from test_datasets import load_recordings, write_audio_mnist, write_esc50

import datasets
import predict_test
import results
import search_spaces
import train
from datasets import InputError

PULSES = search_spaces.time_frequency(3) | {"trainable": True, "init_lambd": 6.38, "seed": 0}
SPOKEN = search_spaces.audio_mnist(3) | {"trainable": True, "init_lambd": 46.7, "seed": 0}

VALUES = [
    (PULSES, "lr_model", -1e-3),
    (PULSES, "lr_model", "fast"),
    (PULSES, "lr_tf", float("nan")),
    (PULSES, "batch_size", 0),
    (PULSES, "batch_size", 12.5),
    (PULSES, "patience", 0),
    (PULSES, "max_epochs", 0),
    (PULSES, "n_samples", 5),
    (PULSES, "noise_std", -1),
    (PULSES, "sigma_ref", 0),
    (PULSES, "hop_length", 0),
    (PULSES, "hop_length", 129),
    (PULSES, "init_lambd", 0),
    (PULSES, "init_lambd", -6.38),
    (PULSES, "init_lambd", float("nan")),
    (PULSES, "init_lambd", float("inf")),
    (PULSES, "init_lambd", 1e9),
    (PULSES, "trainable", "False"),
    (PULSES, "optimizer_name", "adamw"),
    (PULSES, "device", "gpu"),
    (PULSES, "model_name", "resnet"),
    (SPOKEN, "n_mels", 0),
    (SPOKEN, "n_mels", -3),
    (SPOKEN, "hop_length", 8001),
    (SPOKEN, "resample_rate", 0),
    (SPOKEN, "tf32", 1),
]


@pytest.mark.parametrize(("config", "key", "value"), VALUES)
def test_wrong_values_in_a_config(config, key, value):
    train.check(config)
    with pytest.raises(InputError) as error:
        train.check(config | {key: value})
    message = str(error.value)
    assert message.startswith("config: ") and key in message and "\n" not in message
    assert str(value) in message


@pytest.mark.parametrize("key", ["lr_model", "batch_size", "trainable", "init_lambd", "model_name"])
def test_missing_keys_in_a_config(key):
    with pytest.raises(InputError, match=f"key '{key}' is missing"):
        train.check({other: value for other, value in PULSES.items() if other != key})


WAV = "data/12/7_12_1.wav"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


RECORDINGS = {
    "empty": lambda path: path.write_bytes(b""),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:44]),
    "truncated": truncated,
    "text": lambda path: path.write_text("not audio"),
    "NaN": lambda path: soundfile.write(path, np.full(100, np.nan), 8000, subtype="FLOAT"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", RECORDINGS)
def test_damaged_recordings(damage, tmp_path):
    folder = write_audio_mnist(tmp_path / "audio_mnist")
    RECORDINGS[damage](folder / WAV)
    with pytest.raises(InputError, match=r"7_12_1\.wav: .*replace or remove it\.$") as error:
        load_recordings("audio_mnist", tmp_path, 8000, 8000)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.npy")) and not list(folder.glob("*.json")) and not list(folder.glob("*.tmp"))


TABLES = {
    "without a column": lambda text: text.replace("fold", "part", 1),
    "unknown fold": lambda text: text.replace("1-2-A-2.wav,3,2", "1-2-A-2.wav,9,2"),
    "fold in words": lambda text: text.replace("1-2-A-2.wav,3,2", "1-2-A-2.wav,three,2"),
    "unknown target": lambda text: text.replace("1-2-A-2.wav,3,2", "1-2-A-2.wav,3,50"),
    "short line": lambda text: text + "1-9-A-9.wav\n",
    "empty": lambda text: "",
    "not UTF-8": lambda text: text.encode() + b"\xff\xfe\n",
}


@pytest.mark.parametrize("damage", TABLES)
def test_damaged_tables(damage, tmp_path):
    folder = write_esc50(tmp_path / "esc50")
    table = folder / "meta" / "esc50.csv"
    text = TABLES[damage](table.read_text())
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="esc50") as error:
        load_recordings("esc50", tmp_path, 8000, 40000)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.npy"))


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    folder = write_esc50(tmp_path / "esc50")
    (folder / "audio" / "1-2-A-2.wav").unlink()
    assert len(load_recordings("esc50", tmp_path, 8000, 40000).clips) == 2
    assert "names 1 files that are not in" in (error := capsys.readouterr().err) and "1-2-A-2.wav" in error


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
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".npy", ".json", ".lock"}


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


CHECKPOINTS = {
    "text": lambda path: path.write_text("not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "pickle in PyTorch's format": lambda path: torch.save(Bomb(), path),
    "another network": lambda path: torch.save({"best_net": torch.nn.Linear(2, 2).state_dict()}, path),
    "something else": lambda path: torch.save([1, 2, 3], path),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_checkpoints_that_are_none(damage, tmp_path):
    net, _, _ = train.prepare(PULSES)
    path = tmp_path / results.CHECKPOINT_FILE
    torch.save({"best_net": net.state_dict()}, path)
    trial = SimpleNamespace(config=PULSES, checkpoint=tune.Checkpoint.from_directory(tmp_path))
    assert 0 < predict_test.accuracy_of(trial, None) < 1
    CHECKPOINTS[damage](path)
    with pytest.raises(InputError, match=str(tmp_path)) as error:
        predict_test.accuracy_of(trial, None)
    assert "\n" not in str(error.value)


def mutations(content, n):
    """n damaged versions of a file's content, drawn from a seed."""
    draw = random.Random(0)
    for _ in range(n):
        mutated = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8, 40])):
            place = draw.randrange(min(len(mutated), draw.choice([64, len(mutated)]))) if mutated else 0
            action = draw.choice(["change", "insert", "delete", "cut", "repeat"])
            if action == "change" and mutated:
                mutated[place] = draw.choice([0, 255, draw.randrange(256)])
            elif action == "insert":
                mutated[place:place] = draw.randbytes(draw.randrange(1, 20))
            elif action == "delete":
                del mutated[place : place + draw.randrange(1, 20)]
            elif action == "cut" and draw.random() < 0.2:
                del mutated[place:]
            elif action == "repeat":
                mutated += mutated[place : place + 100]
        yield bytes(mutated)


@pytest.mark.parametrize(("kind", "n"), [("WAV", 250), ("OGG", 250)])
def test_mutated_recordings_are_read_or_refused(kind, n, tmp_path):
    path = tmp_path / f"recording.{kind.lower()}"
    soundfile.write(path, np.sin(np.arange(2000) * 0.1), 8000, format=kind)
    read = 0
    for content in mutations(path.read_bytes(), n):
        path.write_bytes(content)
        try:
            clip = datasets.read_recording(path, 8000)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert clip.ndim == 1 and np.isfinite(clip).all()
            read += 1
    assert 0 < read < n


def test_mutated_tables_are_read_or_refused(tmp_path):
    folder = write_esc50(tmp_path / "esc50")
    table = folder / "meta" / "esc50.csv"
    read = 0
    for content in mutations(table.read_bytes(), 300):
        table.write_bytes(content)
        try:
            rows = datasets.list_esc50(folder)
        except InputError as error:
            assert "esc50.csv" in str(error) and "\n" not in str(error)
        else:
            assert all(0 <= label < 50 and 1 <= fold <= 5 for _, _, label, fold in rows)
            read += 1
    assert 0 < read < 300
