"""config.py: every wrong value is one sentence with key, value and what is allowed; search spaces
become configs.
"""

import json
import math
import os
import random
import sys
from itertools import product

import numpy as np
import pytest
import torch
from ray import tune

import search_spaces
import train
from config import (
    Config,
    InputError,
    check_space,
    draw,
    parse,
    plain,
    read_search_space,
    run,
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
    "split": [5, "speaker"],
}
WRONG_SPOKEN["split"] += [{"train": [1], "valid": [2]}]
WRONG_SPOKEN["split"] += [SPLIT | {"test": ["a"]}, SPLIT | {"test": [3, 2]}]

WRONG = [
    (CNN6, "n_mels", 8),
    (CNN6, "optimized", 1),
    (SPOKEN | {"energy_normalize": False}, "zero_floor", True),
]
for config, wrong_values in ((PULSES, WRONG_PULSES), (SPOKEN, WRONG_SPOKEN)):
    for key, values in wrong_values.items():
        WRONG += [(config, key, value) for value in values]


@pytest.mark.parametrize(("config", "key", "value"), WRONG)
def test_wrong_values(config, key, value):
    train.check(parse(config))
    with pytest.raises(InputError) as error:
        train.check(parse(config | {key: value}))
    message = str(error.value)
    assert message.startswith("config: ") and key in message and "\n" not in message
    assert value is None or str(value)[:90] in message


def test_missing_and_unknown_keys():
    for key in ("lr_model", "n_points", "init_lambd", "model_name"):
        without = {other: value for other, value in PULSES.items() if other != key}
        with pytest.raises(InputError, match=f"{key} = None: Field required"):
            parse(without)
    for key in ("lr", 3):
        known = r"known are dataset_name, .*center_offset.*bf16"
        with pytest.raises(InputError, match=rf"{key} = 1: .*{known}\)\.$"):
            parse(PULSES | {key: 1})


def test_numbers_of_numpy_and_torch_are_numbers():
    numbers = {
        "init_lambd": torch.tensor(6.5),
        "batch_size": np.int64(128),
        "trainable": np.bool_(True),
        "lr_model": np.float32(0.5),
        "split": {part: np.array(groups) for part, groups in SPLIT.items()},
    }
    config = parse(PULSES | numbers)
    assert config == parse(PULSES | {"init_lambd": 6.5, "lr_model": 0.5, "split": SPLIT})
    assert {type(getattr(config, key)) for key in numbers} == {float, int, bool, dict}
    json.dumps(config.model_dump())


def test_optional_keys_have_their_defaults_and_every_key_a_meaning():
    config = parse(PULSES)
    assert config.continuous is False and config.bf16 is False
    assert config.split is None and config.n_mels is None
    assert all(field.description for field in Config.model_fields.values())
    assert parse(config.model_dump()) == config


# Keys of trials


def test_a_key_follows_from_the_values_alone():
    config = search_spaces.audio_mnist(1000) | {"trainable": True, "seed": 0}
    config["init_lambd"] = 8000 * 0.01 / 6
    key = parse(config).key
    assert key == "17f0fcd096d1"  # trained trials go on by it
    same = dict(reversed(config.items()))
    same |= {"init_lambd": np.float64(8000 * 0.01 / 6), "continuous": False, "lr_tf": 1}
    same |= {"max_epochs": 3, "device": "cpu"}
    assert parse(same).key == key


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"continuous": True}, {"lr_tf": 0.5}, {"patience": 50}, {"split": "speakers"}],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_whatever_else_differs_is_another_trial(change, trainable):
    config = SPOKEN | {"trainable": trainable}
    assert parse(config).key != parse(config | change).key


def test_weights_count_by_their_content(tmp_path):
    keys = []
    for name, content in (("a", "weights"), ("b", "weights"), ("c", "others")):
        path = tmp_path / name
        path.write_text(content)
        space = search_spaces.esc50(1) | {"pretrained": True, "checkpoint_path": str(path)}
        keys.append(set(draw(space, 0)))
    assert keys[0] == keys[1] and not keys[0] & keys[2]


