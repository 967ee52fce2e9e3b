"""What an experiment leaves in its folder: the plan and the trials, whole or refused, without Ray."""

import contextlib
import copy
import functools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import runs
import torch
from conftest import EXAMPLES, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
import datasets
import main
import predict_test
import search_spaces
import train
from config import InputError, describe, draw, plain, trial_key
from results import Experiment, Plan

SPACE = plain(search_spaces.time_frequency(4)) | {"n_samples": 300}
CONFIG = {**SPACE, "trainable": True, "init_lambd": 1.276, "seed": 0}
KEY = trial_key(CONFIG)


def extended(plan=None, space=SPACE, seed=0, num_samples=1):
    """The plan, or a new one, with runs added as main.py does."""
    plan = plan or Plan(search_space=describe(space), batches=[], trials={})
    main.extend(plan, space, main.argparse.Namespace(seed=seed, num_samples=num_samples), "results")
    return plan


@pytest.fixture
def experiment(tmp_path):
    """With a plan of one run of the grid, as main.py writes it."""
    experiment = Experiment(tmp_path / "results", "pulses")
    experiment.write_plan(extended())
    return experiment


# The plan


def test_a_plan_holds_every_cell_of_every_run_and_grows(experiment):
    plan = experiment.read_plan()
    assert sorted(plan.trials) == sorted(map(trial_key, draw(SPACE, 0)))
    assert extended(experiment.read_plan()) == plan
    for seeds, changes in (([5], {"seed": 5}), ([1], {"num_samples": 2})):
        experiment.write_plan(extended(experiment.read_plan(), **changes))
        batch = experiment.read_plan().batches[-1]
        assert batch["seeds"] == seeds and batch["n_trials"] == 6
    plan = experiment.read_plan()
    assert len(plan.trials) == 18 and {config["seed"] for config in plan.trials.values()} == {
        0,
        1,
        5,
    }


def test_another_search_space_and_one_that_cannot_be_trained_are_refused(experiment):
    with pytest.raises(InputError, match=r"\(batch_size: 128 there, 64 now\): .*--restart"):
        extended(experiment.read_plan(), SPACE | {"batch_size": 64})
    with pytest.raises(InputError, match="model_name 'resnet' is not one of"):
        extended(space=SPACE | {"model_name": "resnet"})


OTHER_PLANS = {
    "deep": lambda plan: "[" * 100_000,
    "another version": lambda plan: json.dumps(plan | {"version": 2}),
    "a config changed": lambda plan: json.dumps(plan).replace(
        '"lr_model": 0.001', '"lr_model": 0.002'
    ),
    "an earlier layout": lambda plan: json.dumps(
        {"search_space": {}, "batches": [{"folder": "seeds_0-0"}]}
    ),
}


