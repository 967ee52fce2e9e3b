"""What an experiment is: which trials belong to it, what its folder holds, whole or refused.

All of it without Ray.
"""

import argparse
import contextlib
import copy
import functools
import os
import pickle
import random
import re
import subprocess
import sys
from unittest import mock

import pytest
import runs
import torch
from conftest import EXAMPLES, ROOT, write_digits
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune

import cluster
import datasets
import main
import predict_test
import search_spaces
import train
from config import InputError, check_space, draw, parse, plain
from results import Experiment, LastEpoch, check_recordings

SPACE = plain(search_spaces.time_frequency(4)) | {"n_samples": 300}
CONFIG = parse({**SPACE, "trainable": True, "init_lambd": 1.276, "seed": 0})
KEY = CONFIG.key


@pytest.fixture
def experiment(tmp_path):
    """One that has a plan of one run of the grid, and no trial yet."""
    experiment = Experiment(tmp_path / "results", "pulses")
    start(experiment)
    return experiment


def arguments(**changes):
    """Arguments of main.py."""
    defaults = {"seed": 0, "num_samples": 1, "restart": False, "ray_address": None}
    defaults |= {"num_cpus": None, "cpus_per_trial": None, "gpus_per_trial": None}
    defaults |= {"data_dir": "data", "save_seconds": 10, "name": "pulses"}
    return argparse.Namespace(**defaults | changes)


def start(experiment, space=SPACE, **changes):
    """What main.py does at a start, up to training; returns its Work."""
    old_plan, work = main.plan_work(experiment, space, arguments(**changes))
    experiment.write_plan(main.new_plan(old_plan, work))
    return work


def finish(experiment, work, n_epochs=None, versions=None):
    """Writes a file for each trial that is to be trained, as if n_epochs had been trained."""
    for key in work.to_train:
        config = work.configs[key]
        write_trial(experiment, config, n_epochs or config.max_epochs, versions)


def write_trial(experiment, config, n_epochs, versions=None, data=None):
    history = [epoch_row(number) for number in range(1, n_epochs + 1)]
    state = {
        "config": config,
        "history": history,
        "best_net": {},
        "data": data,
        "scripts": versions or [main.scripts()],
        "logdir": "",
    }
    experiment.write_trial(config.key, state)


def epoch_row(number):
    """A row of a history whose validation loss falls with every epoch."""
    return {
        "training_iteration": number,
        "best_epoch": number,
        "valid_loss": 1 / number,
        "lacked_memory": False,
        "lambd_est": 6.0,
        "time_this_iter_s": 0.1,
    }


# What belongs


def test_a_plan_holds_every_cell_of_every_run_and_grows(experiment):
    plan = experiment.read_plan()
    assert plan.trials.keys() == draw(SPACE, 0).keys() and plan.seeds == [0]
    assert start(experiment).to_train == list(plan.trials) and experiment.read_plan() == plan

    finish(experiment, start(experiment, num_samples=2))
    work = start(experiment, seed=5)
    plan = experiment.read_plan()
    assert plan.seeds == [0, 1, 5] and len(plan.trials) == 18 and len(work.to_train) == 6
    assert [batch["seeds"] for batch in plan.starts] == [[0], [1], [5]]
    assert {batch["n_trials"] for batch in plan.starts} == {6}


def sentence(experiment, work):
    return main.sentence(experiment, work)


def test_any_edit_trains_what_is_new_and_nothing_else(experiment):
    """The sentence before training, step by step, each edit followed by training to the end."""
    one_window_more = SPACE | {"init_lambd": tune.grid_search([1.276, 6.38, 31.9, 3.19])}
    one_window_less = SPACE | {"init_lambd": tune.grid_search([1.276, 31.9])}
    reordered = SPACE | {
        "init_lambd": tune.grid_search([31.9, 1.276, 6.38]),
        "trainable": tune.grid_search([False, True]),
    }
    steps = [
        (SPACE, {}, "6 trials: 0 finished, 6 to train"),
        (SPACE, {}, "6 trials: 6 finished"),
        (
            SPACE | {"lr_tf": 0.5},
            {},
            "6 trials: 0 finished, 6 to train (lr_tf 0.5 is new); 6 others stay aside",
        ),
        (SPACE, {}, "6 trials: 6 finished; 6 others stay aside"),
        (
            one_window_more,
            {},
            "8 trials: 6 finished, 2 to train (init_lambd 3.19 is new); 6 others stay aside",
        ),
        (one_window_less, {}, "4 trials: 4 finished; 10 others stay aside"),
        (reordered, {}, "6 trials: 6 finished; 8 others stay aside"),
        (SPACE | {"device": "cpu"}, {}, "6 trials: 6 finished; 8 others stay aside"),
        (
            SPACE | {"optimizer_name": "adam", "lr_tf": 0.5},
            {},
            "6 trials: 0 finished, 6 to train (optimizer_name adam is new); 14 others stay aside",
        ),
        (
            SPACE,
            {"num_samples": 2},
            "12 trials: 6 finished, 6 to train (seed 1 is new); 14 others stay aside",
        ),
        (SPACE, {"num_samples": 1}, "12 trials: 12 finished; 14 others stay aside"),
        (
            SPACE | {"max_epochs": 6},
            {},
            "6 trials: 0 finished, 6 to train (6 go on from epoch 4); 20 others stay aside",
        ),
        (SPACE, {}, "12 trials: 12 finished; 14 others stay aside"),
        (
            one_window_more,
            {"num_samples": 2},
            "16 trials: 14 finished, 2 to train; 12 others stay aside",
        ),
    ]
    for space, changes, expected in steps:
        work = start(experiment, space, **changes)
        assert sentence(experiment, work) == f"pulses: {expected}"
        finish(experiment, work)


