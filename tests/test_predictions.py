"""predict_test.py: what networks say of each test clip, what is tested anew, and what is kept."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import runs
import soundfile
import torch
from conftest import write_esc50, write_esc50_table

import datasets
import models
import predict_test
import produce_figures
import search_spaces
import summary
import train
from config import InputError, parse, plain
from results import Experiment, Storage

DATA = Path(__file__).parent / "data"
PULSES = {**plain(search_spaces.time_frequency(2)), "n_samples": 100, "seed": 0}
DIGITS = {**plain(search_spaces.audio_mnist(1)), "init_lambd": 46.7, "seed": 0}
HALVES = (True, False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "cache"))


def configs_of(space, **changes):
    return [parse({**space, "init_lambd": 6.38, "trainable": half, **changes}) for half in HALVES]


@pytest.fixture
def pulses(tmp_path):
    """An experiment of two finished trials, DMEL and baseline.

    The networks that training would go on from are made useless: the best one is what counts.
    """
    experiment = runs.write_trained(tmp_path / "results", "pulses", configs_of(PULSES))
    for key, state in experiment.read_trials(experiment.read_plan().trials):
        for value in state["net"].values():
            value.zero_()
        experiment.write_trial(key, state)
    return experiment


@pytest.fixture
def digits_folder(tmp_path):
    """The recordings of tests/data in a folder of their own, data/audio_mnist, with a licence."""
    folder = tmp_path / "data" / "audio_mnist"
    shutil.copytree(DATA / "AudioMNIST", folder)
    (folder / "LICENSE").write_text("as you like")
    return folder


@pytest.fixture
def digits(tmp_path, digits_folder):
    configs = configs_of(DIGITS)
    recordings = datasets.recordings_of(configs[0], tmp_path / "data")
    return runs.write_trained(tmp_path / "results", "digits", configs, recordings)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs predict_test.py on an experiment, and returns what it prints."""

    def run_script(experiment, *flags):
        command = ["predict_test.py", f"--dataset_name={experiment.name}"]
        command += [f"--ray_results_dir={tmp_path / 'results'}"]
        command += [f"--data_base_dir={tmp_path / 'data'}", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        predict_test.main()
        return capsys.readouterr().out

    return run_script


def file_of(experiment, name):
    return Path(experiment.storage.root, experiment.name, name)


def read(experiment):
    """NAME.csv by trial, and predictions.csv."""
    table = pd.read_csv(file_of(experiment, f"{experiment.name}.csv"), dtype={"trial_id": str})
    predictions = pd.read_csv(file_of(experiment, "predictions.csv"), dtype=str)
    return table.set_index("trial_id"), predictions


def counted(experiment, output):
    """How many trials were tested, and how many were tested before."""
    words = output.split(f"{experiment.name}: ")[1].split()
    assert words[1:3] == ["trials", "tested,"] and words[4:6] == ["tested", "before,"]
    return int(words[0]), int(words[3])


# What predictions are


def expected_of(config, weights, data):
    """Accuracy, labels, predicted classes and their probabilities, computed in another way."""
    net, loss_function = models.build(config)
    net.load_state_dict(weights)
    indices = data.splits["test"]
    _, accuracy = train.evaluate(net, loss_function, data, indices, config.batch_size)
    with torch.no_grad():
        probabilities = net(data.clips[indices])[0].double().exp()
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    largest, predicted = probabilities.max(dim=1)
    return accuracy, data.labels[indices].tolist(), predicted.tolist(), largest.tolist()


def test_predictions_of_drawn_clips(pulses, run, monkeypatch):
    sizes = []
    original = datasets.Data.to
    monkeypatch.setattr(
        datasets.Data,
        "to",
        lambda data, device: sizes.append(len(data.clips)) or original(data, device),
    )
    run(pulses)
    assert sizes == [20, 20]  # no other clips go to the device
    table, predictions = read(pulses)
    columns = ["trial_id", "recording", "label", "predicted", "probability"]
    assert list(predictions.columns) == columns
    for key, config in pulses.read_plan().configs().items():
        weights = pulses.read_trial(key)["best_net"]
        expected = expected_of(config, weights, datasets.load(config))
        accuracy, labels, predicted, probabilities = expected
        of_trial = predictions[predictions["trial_id"] == key]
        assert of_trial["recording"].tolist() == [str(index) for index in range(80, 100)]
        assert of_trial["label"].tolist() == [str(label) for label in labels]
        assert of_trial["predicted"].tolist() == [str(label) for label in predicted]
        told = of_trial["probability"].astype(float).tolist()
        assert told == pytest.approx(probabilities, rel=1e-3)
        digits = of_trial["probability"].str.replace(r"e.*|^0\.0*|\.", "", regex=True)
        assert digits.str.len().max() == 4
        assert table["test_accuracy"][key] == accuracy


def test_predictions_of_recordings_name_their_files(digits, run, tmp_path):
    run(digits)
    _, predictions = read(digits)
    files = [f"data/26/{digit}_26_0.wav" for digit in range(10)]
    assert predictions["recording"].tolist() == 2 * files
    assert predictions["label"].tolist() == 2 * list("0123456789")

    shutil.move(tmp_path / "data" / "audio_mnist" / "data", tmp_path / "elsewhere")
    file_of(digits, "predictions.csv").unlink()
    assert counted(digits, run(digits)) == (2, 0)  # from the cache, which knows the names
    pd.testing.assert_frame_equal(read(digits)[1], predictions)


def test_cnn6_gives_each_class_a_probability_of_its_own():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    config = parse({**DIGITS, "trainable": True, "model_name": "panns_cnn6"})
    torch.testing.assert_close(models.probabilities(config, logits), torch.sigmoid(logits))
    config = config.model_copy(update={"model_name": "mel_linear_net"})
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(models.probabilities(config, logits), expected)


def class_names(folder):
    config = parse({**DIGITS, "trainable": True, "dataset_name": "esc50", "n_points": 40000})
    return datasets.class_names(config, folder)


def test_classes_have_names_where_each_has_one_of_its_own(tmp_path):
    numbers = [str(label) for label in range(50)]
    assert class_names(tmp_path) == numbers  # there is no folder

    names = class_names(DATA / "ESC-10")
    assert (names[0], names[1], names[21]) == ("dog", "rooster", "sneezing")
    assert names[2] == "2"  # of a class that the ten have not

    write_esc50(tmp_path / "esc50")
    assert class_names(tmp_path) == numbers  # all three are "tone"
    for categories in (["dog", "cat"], ["dog", ""], ["1", "cat"]):
        rows = []
        for number, category in enumerate(categories):
            target = number if categories[0] == "1" else 0
            rows.append([f"1-{number}-A-{target}.wav", 1, target, category, "", number, "A"])
        write_esc50_table(tmp_path / "esc50", rows)
        expected = ["1", "cat", *numbers[2:]] if categories[0] == "1" else numbers
        assert class_names(tmp_path) == expected
    (tmp_path / "esc50" / "meta" / "esc50.csv").write_bytes(b"\xff\x00")
    assert class_names(tmp_path) == numbers


# What is tested again


def test_only_what_was_trained_since_is_tested_again(pulses, run):
    assert counted(pulses, run(pulses)) == (2, 0)
    names = ("pulses.csv", "epochs.csv", "predictions.csv")
    before = [file_of(pulses, name).read_bytes() for name in names]
    assert counted(pulses, run(pulses)) == (0, 2)
    assert [file_of(pulses, name).read_bytes() for name in names] == before

    first, _ = pulses.read_plan().configs().values()
    longer = runs.trained(first.model_copy(update={"max_epochs": 3}))
    runs.write_trial(pulses, first, longer)
    assert counted(pulses, run(pulses)) == (1, 1)
    assert read(pulses)[0]["training_iteration"][first.key] == 3
    runs.write_trial(pulses, first, longer, valid_loss=0.5)  # as if it had been trained anew
    assert counted(pulses, run(pulses)) == (1, 1)
    assert counted(pulses, run(pulses)) == (0, 2)


def test_what_was_moved_aside_is_tested_under_its_present_name(pulses, run):
    run(pulses)
    aside = Experiment(pulses.storage.root, pulses.move_aside())
    assert counted(aside, run(aside)) == (0, 2)
    assert (Path(aside.storage.root) / aside.name / "pulses.csv").exists()


def test_other_scripts_test_all_anew(pulses, run, monkeypatch):
    run(pulses)
    edited = predict_test.scripts() | {"models.py": "edited"}
    with monkeypatch.context() as patch:
        patch.setattr(predict_test, "scripts", lambda: edited)
        assert counted(pulses, run(pulses)) == (2, 0)
        assert counted(pulses, run(pulses)) == (0, 2)
    assert counted(pulses, run(pulses)) == (2, 0)
    now = predict_test.scripts_version(predict_test.scripts())
    assert set(read(pulses)[0]["tested_by"]) == {now}


def changed_row(content):
    """With another probability in its second line, which is of the first trial."""
    lines = content.splitlines(keepends=True)
    row, _, _ = lines[1].rpartition(",")
    return "".join([lines[0], f"{row},0.5\n", *lines[2:]])


CHANGES = {  # what is done to a file, and how many trials are then tested again
    "predictions gone": ("predictions.csv", None, 2),
    "predictions of nothing": ("predictions.csv", lambda content: "", 2),
    "predictions cut": ("predictions.csv", lambda content: content[:-3], 2),
    "a row changed": ("predictions.csv", changed_row, 1),
    "a row less": ("predictions.csv", lambda text: text[: text[:-1].rindex("\n") + 1], 1),
    "table gone": ("pulses.csv", None, 2),
    "a table of before": ("pulses.csv", lambda content: content.replace("tested_by", "x"), 2),
    "a table that is none": ("pulses.csv", lambda content: "\0\n\1,", 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_missing_or_damaged_is_tested_again(pulses, run, change):
    run(pulses)
    name, function, n_tested = CHANGES[change]
    path = file_of(pulses, name)
    before = path.read_text()
    if function is None:
        path.unlink()
    else:
        path.write_text(function(before))
        assert path.read_text() != before
    assert counted(pulses, run(pulses)) == (n_tested, 2 - n_tested)
    assert path.read_text() == before


def test_other_recordings_than_those_trained_on_are_refused(digits, run, digits_folder):
    run(digits)
    table = file_of(digits, "digits.csv").read_bytes()
    soundfile.write(digits_folder / "data/28/3_28_0.wav", np.full(4000, 0.1), 8000)
    with pytest.raises(InputError, match="of its trials were trained on 60 recordings"):
        run(digits)
    assert file_of(digits, "digits.csv").read_bytes() == table


def test_renamed_recordings_and_classes_have_their_present_names(digits, run, digits_folder):
    run(digits)
    (digits_folder / "data/26/3_26_0.wav").rename(digits_folder / "data/26/3_26_8.wav")
    assert counted(digits, run(digits)) == (2, 0)
    assert read(digits)[1]["recording"][3] == "data/26/3_26_8.wav"
    assert counted(digits, run(digits)) == (0, 2)

    recordings = datasets.recordings_of(configs_of(DIGITS)[0], digits_folder.parent)
    config = next(iter(digits.read_plan().configs().values()))
    names = [f"digit {label}" for label in range(10)]
    rows = [
        [file, names[label], "", ""]
        for file, label in zip(recordings.files, recordings.labels, strict=True)
    ]
    test_split = datasets.split_clips(config, recordings)["test"].tolist()
    rows = [rows[index] for index in test_split]
    last_row = digits.read_trial(config.key)["history"][-1]
    last_epoch = predict_test.LastEpoch(
        training_iteration=last_row["training_iteration"], valid_loss=last_row["valid_loss"]
    )
    tested = predict_test.TestedBefore(last_epoch, rows)
    for classes, is_right in ((names, True), (list("0123456789"), False)):
        arguments = (tested, last_row, config, recordings, classes)
        assert predict_test.is_still_right(*arguments) == is_right


def test_an_interruption_between_the_files_mixes_nothing(pulses, run, tmp_path, monkeypatch):
    run(pulses)
    first, second = pulses.read_plan().configs().values()
    runs.write_trial(pulses, first, runs.trained(first.model_copy(update={"max_epochs": 12})))
    written = []

    def write(storage, name, content):
        written.append(name)
        if name == "pulses/pulses.csv":
            raise KeyboardInterrupt
        original(storage, name, content)

    original = Storage.write
    old_table = file_of(pulses, "pulses.csv").read_bytes()
    old_predictions = file_of(pulses, "predictions.csv").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Storage, "write", write)
        run(pulses)
    assert written[-2:] == ["pulses/predictions.csv", "pulses/pulses.csv"]
    assert file_of(pulses, "predictions.csv").read_bytes() != old_predictions
    assert file_of(pulses, "pulses.csv").read_bytes() == old_table

    # The other trial alone has predictions that are those of its row.
    file_of(pulses, "epochs.csv").unlink()
    results = summary.read_results(Storage(tmp_path / "results"), "pulses")
    counts = produce_figures.count_predictions(results, Storage(tmp_path / "results"))
    assert list(counts) == ["baseline"]
    assert counted(pulses, run(pulses)) == (1, 1)
    assert second.key in read(pulses)[0].index


# Figure


def test_confusions_are_summed_over_runs(pulses, run, tmp_path):
    more = [config for seed in (1, 2) for config in configs_of(PULSES, seed=seed)]
    experiment = runs.write_trained(tmp_path / "results", "pulses", [*configs_of(PULSES), *more])
    run(experiment)
    table, predictions = read(experiment)
    results = summary.read_all(Storage(tmp_path / "results"))
    flags = produce_figures.argparse.Namespace(ray_results_dir=tmp_path / "results")
    *axes, _ = produce_figures.confusion(results, flags).axes  # the last one is the scale
    titles = ["pulses, DSPEC: 3 trials", "pulses, baseline: 3 trials"]
    assert [axis.get_title() for axis in axes] == titles
    for axis, half in zip(axes, HALVES, strict=True):
        of_half = table.index[table["config/trainable"] == half]
        rows = predictions[predictions["trial_id"].isin(of_half)]
        assert len(rows) == 3 * 20
        expected = np.zeros((3, 3))
        for label, predicted in rows[["label", "predicted"]].astype(int).to_numpy():
            expected[label, predicted] += 1
        expected *= 100 / expected.sum(axis=1, keepdims=True)
        shown = axis.images[0].get_array()
        np.testing.assert_allclose(shown, expected)
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "1", "2"]


def test_without_predictions_the_figure_says_so(pulses, run, tmp_path):
    run(pulses)
    file_of(pulses, "predictions.csv").unlink()
    results = summary.read_all(Storage(tmp_path / "results"))
    flags = produce_figures.argparse.Namespace(ray_results_dir=tmp_path / "results")
    with pytest.raises(InputError, match=r"no experiment shown here has predictions: run predict"):
        produce_figures.confusion(results, flags)


# What is kept


def kept_of(folder, experiment):
    return Experiment(folder, experiment.name)


def test_kept_are_two_networks_and_no_predictions(pulses, run, tmp_path):
    output = run(pulses, "--keep", tmp_path / "kept")
    kept = kept_of(tmp_path / "kept", pulses)
    assert sorted(kept.storage.list("pulses")) == [
        "epochs.csv",
        "experiment.json",
        "pulses.csv",
        "trials",
    ]
    table = pd.read_csv(tmp_path / "kept" / "pulses" / "pulses.csv")
    assert not {"logdir", "predictions"} & set(table)
    assert sorted(kept.trial_keys()) == sorted(pulses.read_plan().trials)
    for key in kept.trial_keys():
        assert key in output
        state = kept.read_trial(key)
        whole = pulses.read_trial(key)
        assert state["history"] == whole["history"] and state["config"] == whole["config"]
        assert state["best_net"].keys() == whole["best_net"].keys()
        assert "optimizer" in whole and not {"optimizer", "net", "logdir"} & state.keys()


def test_kept_are_the_best_by_validation_and_older_ones_go(pulses, run, tmp_path):
    run(pulses, "--keep", tmp_path / "kept")
    others = [config for seed in (1, 2) for config in configs_of(PULSES, seed=seed)]
    experiment = runs.write_trained(tmp_path / "results", "pulses", others)
    for config, accuracy in zip(others, (0.9, 0.2, 0.5, 0.99), strict=True):
        runs.write_trial(experiment, config, runs.trained(config), best_valid_acc=accuracy)
    run(experiment, "--keep", tmp_path / "kept")
    expected = {others[0].key, others[3].key}
    assert set(kept_of(tmp_path / "kept", pulses).trial_keys()) == expected


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [("LICENSE", True), ("Licence.txt", True), ("COPYING.md", True), ("README", False)],
)
def test_networks_are_kept_where_the_recordings_have_a_licence(
    digits, run, digits_folder, tmp_path, name, is_kept
):
    (digits_folder / "LICENSE").rename(digits_folder / name)
    output = run(digits, "--keep", tmp_path / "kept")
    assert len(kept_of(tmp_path / "kept", digits).trial_keys()) == (2 if is_kept else 0)
    reason = "digits: no network is kept: there is no file LICENSE, LICENCE, COPYING of the "
    assert (reason in output) != is_kept