@pytest.mark.parametrize("case", OTHER_PLANS)
def test_plans_that_are_none(experiment, case):
    content = OTHER_PLANS[case](json.loads(experiment.storage.read("pulses/experiment.json")))
    experiment.storage.write("pulses/experiment.json", content)
    with pytest.raises(InputError, match=r"experiment\.json cannot be used .*--restart") as error:
        experiment.read_plan()
    assert "\n" not in str(error.value) and (
        case != "an earlier layout" or "earlier version" in str(error.value)
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_mutated_plans_are_the_same_or_refused(tmp_path_factory, data):
    experiment = Experiment(tmp_path_factory.mktemp("plan"), "pulses")
    plan = extended()
    experiment.write_plan(plan)
    content = bytearray(experiment.storage.read("pulses/experiment.json"))
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 30)))
    content[start:end] = data.draw(
        st.binary(max_size=10) | st.text('{}[]",:0123456789.e-trufalsn \n').map(str.encode)
    )
    experiment.storage.write("pulses/experiment.json", bytes(content))
    try:
        assert experiment.read_plan() == plan
    except InputError as error:
        assert "experiment.json cannot be used" in str(error) and "\n" not in str(error)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    key=st.sampled_from([*SPACE, "learning_rate"]),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.binary(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
def test_mutated_search_spaces_are_drawn_or_refused(key, value):
    space = plain({**SPACE, "init_lambd": 6.38, "trainable": True, key: value})
    try:
        (config,) = draw(space, 0)
        train.check(config)
    except InputError as error:
        assert "\n" not in str(error) and key in str(error)
    else:
        assert config[key] == plain(value)
        json.dumps(config)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a..b", "", "a b", "ä"])
def test_names_stay_inside_the_results(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of an experiment"):
        Experiment(tmp_path, name)


def test_restart_helps_where_the_plan_is_damaged(experiment):
    experiment.storage.write("pulses/experiment.json", '{"batches": [')
    aside = experiment.move_aside()
    assert experiment.read_plan() is None and experiment.storage.read(f"{aside}/experiment.json")
    assert experiment.move_aside() is None


# Identity


def recordings(n=6, identity="0" * 64):
    return datasets.Recordings(
        np.zeros((n, 10), np.float32), np.zeros(n, np.int64), np.arange(n), identity
    )


def test_other_recordings_than_the_plans_are_refused(experiment):
    plan = Plan(search_space={}, batches=[], trials={})
    plan.keep_to(recordings(), "esc50", "data")
    experiment.write_plan(plan)
    plan = experiment.read_plan()
    plan.keep_to(recordings(), "esc50", "data")
    for others in (recordings(n=5), recordings(identity="1" * 64)):
        with pytest.raises(
            InputError, match=r"esc50 was begun on 6 recordings \(hash 0000.*'elsewhere' has [56]"
        ):
            plan.keep_to(others, "esc50", "elsewhere")


@pytest.fixture
def train_trials(experiment, monkeypatch):
    """main.train_trials without Ray: n trials finish with a row, and errors are what others failed
    with.
    """

    def run(n, row, errors=()):
        def fit(trial, configs, *others):
            for config in configs[:n]:
                state = {"config": config, "history": [row], "finished": True, "best_net": {}}
                experiment.write_trial(trial_key(config), state)
            return errors

        monkeypatch.setattr(cluster, "fit", fit)
        main.train_trials(
            experiment, experiment.read_plan(), set(), mock.Mock(ray_address=None, restart=False)
        )

    monkeypatch.setattr(cluster, "connected", contextlib.nullcontext)
    monkeypatch.setattr(cluster, "resources", lambda *wanted: {"cpu": 1})
    return run


def test_edited_scripts_and_too_little_memory_are_told(train_trials, monkeypatch, capsys):
    now = main.scripts()
    for is_told in (False, True):
        train_trials(None, {"lacked_memory": is_told})
        output = capsys.readouterr()
        assert ("Too little memory to keep the features" in output.out) == is_told
        assert ("edited since this experiment began: dmel.py, train.py;" in output.err) == is_told
        monkeypatch.setattr(main, "scripts", lambda: now | {"dmel.py": "edited", "train.py": "too"})


def test_what_failed_before_an_interruption_is_told_apart_from_it(train_trials, capsys):
    with pytest.raises(InputError, match="interrupted: the same command continues"):
        train_trials(-2, {"lacked_memory": False}, ["no number"])
    with pytest.raises(SystemExit, match="3"):
        train_trials(-1, {"lacked_memory": False}, ["no number"])
    assert capsys.readouterr().err.count("main.py: 1 trials of") == 2


# Trials


trained_once = functools.cache(lambda: runs.trained(CONFIG))


def trained():
    """What CONFIG's trial leaves at its end."""
    return copy.deepcopy(trained_once())


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


TRIALS = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a pickle in PyTorch's format": lambda path: torch.save(Bomb(), path),
    "without a history": lambda path: torch.save(
        {"config": CONFIG, "finished": True, "best_net": {}}, path
    ),
    "another trial": lambda path: torch.save(
        torch.load(path) | {"config": CONFIG | {"seed": 1}}, path
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", TRIALS)
def test_a_damaged_trial_hurts_itself_alone(experiment, tmp_path, damage, capsys):
    plan, state = experiment.read_plan(), trained()
    first, second, *_ = plan.trials
    for key in (first, second):
        experiment.write_trial(key, {**state, "config": plan.trials[key]})
    path = tmp_path / "results" / "pulses" / "trials" / f"{first}.pt"
    TRIALS[damage](path)
    assert [key for key, _ in experiment.finished_trials(plan)] == [second]
    assert re.fullmatch(
        rf"warning: \S+trials/{first}\.pt is damaged .*trains it anew\n", capsys.readouterr().err
    )
    if damage != "a folder":
        experiment.write_trial(first, {**state, "config": plan.trials[first]})
        assert [key for key, _ in experiment.finished_trials(plan)] == [first, second]


def test_mutated_trials_are_the_same_or_damaged(experiment, tmp_path):
    experiment.write_trial(KEY, trained())
    path = tmp_path / "results" / "pulses" / "trials" / f"{KEY}.pt"
    content, draw_from, n_damaged = path.read_bytes(), random.Random(0), 0
    best_net = experiment.read_trial(KEY)["best_net"]
    for _ in range(EXAMPLES):
        mutated = bytearray(content)
        for _ in range(draw_from.choice([1, 1, 4])):
            mutated[draw_from.randrange(len(mutated))] = draw_from.randrange(256)
        path.write_bytes(mutated)
        state = experiment.read_trial(KEY)
        n_damaged += state is None
        assert state is None or all(
            torch.equal(best_net[name], value) for name, value in state["best_net"].items()
        )
    assert n_damaged > EXAMPLES / 2


def test_a_write_that_fails_leaves_the_old_file(experiment, monkeypatch):
    experiment.write_trial(KEY, trained())
    before = experiment.storage.read(f"pulses/trials/{KEY}.pt")
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        experiment.write_trial(KEY, trained())
    assert experiment.storage.read(f"pulses/trials/{KEY}.pt") == before
    assert experiment.storage.list("pulses/trials") == [f"{KEY}.pt"]


def test_one_process_at_a_time(tmp_path):
    experiment = Experiment(tmp_path, "time_frequency")
    experiment.write_plan(extended(space=plain(search_spaces.time_frequency(1000))))
    with experiment.alone():
        for script, name, folder in (
            ("main.py", "--name", "--ray_root_dir"),
            ("predict_test.py", "--dataset_name", "--ray_results_dir"),
        ):
            command = [
                sys.executable,
                ROOT / script,
                f"{name}=time_frequency",
                f"{folder}={tmp_path}",
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 1 and result.stderr.strip().count("\n") == 0
            assert result.stderr.startswith(f"{script}: {tmp_path}/time_frequency is in use")
    with experiment.alone():  # free again
        pass


def test_a_network_that_does_not_fit_its_config_is_damaged(experiment):
    state = trained()
    assert 0 < predict_test.accuracy_of(state, None) < 1
    for best_net in (torch.nn.Linear(2, 2).state_dict(), None, [1]):
        assert predict_test.accuracy_of(state | {"best_net": best_net}, None) is None


def test_states_are_written_as_often_as_they_are_cheap(experiment, monkeypatch):
    """Epochs take 1/8 s: a write of 1/64 s may come every 50/64 s, so each seventh epoch, if always
    wished.
    """
    context = mock.MagicMock(**{"get_trial_dir.return_value": "log"})
    context.get_trial_resources.return_value.required_resources = {"CPU": 1}
    monkeypatch.setattr("ray.tune.get_context", lambda: context)
    monkeypatch.setattr("ray.tune.report", lambda row: None)
    now, written = [0.0], []

    def write_trial(key, state):
        written.append(len(state["history"]))
        now[0] += 1 / 64

    def trained_slowly(config, data, report, state):
        for epoch in range(1, 31):
            now[0] += 1 / 8
            report({"finished": epoch == 30}, lambda epoch=epoch: {"history": [None] * epoch})

    monkeypatch.setattr(experiment, "write_trial", write_trial)
    monkeypatch.setattr(main.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "train", trained_slowly)
    main.run_trial({"config": CONFIG}, None, experiment, save_seconds=0)
    assert written == [1, 8, 15, 22, 29, 30]
    written.clear()
    main.run_trial({"config": CONFIG}, None, experiment, save_seconds=2)
    assert written == [16, 30]