def test_unfinished_trials_of_runs_that_are_not_asked_for_do_not_belong(experiment):
    work = start(experiment, num_samples=2)
    first_of_each_run = [key for key in work.to_train if work.configs[key].init_lambd < 2]
    for key in first_of_each_run:
        write_trial(experiment, work.configs[key], 4)
    work = start(experiment)
    assert len(work.configs) == 6 + 2 and len(work.to_train) == 4
    assert {work.configs[key].seed for key in work.to_train} == {0}
    assert experiment.read_plan().seeds == [0, 1]


def test_only_what_adds_trials_or_epochs_is_a_start(experiment):
    assert len(experiment.read_plan().starts) == 1
    start(experiment)  # such as after an interruption
    assert len(experiment.read_plan().starts) == 1
    start(experiment, SPACE | {"max_epochs": 5})
    assert len(experiment.read_plan().starts) == 2
    finish(experiment, start(experiment, SPACE | {"max_epochs": 5}))
    start(experiment, SPACE | {"init_lambd": tune.grid_search([1.276])})
    plan = experiment.read_plan()
    assert len(plan.starts) == 2 and len(plan.trials) == 2 == len(plan.finished)


def test_a_larger_budget_goes_on_and_patience_is_final(experiment):
    finish(experiment, start(experiment))
    work = start(experiment, SPACE | {"max_epochs": 6})
    assert len(work.to_train) == 6 and experiment.read_plan().finished == {}

    config = work.configs[work.to_train[0]]
    out_of_patience = [epoch_row(1) | {"training_iteration": 101}]
    state = {"config": config, "history": out_of_patience, "best_net": {}, "data": None}
    experiment.write_trial(config.key, state | {"scripts": [main.scripts()], "logdir": ""})
    work = start(experiment, SPACE | {"max_epochs": 1000})
    assert config.key not in work.to_train and len(work.to_train) == 5
    finished = experiment.read_plan().finished
    assert finished == {config.key: LastEpoch(training_iteration=101, valid_loss=1.0)}


def test_values_that_no_known_trial_has_are_named_in_few_words(experiment):
    space = SPACE | {"init_lambd": tune.grid_search([2.0, 3.0, 4.0, 5.0, 7.0]), "lr_tf": 0.123456}
    text = sentence(experiment, start(experiment, space))
    assert "(init_lambd 2, 3, 4 and 2 more are new; lr_tf 0.1235 is new)" in text


def test_a_dry_run_says_and_does_nothing(tmp_path, monkeypatch, capsys):
    flags = ["main.py", "--name=time_frequency", "--dry_run", f"--ray_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", flags)
    main.main()
    output = capsys.readouterr().out
    assert output == "time_frequency: 6 trials: 0 finished, 6 to train\n"
    assert list(tmp_path.iterdir()) == []

    experiment = Experiment(tmp_path, "time_frequency")
    work = start(experiment, plain(search_spaces.time_frequency(1000)))
    finish(experiment, work, n_epochs=2, versions=[main.scripts() | {"train.py": "edited"}])
    main.main()
    assert "time_frequency: train.py edited since 6 of these trials" in capsys.readouterr().err


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    experiment = Experiment(tmp_path, "pulses")
    space = SPACE | {"model_name": "resnet"}
    old_plan, work = main.plan_work(experiment, space, arguments())
    with pytest.raises(InputError, match="model_name 'resnet' is not one of"):
        main.train_trials(experiment, old_plan, work, arguments())
    assert list(tmp_path.iterdir()) == []


