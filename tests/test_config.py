"""config.py: every wrong value is one sentence with key, value and what is allowed; search spaces
become configs.
"""

import json
import math
import os
import sys

import numpy as np
import pytest
from ray import tune

import search_spaces
import train
from config import (
    Config,
    InputError,
    complete,
    describe,
    draw,
    plain,
    read_search_space,
    run,
    trial_key,
)

PULSES = search_spaces.time_frequency(3) | {"trainable": True, "init_lambd": 6.38, "seed": 0}
SPOKEN = search_spaces.audio_mnist(3) | {"trainable": True, "init_lambd": 46.7, "seed": 0}
CNN6 = search_spaces.esc50(3) | {"trainable": True, "init_lambd": 46.7, "seed": 0}
SPLIT = {"train": [1], "valid": [2], "test": [3]}
WRONG_PULSES = {
    "lr_model": [-1e-3, "fast", True],
    "lr_tf": [math.nan],
    "batch_size": [0, 12.5, True],
    "n_samples": [5],
    "noise_std": [-1, None],
    "sigma_ref": [0, 26],
    "hop_length": [0, 129],
    "init_lambd": [0.4, -6.38, math.inf, 129],
    "trainable": ["False"],
    "optimizer_name": ["adamw", ["adam"]],
    "device": ["gpu"],
    "model_name": ["resnet", ["linear_net"]],
    "dataset_name": ["time"],
}
WRONG_SPOKEN = {
    "resample_rate": [None, 0],
    "n_mels": [None, 0, 10**30],
    "energy_normalize": [None],
    "tf32": [1],
    "split": [
        5,
        "speaker",
        {"train": [1], "valid": [2]},
        SPLIT | {"test": ["a"]},
        SPLIT | {"test": [3, 2]},
    ],
}
WRONG = [(PULSES, key, value) for key, values in WRONG_PULSES.items() for value in values]
WRONG += [(SPOKEN, key, value) for key, values in WRONG_SPOKEN.items() for value in values]
WRONG += [
    (CNN6, "n_mels", 8),
    (CNN6, "optimized", 1),
    (SPOKEN | {"energy_normalize": False}, "zero_floor", True),
]


@pytest.mark.parametrize(("config", "key", "value"), WRONG)
def test_wrong_values(config, key, value):
    train.check(config)
    with pytest.raises(InputError) as error:
        train.check(config | {key: value})
    message = str(error.value)
    assert message.startswith("config: ") and key in message and "\n" not in message
    assert value is None or str(value)[:90] in message


def test_missing_and_unknown_keys():
    for key in ("lr_model", "n_points", "init_lambd", "model_name"):
        with pytest.raises(InputError, match=f"{key} = None: Field required"):
            complete({other: value for other, value in PULSES.items() if other != key})
    for key in ("lr", 3):
        with pytest.raises(
            InputError, match=rf"{key} = 1: .*known are dataset_name, .*center_offset.*bf16\)\.$"
        ):
            complete(PULSES | {key: 1})


def test_numbers_of_numpy_are_numbers():
    numbers = {
        "init_lambd": np.float64(6.38),
        "batch_size": np.int64(128),
        "trainable": np.bool_(True),
    }
    numbers |= {
        "lr_model": np.float32(0.5),
        "split": {part: np.array(groups) for part, groups in SPLIT.items()},
    }
    config = complete(PULSES | numbers)
    assert config == complete(PULSES | {"lr_model": 0.5, "split": SPLIT})
    assert {type(config[key]) for key in numbers} == {float, int, bool, dict}
    json.dumps(config)


def test_optional_keys_have_their_defaults_and_every_key_a_meaning():
    config = complete(PULSES)
    assert config.keys() == Config.model_fields.keys()
    assert (config["continuous"], config["bf16"], config["split"], config["n_mels"]) == (
        False,
        False,
        None,
        None,
    )
    assert all(field.description for field in Config.model_fields.values())
    assert complete(config) == config


def test_a_key_follows_from_the_values_alone():
    config = search_spaces.audio_mnist(1000) | {
        "trainable": True,
        "init_lambd": 8000 * 0.01 / 6,
        "seed": 0,
    }
    key = trial_key(config)
    assert key == "37ada0708231"  # as it always was, or experiments would not go on
    again = dict(reversed(config.items())) | {
        "init_lambd": np.float64(8000 * 0.01 / 6),
        "continuous": False,
    }
    assert trial_key(again) == key
    assert (
        len({key, trial_key(config | {"seed": 1}), trial_key(config | {"continuous": True})}) == 3
    )


# Search spaces


def test_names_select_search_spaces(capsys):
    names = {
        "esc50": "esc50",
        "my_audio_mnist_run2": "audio_mnist",
        "esc50_or_audio_mnist": "audio_mnist",
    }
    for name, space in {**names, "audio_mnist_zero_floor": "audio_mnist_zero_floor"}.items():
        assert read_search_space(name, 7) == plain(getattr(search_spaces, space)(7))
        assert (f"{name}: takes the search space {space} " in capsys.readouterr().err) == (
            name != space
        )