def test_a_path_of_weights_that_are_not_used_makes_no_difference():
    space = search_spaces.esc50(1)
    named = draw(space | {"checkpoint_path": "/somewhere/else/Cnn6_mAP=0.343.pth"}, 0)
    assert draw(space, 0).keys() == named.keys()


# Search spaces


def test_names_select_search_spaces(capsys):
    names = {
        "esc50": "esc50",
        "my_audio_mnist_run2": "audio_mnist",
        "esc50_or_audio_mnist": "audio_mnist",
        "audio_mnist_zero_floor": "audio_mnist_zero_floor",
    }
    for name, space in names.items():
        assert read_search_space(name, 7) == plain(getattr(search_spaces, space)(7))
        told = f"{name}: takes the search space {space} " in capsys.readouterr().err
        assert told == (name != space)


def with_samplers(windows, order=1):
    """A search space with a grid of windows, a grid of trainable, and two samplers."""
    space = search_spaces.time_frequency(1) | {
        "init_lambd": tune.grid_search(windows),
        "lr_model": tune.loguniform(1e-4, 1e-2),
        "batch_size": tune.choice([32, 64]),
    }
    return plain(dict(list(space.items())[::order]))


def test_a_grid_is_drawn_cell_by_cell_and_samplers_from_the_seed():
    space = with_samplers(np.arange(1.0, 4.0))
    first = draw(space, 3)
    other = draw(space, 4)
    assert first == draw(space, 3) and len(first) == 6
    cells = set(product((1.0, 2.0, 3.0), (True, False)))
    assert {(config.init_lambd, config.trainable) for config in first.values()} == cells
    rates = {config.lr_model for config in [*first.values(), *other.values()]}
    assert len(rates) == 6  # one for each run and window: its two trials get the same
    assert {config.seed for config in first.values()} == {3}
    assert {config.batch_size for config in first.values()} <= {32, 64}
    for key, config in first.items():
        train.check(config)
        assert config.key == key


def test_other_values_in_a_grid_change_no_draw():
    first = draw(with_samplers([1.0, 2.0, 3.0]), 3)
    assert draw(with_samplers([3, 1.0, 2.0], order=-1), 3).keys() == first.keys()
    assert draw(with_samplers([1.0, 2.0, 3.0, 4.0]), 3).keys() > first.keys()
    assert draw(with_samplers([2.0]), 3).keys() < first.keys()


def test_functions_that_draw_from_global_generators_draw_from_the_seed():
    space = search_spaces.time_frequency(1) | {
        "lr_tf": tune.sample_from(lambda spec: np.random.uniform()),
        "noise_std": tune.sample_from(lambda spec: random.random()),
    }
    state = random.getstate()
    first = draw(plain(space), 0)
    assert first == draw(plain(space), 0) and random.getstate() == state
    assert first.keys() != draw(plain(space), 1).keys()


def test_what_is_drawn_decides_and_not_the_name_of_a_function():
    keys = []
    for rate in (0.1, 0.9):
        space = search_spaces.time_frequency(1)
        space["lr_tf"] = tune.sample_from(lambda spec, rate=rate: rate)
        keys.append(set(draw(space, 0)))
    constant = draw(search_spaces.time_frequency(1) | {"lr_tf": 0.1}, 0)
    assert keys[0] == set(constant) and not keys[0] & keys[1]


def test_equal_draws_count_once():
    space = search_spaces.time_frequency(1) | {"init_lambd": tune.grid_search([6.38, 6.38, 3])}
    assert len(draw(plain(space), 0)) == 4


def test_the_name_of_the_split_that_a_dataset_has_anyway_makes_no_difference():
    for space, split in ((search_spaces.esc50, "random"), (search_spaces.audio_mnist, "speakers")):
        first = draw(space(1), 0)
        assert draw(space(1) | {"split": split}, 0).keys() == first.keys()
        assert not draw(space(1) | {"split": "folds"}, 0).keys() & first.keys()


def test_weights_are_found_from_the_folder_of_the_trials_too():
    space = plain(search_spaces.esc50(1)) | {"checkpoint_path": "weights.pth"}
    for pretrained in (True, False):
        configs = draw(space | {"pretrained": pretrained}, 0).values()
        for config in configs:
            assert config.checkpoint_path.startswith("/") == pretrained
            assert config.checkpoint_path.endswith("weights.pth")