# Plans


OTHER_PLANS = {
    "deep": ("[" * 100_000, "damaged"),
    "empty": ("", "damaged"),
    "another version": ('{"version": 3, "trials": {}}', "damaged"),
    "no object": ("[1]", "damaged"),
    "version 1": ('{"version": 1, "batches": [], "trials": {}}', "earlier version"),
    "an earlier layout": ('{"search_space": {}, "batches": [{"folder": "s"}]}', "earlier version"),
}


def test_a_plan_that_keep_copied_is_no_damage(experiment):
    experiment.storage.write(
        "pulses/experiment.json", '{"version": 2, "seeds": [0], "n_trials": 6}'
    )
    with pytest.raises(
        InputError, match=r"what predict_test\.py --keep copied.*name another folder"
    ):
        experiment.read_plan()


@pytest.mark.parametrize("case", OTHER_PLANS)
def test_plans_that_are_none(experiment, case):
    content, message = OTHER_PLANS[case]
    experiment.storage.write("pulses/experiment.json", content)
    with pytest.raises(InputError, match=rf"experiment\.json is .*{message}.*--restart") as error:
        experiment.read_plan()
    assert "\n" not in str(error.value)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_mutated_plans_are_plans_or_refused(tmp_path_factory, data):
    """What a mutated plan says belongs has its own key: no trial is taken for another."""
    experiment = Experiment(tmp_path_factory.mktemp("plan"), "pulses")
    start(experiment)
    content = bytearray(experiment.storage.read("pulses/experiment.json"))
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin, min(len(content), begin + 30)))
    content[begin:end] = data.draw(
        st.binary(max_size=10) | st.text('{}[]",:0123456789.e-trufalsn \n').map(str.encode)
    )
    experiment.storage.write("pulses/experiment.json", bytes(content))
    try:
        configs = experiment.read_plan().configs()
    except InputError as error:
        assert "experiment.json is " in str(error) and "\n" not in str(error)
    else:
        assert all(config.key == key for key, config in configs.items())


def test_trials_that_are_not_valid_any_more_lie_aside(experiment):
    """As after a key of configs was removed, or its default changed: the plan is not damaged."""
    plan = experiment.read_plan()
    first, second, *others = plan.trials
    plan.trials[first]["removed_key"] = 1
    plan.trials[second]["batch_size"] = 64
    experiment.write_plan(plan)
    assert list(experiment.read_plan().configs()) == others


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
        check_space(space)
        (config,) = draw(space, 0).values()
        train.check(config)
    except InputError as error:
        assert "\n" not in str(error) and key in str(error)
    else:
        assert getattr(config, key) == plain(value)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a..b", "", "a b", "ä"])
def test_names_stay_inside_the_results(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of an experiment"):
        Experiment(tmp_path, name)


def test_restart_helps_where_the_plan_is_damaged(experiment):
    experiment.storage.write("pulses/experiment.json", '{"starts": [')
    work = main.plan_work(experiment, SPACE, arguments(restart=True))[1]
    assert len(work.to_train) == 6 and work.n_aside == 0
    aside = experiment.move_aside()
    assert experiment.read_plan() is None and experiment.storage.read(f"{aside}/experiment.json")
    assert experiment.move_aside() is None


# Recordings


def test_trials_of_other_recordings_are_refused():
    some = {"clips": 6, "identity": "0" * 64}
    more = {"clips": 7, "identity": "0" * 64}
    others = {"clips": 6, "identity": "1" * 64}
    check_recordings("esc50", [], some)
    check_recordings("esc50", [some, some], some)
    check_recordings("esc50", [some, some])
    check_recordings("pulses", [None, None])
    for found in (more, others):
        with pytest.raises(InputError, match=r"esc50: 2 of its trials were .* 6 .*\(hash 0000"):
            check_recordings("esc50", [some, some], found)
    with pytest.raises(InputError, match="esc50: 1 of its trials"):  # they do not go together
        check_recordings("esc50", [some, others])


def test_no_trial_joins_those_of_other_recordings(experiment, tmp_path, monkeypatch):
    write_digits(tmp_path / "data" / "audio_mnist")
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path))
    space = plain(search_spaces.audio_mnist(4))
    work = start(experiment, space)
    for key in work.to_train[:3]:
        others = {"clips": 60, "identity": "0" * 64}
        write_trial(experiment, work.configs[key], 4, data=others)
    flags = arguments(data_dir=str(tmp_path / "data"))
    old_plan, work = main.plan_work(experiment, space, flags)
    with pytest.raises(InputError, match="3 of its trials were trained on"):
        main.train_trials(experiment, old_plan, work, flags)