def test_a_grid_is_drawn_cell_by_cell_and_samplers_from_the_seed():
    space = search_spaces.time_frequency(1) | {
        "init_lambd": tune.grid_search(np.arange(1.0, 4.0)),
        "lr_model": tune.loguniform(1e-4, 1e-2),
        "batch_size": tune.choice([32, 64]),
    }
    first, again, other = draw(plain(space), 3), draw(plain(space), 3), draw(plain(space), 4)
    assert first == again and len(first) == 6
    cells = {(init, trainable) for init in (1.0, 2.0, 3.0) for trainable in (True, False)}
    assert {(config["init_lambd"], config["trainable"]) for config in first} == cells
    assert len({config["lr_model"] for config in first + other}) == 12
    assert {config["seed"] for config in first} == {3} and {
        config["batch_size"] for config in first
    } <= {32, 64}
    for config in first:
        train.check(config)


def test_weights_are_found_from_the_folder_of_the_trials_too():
    space = plain(search_spaces.esc50(1)) | {"checkpoint_path": "weights.pth"}
    for pretrained in (True, False):
        paths = {
            config["checkpoint_path"] for config in draw(space | {"pretrained": pretrained}, 0)
        }
        assert all(
            path.startswith("/") == pretrained and path.endswith("weights.pth") for path in paths
        )


def test_spaces_that_cannot_be_run():
    several = {"n_points": tune.choice([64, 128]), "dataset_name": tune.grid_search(["esc50"])}
    for key, value in several.items():
        with pytest.raises(InputError, match=f"{key} must be one value"):
            draw(search_spaces.time_frequency(1) | {key: value}, 0)
    with pytest.raises(InputError, match=r"n_points = 128\.0: must be a valid integer"):
        train.check(draw(search_spaces.time_frequency(1) | {"n_points": 128.0}, 0)[0])
    with pytest.raises(InputError, match="grid_search of the search space is empty"):
        draw(search_spaces.time_frequency(1) | {"init_lambd": tune.grid_search([])}, 0)


def test_functions_of_the_users_that_return_no_space_or_fail(monkeypatch):
    def broken(max_epochs):
        return {}["learning_rate"] if max_epochs else None

    broken.__module__ = "search_spaces"
    monkeypatch.setattr(search_spaces, "broken", broken, raising=False)
    with pytest.raises(
        InputError, match=r"search_spaces.py: broken\(\) must return a dict, not None"
    ):
        read_search_space("broken", 0)
    with pytest.raises(KeyError, match="learning_rate"):  # with its traceback
        read_search_space("broken", 1)


def test_description_of_a_search_space_tells_domains_apart():
    domains = [
        tune.uniform(1, 2),
        tune.uniform(1, 3),
        tune.loguniform(1, 2),
        tune.choice([1, 2]),
        tune.randint(1, 2),
    ]
    domains += [
        tune.randn(0, 1),
        tune.randn(0, 2),
        tune.quniform(1, 2, 0.5),
        tune.quniform(1, 2, 0.1),
    ]
    domains += [tune.sample_from(lambda spec: 1)]
    described = [json.dumps(describe({"key": domain})) for domain in domains]
    assert len(set(described)) == len(domains)
    assert described == [json.dumps(describe({"key": domain})) for domain in domains]


@pytest.mark.parametrize(
    "raised", [InputError("wrong."), OSError(28, "No space left", "/there"), KeyboardInterrupt()]
)
def test_what_the_user_can_mend_ends_in_a_sentence(raised):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ending:
        run(main)
    assert str(raised) in ending.value.code and "\n" not in ending.value.code


# The layout of the original's file: functions of max_epochs, one dict each, tabs and spaces mixed.
ORIGINAL = """
from ray import tune
import numpy as np

def esc50(max_epochs):
    search_space = {
\t\t'model_name' : 'panns_cnn6', 'n_mels' : 64,
\t'hop_length' : 80, 'energy_normalize' : True, 'optimized' : True, 'normalize_window' : False,
\t\t'augment' : False, 'pretrained' : False, 'checkpoint_path' : '/somewhere/else/Cnn6_mAP=0.343.pth',
        'optimizer_name' : 'adam', 'lr_model' : 1e-4, 'lr_tf' : 1.0, 'batch_size' : 32,
        'trainable' : tune.grid_search([True, False]), 'max_epochs' : max_epochs, 'patience' : 100,
        'device' : 'cuda:0', 'dataset_name' : 'esc50', 'resample_rate' : 8000, 'n_points' : 8000 * 5,
        'init_lambd' : tune.grid_search(list(8000 / 6 * np.array([0.010, 0.035, 0.300]))),
    }
    return search_space
"""


def test_the_originals_way_of_writing_a_search_space(tmp_path, monkeypatch):
    (tmp_path / "search_spaces.py").write_text(ORIGINAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "search_spaces")
    configs = draw(read_search_space("esc50", 7), 0)
    assert len(configs) == 6 and {config["max_epochs"] for config in configs} == {7}
    for config in configs:
        train.check(config)


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "0"}])
def test_scripts_let_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch, given):
    monkeypatch.setattr(os, "environ", environment := dict(given))
    run(lambda: None)
    assert environment == {"GOMP_SPINCOUNT": "1000"} | given