SPACES_THAT_CANNOT_BE_RUN = {
    "n_points": (tune.choice([64, 128]), "must be one value"),
    "dataset_name": (tune.grid_search(["esc50"]), "must be one value"),
    "resample_rate": (tune.grid_search([8000, 16000]), "must be one value"),
    "max_epochs": (tune.grid_search([3, 5]), "must be one value"),
    "device": (tune.grid_search(["cpu", "cuda:0"]), "must be one value"),
    "seed": (3, "given by main.py"),
    "init_lambd": (tune.grid_search([]), "grid_search of the search space is empty"),
}


@pytest.mark.parametrize("key", SPACES_THAT_CANNOT_BE_RUN)
def test_spaces_that_cannot_be_run(key):
    value, message = SPACES_THAT_CANNOT_BE_RUN[key]
    with pytest.raises(InputError, match=message):
        check_space(search_spaces.time_frequency(1) | {key: value})


def test_whole_numbers_are_whole():
    with pytest.raises(InputError, match=r"n_points = 128\.0: must be a valid integer"):
        draw(search_spaces.time_frequency(1) | {"n_points": 128.0}, 0)


def test_functions_of_the_users_that_return_no_space_or_fail(monkeypatch):
    def broken(max_epochs):
        return {}["learning_rate"] if max_epochs else None

    broken.__module__ = "search_spaces"
    monkeypatch.setattr(search_spaces, "broken", broken, raising=False)
    with pytest.raises(
        InputError, match=r"search_spaces.py: broken\(\) must return a dict, not None"
    ):
        read_search_space("broken", 0)
    with pytest.raises(InputError, match=r"line \d+: KeyError: 'learning_rate': mend that"):
        read_search_space("broken", 1)


# Endings of scripts


@pytest.mark.parametrize("raised", [InputError("wrong."), OSError(28, "No space left", "/there")])
def test_what_the_user_can_mend_ends_in_a_sentence(raised):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ending:
        run(main)
    assert str(raised) in ending.value.code and "\n" not in ending.value.code


@pytest.mark.parametrize("advice", ["", "the same command without --restart continues"])
def test_an_interruption_ends_with_130_and_says_how_to_go_on(advice, capsys):
    def main():
        raise KeyboardInterrupt(advice)

    with pytest.raises(SystemExit, match="130"):
        run(main)
    expected = advice or "the same command continues"
    assert capsys.readouterr().err.endswith(f": interrupted: {expected}.\n")


# The layout of the original's file: functions of max_epochs, one dict each, tabs and spaces mixed.
ORIGINAL = """
from ray import tune
import numpy as np

def esc50(max_epochs):
    search_space = {
\t\t'model_name' : 'panns_cnn6', 'n_mels' : 64,
\t'hop_length' : 80, 'energy_normalize' : True, 'optimized' : True, 'normalize_window' : False,
\t\t'augment' : False, 'pretrained' : False,
\t'checkpoint_path' : '/somewhere/else/Cnn6_mAP=0.343.pth',
        'optimizer_name' : 'adam', 'lr_model' : 1e-4, 'lr_tf' : 1.0, 'batch_size' : 32,
        'trainable' : tune.grid_search([True, False]),
\t'max_epochs' : max_epochs, 'patience' : 100,
        'device' : 'cuda:0', 'dataset_name' : 'esc50',
\t'resample_rate' : 8000, 'n_points' : 8000 * 5,
        'init_lambd' : tune.grid_search(list(8000 / 6 * np.array([0.010, 0.035, 0.300]))),
    }
    return search_space
"""


def test_the_originals_way_of_writing_a_search_space(tmp_path, monkeypatch):
    (tmp_path / "search_spaces.py").write_text(ORIGINAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "search_spaces")
    configs = draw(read_search_space("esc50", 7), 0).values()
    assert len(configs) == 6 and {config.max_epochs for config in configs} == {7}
    for config in configs:
        train.check(config)


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "0"}])
def test_scripts_let_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch, given):
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    run(lambda: None)
    assert environment == {"GOMP_SPINCOUNT": "1000"} | given
