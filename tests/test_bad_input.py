"""Bad input of every kind is one sentence that names it and the remedy; nothing is left half-written."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from ray import tune

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
