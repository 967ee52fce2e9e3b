"""config.py: every wrong value is one sentence with key, value and what is allowed; search spaces become configs."""

import json

import numpy as np
import pytest
from ray import tune

import search_spaces
import train
from config import Config, InputError, complete, describe, draw, plain, read_search_space, trial_key

PULSES = search_spaces.time_frequency(3) | {"trainable": True, "init_lambd": 6.38, "seed": 0}
SPOKEN = search_spaces.audio_mnist(3) | {"trainable": True, "init_lambd": 46.7, "seed": 0}
CNN6 = search_spaces.esc50(3) | {"trainable": True, "init_lambd": 46.7, "seed": 0}
OVERLAPPING = {"train": [1, 2], "valid": [2], "test": [3]}

WRONG = [
    (PULSES, "lr_model", -1e-3, "greater than or equal to 0"),
    (PULSES, "lr_model", "fast", "number"),
    (PULSES, "lr_model", True, "number"),
    (PULSES, "lr_tf", float("nan"), "finite"),
    (PULSES, "batch_size", 0, "greater than or equal to 1"),
    (PULSES, "batch_size", 12.5, "integer"),
    (PULSES, "batch_size", True, "integer"),
    (PULSES, "patience", 0, "greater than or equal to 1"),
    (PULSES, "max_epochs", 0, "greater than or equal to 1"),
    (PULSES, "n_samples", 5, "greater than or equal to 10"),
    (PULSES, "noise_std", -1, "greater than or equal to 0"),
    (PULSES, "sigma_ref", 0, "greater than or equal to 0.1"),
    (PULSES, "sigma_ref", 100, "a fifth of n_points = 128"),
    (PULSES, "hop_length", 0, "greater than or equal to 1"),
    (PULSES, "hop_length", 129, "longer than a clip of n_points = 128"),
    (PULSES, "init_lambd", 0, "greater than or equal to 0.5"),
    (PULSES, "init_lambd", -6.38, "greater than or equal to 0.5"),
    (PULSES, "init_lambd", float("nan"), "finite"),
    (PULSES, "init_lambd", float("inf"), "finite"),
    (PULSES, "init_lambd", 1e9, "longer than a clip"),
    (PULSES, "trainable", "False", "boolean"),
    (PULSES, "optimizer_name", "adamw", "'adam' or 'sgd'"),
    (PULSES, "optimizer_name", ["adam"], "'adam' or 'sgd'"),
    (PULSES, "device", "gpu", "cuda:0 or cpu"),
    (PULSES, "model_name", "resnet", "is not one of linear_net, "),
    (PULSES, "model_name", ["linear_net"], "string"),
    (PULSES, "dataset_name", "time", "is not one of time_frequency, audio_mnist, esc50"),
    (PULSES, "noise_std", None, "is missing: time_frequency needs it"),
    (SPOKEN, "resample_rate", None, "is missing: audio_mnist needs it"),
    (SPOKEN, "n_mels", None, "is missing: mel_linear_net needs it"),
    (SPOKEN, "n_mels", 0, "greater than or equal to 1"),
    (SPOKEN, "n_mels", 10**30, "less than or equal to 4096"),
    (SPOKEN, "hop_length", 8001, "longer than a clip"),
    (SPOKEN, "resample_rate", 0, "greater than or equal to 2"),
    (SPOKEN, "tf32", 1, "boolean"),
    (SPOKEN, "split", 5, "a name or give each of train, valid and test"),
    (SPOKEN, "split", "speaker", "is not one of speakers"),
    (SPOKEN, "split", {"train": [1], "valid": [2]}, "a name or give each of train, valid and test"),
    (SPOKEN, "split", {"train": ["a"], "valid": [2], "test": [3]}, "a name or give each of train, valid and test"),
    (SPOKEN, "split", OVERLAPPING, "a name or give each of train, valid and test"),
    (CNN6, "n_mels", 8, "must be 16 or more"),
    (CNN6, "optimized", 1, "boolean"),
]


@pytest.mark.parametrize(("config", "key", "value", "allowed"), WRONG)
def test_wrong_values(config, key, value, allowed):
    train.check(config)
    with pytest.raises(InputError) as error:
        train.check(config | {key: value})
    message = str(error.value)
    assert message.startswith("config: ") and key in message and allowed in message and "\n" not in message
    assert value is None or str(value)[:90] in message


@pytest.mark.parametrize("key", ["lr_model", "batch_size", "trainable", "init_lambd", "model_name"])
def test_missing_keys(key):
    with pytest.raises(InputError, match=f"key '{key}' is missing"):
        complete({other: value for other, value in PULSES.items() if other != key})


@pytest.mark.parametrize("key", ["lr", 3])
def test_unknown_keys_are_refused_with_the_known_ones(key):
    with pytest.raises(InputError, match=rf"unknown key {key}; known are dataset_name, .*center_offset.*bf16\.$"):
        complete(PULSES | {key: 1})