def test_finished_trials_of_two_kinds_of_recordings_are_refused(tmp_path, monkeypatch):
    experiment = Experiment(tmp_path, "time_frequency")
    work = start(experiment, plain(search_spaces.time_frequency(4)))
    for number, key in enumerate(work.to_train):
        data = {"clips": 60, "identity": str(number % 2) * 64}
        write_trial(experiment, work.configs[key], 4, data=data)
    flags = ["--name=time_frequency", "--max_epochs=4", f"--ray_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["main.py", *flags])
    with pytest.raises(InputError, match="3 of its trials were trained on"):
        main.main()


# Training, with a stand-in for Ray


@pytest.fixture
def train_trials(experiment, monkeypatch):
    """main.train_trials where n trials come to their end, and the others failed with errors."""

    def run(n, lacked_memory=False, errors=(), space=SPACE, **changes):
        def fit(trial, configs, *others):
            for config in configs[:n]:
                row = epoch_row(4) | {"lacked_memory": lacked_memory}
                state = {"config": config, "history": [row], "best_net": {}, "data": None}
                experiment.write_trial(config.key, state | {"scripts": [], "logdir": ""})
            return errors

        monkeypatch.setattr(cluster, "fit", fit)
        old_plan, work = main.plan_work(experiment, space, arguments(**changes))
        main.train_trials(experiment, old_plan, work, arguments(**changes))

    monkeypatch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "resources", lambda *wanted: {"cpu": 1})
    return run


@pytest.mark.parametrize("lacked_memory", [False, True])
def test_too_little_memory_is_told(train_trials, lacked_memory, capsys):
    train_trials(6, lacked_memory)
    assert ("Too little memory to keep the features" in capsys.readouterr().out) == lacked_memory


def test_trials_for_the_cpu_take_no_gpu(train_trials, monkeypatch):
    for device, asked, taken in (("cpu", None, 0), ("cuda:0", None, None), ("cpu", 0.5, 0.5)):
        resources = mock.Mock(return_value={"cpu": 1})
        monkeypatch.setattr(cluster, "resources", resources)
        train_trials(6, space=SPACE | {"device": device}, gpus_per_trial=asked)
        assert resources.call_args.args[-1] == taken


def test_edited_scripts_are_told_in_a_line_also_where_nothing_is_left_to_train(experiment, capsys):
    earlier = main.scripts() | {"dmel.py": "edited", "train.py": "too"}
    finish(experiment, start(experiment), versions=[earlier])
    work = start(experiment)
    main.warn_of_edited_scripts("pulses", work)
    told = capsys.readouterr().err
    assert told.startswith("warning: pulses: dmel.py, train.py edited since 6 of these trials")
    assert "--restart" in told and told.count("\n") == 1

    finish(experiment, start(experiment, seed=1), versions=[main.scripts()])
    only_new = main.plan_work(experiment, SPACE | {"lr_tf": 0.5}, arguments())[1]
    main.warn_of_edited_scripts("pulses", only_new)
    assert capsys.readouterr().err == ""


def test_what_failed_before_an_interruption_is_told_apart_from_it(train_trials, capsys):
    with pytest.raises(KeyboardInterrupt):
        train_trials(-2, errors=["no number"])
    with pytest.raises(SystemExit, match="3"):
        train_trials(1, errors=["no number"])  # of two that were left
    assert capsys.readouterr().err.count("main.py: 1 trials of") == 2


def test_an_interrupted_restart_goes_on_without_the_flag(train_trials, experiment):
    with pytest.raises(KeyboardInterrupt, match="the same command without --restart continues"):
        train_trials(1, restart=True)
    (aside,) = [name for name in experiment.storage.list() if name != "pulses"]
    assert experiment.storage.read(f"{aside}/experiment.json")
    assert len(start(experiment).to_train) == 5


# Trials


trained_once = functools.cache(lambda: runs.trained(CONFIG))


def trained():
    """What CONFIG's trial leaves at its end."""
    about = {"config": CONFIG, "data": None, "scripts": [main.scripts()], "logdir": ""}
    return copy.deepcopy(trained_once()) | about


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