def test_large_networks_are_not_kept(pulses, run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_test, "MAX_KEPT_MIB", 0.01)
    output = run(pulses, "--keep", tmp_path / "kept")
    assert kept_of(tmp_path / "kept", pulses).trial_keys() == []
    assert output.count("pulses: no network is kept: that of trial ") == 1
    assert "MiB, and 0.01 are the most" in output


def test_results_are_kept_nowhere_else_than_beside_kept_ones(pulses, run, tmp_path):
    before = sorted(pulses.trial_keys())
    with pytest.raises(InputError, match=r"^--keep: \S+/pulses is there, and not what --keep"):
        run(pulses, "--keep", tmp_path / "results")
    assert pulses.read_plan() is not None and sorted(pulses.trial_keys()) == before


def test_what_an_earlier_version_trained_is_not_replaced(pulses, run, tmp_path):
    trained = tmp_path / "trained" / "pulses"
    (trained / "trials").mkdir(parents=True)
    (trained / "trials" / "0123456789ab.pt").write_bytes(b"a trial")
    (trained / "experiment.json").write_text('{"search_space": {}, "batches": []}')
    with pytest.raises(InputError, match=r"^--keep: \S+/pulses is there, and not what --keep"):
        run(pulses, "--keep", tmp_path / "trained")
    assert (trained / "trials" / "0123456789ab.pt").read_bytes() == b"a trial"