def test_numbers_of_numpy_are_numbers():
    numbers = {"init_lambd": np.float64(6.38), "batch_size": np.int64(128), "trainable": np.bool_(True)}
    numbers |= {"lr_model": np.float32(0.5), "split": {part: np.arange(i, i + 1) for i, part in enumerate(SPLIT)}}
    config = complete(PULSES | numbers)
    assert config == complete(PULSES | {"lr_model": 0.5, "split": {part: [i] for i, part in enumerate(SPLIT)}})
    assert {type(config[key]) for key in numbers} == {float, int, bool, dict}
    json.dumps(config)


SPLIT = ("train", "valid", "test")


def test_optional_keys_have_their_defaults_and_every_key_a_meaning():
    config = complete(PULSES)
    assert config.keys() == Config.model_fields.keys()
    assert (config["continuous"], config["bf16"], config["split"], config["n_mels"]) == (False, False, None, None)
    assert all(field.description for field in Config.model_fields.values())
    assert complete(config) == config


def test_a_key_follows_from_the_values_alone():
    key = trial_key(PULSES)
    again = dict(reversed(PULSES.items())) | {"init_lambd": np.float64(6.38), "noise_std": 0.5, "continuous": False}
    assert trial_key(again) == key
    assert len({key, trial_key(PULSES | {"seed": 1}), trial_key(PULSES | {"continuous": True})}) == 3


# Search spaces


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("esc50", "esc50"),
        ("audio_mnist_run2", "audio_mnist"),
        ("my_time_frequency", "time_frequency"),
        ("esc50_or_audio_mnist", "audio_mnist"),
    ],
)
def test_names_select_search_spaces(name, space):
    assert read_search_space(name, 7) == plain(getattr(search_spaces, space)(7))


def test_a_grid_is_drawn_cell_by_cell_and_samplers_from_the_seed():
    space = search_spaces.time_frequency(1) | {
        "init_lambd": tune.grid_search(np.arange(1.0, 4.0)),
        "lr_model": tune.loguniform(1e-4, 1e-2),
        "batch_size": tune.choice([32, 64]),
    }
    first, again, other = draw(plain(space), 3), draw(plain(space), 3), draw(plain(space), 4)
    assert first == again and len(first) == 6
    assert {(config["init_lambd"], config["trainable"]) for config in first} == {
        (init, trainable) for init in (1.0, 2.0, 3.0) for trainable in (True, False)
    }
    assert len({config["lr_model"] for config in first + other}) == 12
    assert {config["seed"] for config in first} == {3} and {config["batch_size"] for config in first} <= {32, 64}
    for config in first:
        train.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_points": tune.choice([64, 128])}, "n_points must be one value"),
        ({"dataset_name": tune.grid_search(["esc50"])}, "dataset_name must be one value"),
        ({"init_lambd": tune.grid_search([])}, "grid_search of the search space is empty"),
    ],
)
def test_spaces_that_cannot_be_run(changes, message):
    with pytest.raises(InputError, match=message):
        draw(search_spaces.time_frequency(1) | changes, 0)


def test_a_function_that_returns_no_space_is_named(monkeypatch):
    monkeypatch.setattr(search_spaces, "esc50", lambda max_epochs: None)
    search_spaces.esc50.__module__ = "search_spaces"
    with pytest.raises(InputError, match=r"search_spaces.py: esc50\(\) must return a dict, not None"):
        read_search_space("esc50", 1)


def test_a_mistake_in_the_users_own_code_keeps_its_traceback(monkeypatch):
    def broken(max_epochs):
        return {}["learning_rate"]

    broken.__module__ = "search_spaces"
    monkeypatch.setattr(search_spaces, "broken", broken, raising=False)
    with pytest.raises(KeyError, match="learning_rate"):
        read_search_space("broken", 1)

    def head(frames, bands, n_classes, config):
        return config["n_layers"]

    monkeypatch.setitem(train.models.MODELS, "own", (train.models.power_spectrogram, head, None))
    with pytest.raises(KeyError, match="n_layers"):
        train.check(PULSES | {"model_name": "own"})


def test_description_of_a_search_space_tells_domains_apart():
    domains = [tune.uniform(1, 2), tune.uniform(1, 3), tune.loguniform(1, 2), tune.choice([1, 2]), tune.randint(1, 2)]
    domains += [tune.randn(0, 1), tune.randn(0, 2), tune.quniform(1, 2, 0.5), tune.quniform(1, 2, 0.1)]
    domains += [tune.sample_from(lambda spec: 1)]
    described = [json.dumps(describe({"key": domain})) for domain in domains]
    assert len(set(described)) == len(domains)
    assert described == [json.dumps(describe({"key": domain})) for domain in domains]