TRIALS = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a pickle in PyTorch's format": lambda path: torch.save(Bomb(), path),
    "without a history": lambda path: torch.save(torch.load(path) | {"history": []}, path),
    "another trial": lambda path: torch.save(changed_config(path, seed=1), path),
    "of a key that is unknown": lambda path: torch.save(changed_config(path, removed=1), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def changed_config(path, **changes):
    """What a trial's file holds, with another config in it."""
    state = torch.load(path)
    return state | {"config": state["config"] | changes}


@pytest.mark.parametrize("damage", TRIALS)
def test_a_damaged_trial_hurts_itself_alone(experiment, tmp_path, damage, capsys):
    configs = experiment.read_plan().configs()
    first, second, *_ = configs
    for key in (first, second):
        experiment.write_trial(key, {**trained(), "config": configs[key]})
    path = tmp_path / "results" / "pulses" / "trials" / f"{first}.pt"
    TRIALS[damage](path)
    assert [key for key, _ in experiment.read_trials(configs)] == [second]
    told = capsys.readouterr().err
    assert re.fullmatch(rf"warning: \S+trials/{first}\.pt is damaged .*trains it anew\n", told)
    if damage != "a folder":
        experiment.write_trial(first, {**trained(), "config": configs[first]})
        assert [key for key, _ in experiment.read_trials(configs)] == [first, second]


def test_mutated_trials_are_the_same_or_damaged(experiment, tmp_path):
    experiment.write_trial(KEY, trained())
    path = tmp_path / "results" / "pulses" / "trials" / f"{KEY}.pt"
    content = path.read_bytes()
    draw_from = random.Random(0)
    n_damaged = 0
    best_net = experiment.read_trial(KEY)["best_net"]
    for _ in range(EXAMPLES):
        mutated = bytearray(content)
        for _ in range(draw_from.choice([1, 1, 4])):
            mutated[draw_from.randrange(len(mutated))] = draw_from.randrange(256)
        path.write_bytes(mutated)
        try:
            state = experiment.read_trial(KEY)
        except ValueError:
            n_damaged += 1
            continue
        for name, value in state["best_net"].items():
            assert torch.equal(best_net[name], value)
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
    start(experiment, plain(search_spaces.time_frequency(1000)), name="time_frequency")
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
    assert len(predict_test.predict(CONFIG, trained()["best_net"], None, "012")) == 60
    for best_net in (torch.nn.Linear(2, 2).state_dict(), None, [1]):
        assert predict_test.predict(CONFIG, best_net, None, "012") is None


def test_states_are_written_as_often_as_they_are_cheap(experiment, monkeypatch):
    """Epochs take 1/8 s, and a write of 1/64 s may come every 50/64 s: so each seventh epoch."""
    context = mock.MagicMock(**{"get_trial_dir.return_value": "log"})
    context.get_trial_resources.return_value.required_resources = {"CPU": 1}
    monkeypatch.setattr("ray.tune.get_context", lambda: context)
    monkeypatch.setattr("ray.tune.report", lambda row: None)
    config = CONFIG.model_copy(update={"max_epochs": 30})
    now = [0.0]
    written = []

    def write_trial(key, state):
        written.append(len(state["history"]))
        now[0] += 1 / 64

    def trained_slowly(config, data, report, state, gpus):
        for epoch in range(1, 31):
            now[0] += 1 / 8
            row = {"training_iteration": epoch, "best_epoch": epoch}
            report(row, lambda epoch=epoch: {"history": [None] * epoch})

    monkeypatch.setattr(experiment, "write_trial", write_trial)
    monkeypatch.setattr(main.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "train", trained_slowly)
    main.run_trial({"config": config.model_dump()}, None, None, experiment, save_seconds=0)
    assert written == [1, 8, 15, 22, 29, 30]
    written.clear()
    main.run_trial({"config": config.model_dump()}, None, None, experiment, save_seconds=2)
    assert written == [16, 30]


def test_a_trial_keeps_the_versions_of_the_scripts_that_trained_it(experiment, monkeypatch):
    context = mock.MagicMock(**{"get_trial_dir.return_value": "log"})
    context.get_trial_resources.return_value.required_resources = {"CPU": 1}
    monkeypatch.setattr("ray.tune.get_context", lambda: context)
    monkeypatch.setattr("ray.tune.report", lambda row: None)
    monkeypatch.setattr(datasets, "load", lambda config, recordings: None)

    def trained_on(config, data, report, state, gpus):
        history = [*state["history"], epoch_row(2)]
        report(history[-1], lambda: {"history": history, "best_net": {}})

    monkeypatch.setattr(train, "train", trained_on)
    config = CONFIG.model_copy(update={"max_epochs": 2})
    old = main.scripts() | {"train.py": "of before"}
    write_trial(experiment, config, 1, versions=[old])
    main.run_trial({"config": config.model_dump()}, None, None, experiment, save_seconds=0)
    ((_, state),) = experiment.read_trials([config.key])
    assert len(state["history"]) == 2 and state["scripts"] == [old, main.scripts()]
