"""Tests the best network of every finished trial of an experiment.

    python predict_test.py --ray_results_dir=ray_results --data_base_dir=data --dataset_name=esc50

Writes RAY_RESULTS_DIR/NAME/NAME.csv, one row per trial that belongs to the experiment: what it
reported last, config/<key> for every key of its config, logdir, trial_id, and test_accuracy (0..1);
and beside it epochs.csv, for the figures, and predictions.csv, what each of these networks takes
each test clip for. Trials that were tested since they were trained are not tested again.
"""

import argparse
import io
import json
import re
import shlex
import sys
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

import datasets
import summary
from config import InputError, run
from results import (
    EPOCHS,
    PREDICTIONS,
    RECORD,
    Experiment,
    LastEpoch,
    check_recordings,
    content_of_trial,
    data_of,
    predictions_version,
    scripts,
    scripts_version,
    table_of,
)
from trained import network_of, rank

LICENCES = ("LICENSE", "LICENCE", "COPYING")  # how the name of a dataset's licence begins
MAX_KEPT_MIB = 2  # of a network that --keep copies


def main():
    parser = argparse.ArgumentParser(
        description="Test the best network of every finished trial of an experiment."
    )
    parser.add_argument(
        "--ray_results_dir",
        default="ray_results",
        help="folder or URI of all results (ray_results)",
    )
    parser.add_argument(
        "--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)"
    )
    parser.add_argument("--dataset_name", required=True, help="the experiment: --name of main.py")
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="folder to copy what tables and figures need to, as DIR/NAME, and two small networks",
    )
    args = parser.parse_args()

    name = args.dataset_name
    experiment = Experiment(args.ray_results_dir, name)
    plan = experiment.read_plan()
    configs = plan.configs() if plan else {}
    if not configs:
        raise InputError(
            f"no experiment in {experiment.address}: train it with main.py --name={name}."
        )
    kept = None
    if args.keep:
        kept = Experiment(args.keep, name)
        check_kept(kept)

    with experiment.alone():
        try:
            tested = test_trials(experiment, configs, args.data_base_dir)
        except KeyboardInterrupt:  # tables of a part of the trials would mislead
            raise KeyboardInterrupt("the same command begins again") from None
        tell_missing(experiment, configs, len(tested.trials))
        if not tested.trials:
            raise InputError(
                f"no finished trial in {experiment.address}: run main.py --name={name} to its end."
            )
        table = pd.DataFrame(tested.trials)
        epochs = pd.DataFrame(tested.epochs).to_csv(index=False, float_format="%.5g")
        predictions = pd.DataFrame(tested.predictions, columns=summary.PREDICTION_COLUMNS)

        # Each row of the table tells the predictions that it goes with, so the table is last: what
        # an interruption leaves of another test is not taken for its own.
        experiment.storage.write(EPOCHS.format(name), epochs)
        experiment.storage.write(PREDICTIONS.format(name), predictions.to_csv(index=False))
        experiment.storage.write(table_of(name), table.to_csv())
        n_tested = len(table) - tested.n_before
        print(
            f"{name}: {n_tested} trials tested, {tested.n_before} tested before, in "
            f"{experiment.storage.address}/{table_of(name)}"
        )
        if kept is not None:
            keep_tables(kept, plan, table, epochs)
            keep_networks(kept, experiment, table, args.data_base_dir)


class Tested(NamedTuple):
    """What is known of the finished trials of an experiment once they are tested."""

    trials: list  # rows of NAME.csv, one per trial
    epochs: list  # rows of epochs.csv, one per epoch of each
    predictions: list  # rows of predictions.csv, one per test clip of each
    n_before: int  # trials that had been tested since they were trained


def test_trials(experiment, configs, data_dir):
    """The Tested trials; those that were tested since they were trained are not tested again."""
    any_config = next(iter(configs.values()))  # all of them work on the same recordings
    recordings = datasets.recordings_of(any_config, data_dir)
    data = data_of(recordings)
    classes = datasets.class_names(any_config, data_dir)
    version = scripts_version(scripts())
    before = read_tested(experiment, version)
    n_before = 0
    trial_rows = []
    epoch_rows = []
    prediction_rows = []

    states = experiment.read_trials(configs)
    for key, state in tqdm(states, f"testing {experiment.name}", len(configs), unit="trial"):
        config = configs[key]
        last_row = state["history"][-1]
        if not config.is_finished(last_row):
            continue
        check_recordings(experiment.name, [state["data"]], data)

        tested = before.get(key)
        if tested is not None and is_still_right(tested, last_row, config, recordings, classes):
            predictions = tested.predictions
            n_before += 1
        else:
            predictions = predict(config, state["best_net"], recordings, classes)
        if predictions is None:
            print(
                f"warning: {experiment.name}/trials/{key}.pt holds no network of its config: "
                "left out",
                file=sys.stderr,
            )
            continue

        number = len(trial_rows)
        trial_rows.append(row_of(key, state, predictions, version))
        for row in state["history"]:
            epoch_rows.append(
                {
                    "trial": number,
                    "epoch": row["training_iteration"],
                    "lambd": row["lambd_est"],
                    "seconds": row["time_this_iter_s"],
                }
            )
        prediction_rows.extend([key, *row] for row in predictions)
    return Tested(trial_rows, epoch_rows, prediction_rows, n_before)


def row_of(key, state, predictions, version):
    """A trial's row of NAME.csv; version: of the scripts that tested it."""
    row = dict(state["history"][-1])
    row["time_total_s"] = sum(epoch["time_this_iter_s"] for epoch in state["history"])
    row["trial_id"] = key
    if state["data"] is not None:
        row["recordings"] = state["data"]["clips"]
    row["logdir"] = state["logdir"]
    row["scripts"] = "+".join(scripts_version(hashes) for hashes in state["scripts"])
    row["tested_by"] = version
    row["predictions"] = predictions_version(predictions)
    for name, value in state["config"]:
        row[f"config/{name}"] = value
    row["test_accuracy"] = accuracy_of(predictions)
    return row


# Predictions: rows [recording, label, predicted, probability], as text


def predict(config, weights, recordings, classes):
    """What a network with these weights takes each clip of its test split for.

    None where the weights do not fit the config. classes: names by label.
    """
    import torch  # not for --help: it takes seconds

    import models
    import train

    net = network_of(config, weights, train.prepare)
    if net is None:
        return None
    device = net.spectrogram_layer.lambd.device
    data = only_test(datasets.load(config, recordings)).to(device)

    predicted = []
    probabilities = []
    with torch.no_grad():
        for batch in data.splits["test"].split(config.batch_size):
            logits, _ = net(data.clips.index_select(0, batch))
            labels = logits.argmax(dim=1)
            of_labels = models.probabilities(config, logits).gather(1, labels[:, None])
            predicted += labels.tolist()
            probabilities += of_labels.flatten().tolist()

    names = test_names(config, recordings)
    rows = []
    for name, label, guess, probability in zip(
        names, data.labels.tolist(), predicted, probabilities, strict=True
    ):
        rows.append([name, classes[label], classes[guess], f"{probability:.4g}"])
    return rows


def only_test(data):
    """The Data of the test split alone: a GPU need not hold the others."""
    import torch

    indices = data.splits["test"]
    splits = {"test": torch.arange(len(indices))}
    return datasets.Data(data.clips[indices], data.labels[indices], splits)


def test_names(config, recordings):
    """Names of the clips of a test split: files of recordings, indices of what is drawn."""
    indices = datasets.split_clips(config, recordings)["test"].tolist()
    if recordings is None:
        return [str(index) for index in indices]
    return recordings.files[indices].tolist()


def accuracy_of(predictions):
    """Share (0..1) of the clips whose class is the predicted one; names of classes are unique."""
    n_correct = sum(label == predicted for _, label, predicted, _ in predictions)
    return n_correct / len(predictions)


class TestedBefore(NamedTuple):
    """A trial as it was tested last."""

    last_epoch: LastEpoch
    predictions: list  # rows, see above


def read_tested(experiment, version):
    """A TestedBefore of each trial in NAME.csv, by key.

    Those are left out that other scripts than this version tested, and those whose predictions are
    missing or not those of their row of NAME.csv.
    """
    tested = {}
    try:
        content = experiment.storage.read(table_of(experiment.name)) or b""
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
        predictions = summary.read_predictions(experiment.storage, experiment.name)
        for row in table.to_dict("records"):
            rows = predictions.get(row["trial_id"], [])
            if row["tested_by"] == version and row["predictions"] == predictions_version(rows):
                last_epoch = LastEpoch(
                    training_iteration=int(row["training_iteration"]),
                    valid_loss=float(row["valid_loss"]),
                )
                tested[row["trial_id"]] = TestedBefore(last_epoch, rows)
    except (ValueError, KeyError):  # there is no table, or a damaged one, or one of earlier scripts
        return {}
    return tested


def is_still_right(tested, row, config, recordings, classes):
    """Whether the predictions of a TestedBefore are those of its network and its clips as they are.

    row: of the trial's last epoch. classes: names by label.
    """
    now = LastEpoch(training_iteration=row["training_iteration"], valid_loss=row["valid_loss"])
    if tested.last_epoch != now:
        return False

    # The same recordings may have other names now, and so may their classes.
    if [name for name, *_ in tested.predictions] != test_names(config, recordings):
        return False
    if recordings is None:
        return True
    indices = datasets.split_clips(config, recordings)["test"].numpy()
    labels = [classes[label] for label in recordings.labels[indices]]
    return [label for _, label, *_ in tested.predictions] == labels


def tell_missing(experiment, configs, n_tested):
    """Prints how many trials of the experiment are not tested, and how many do not belong to it."""
    name = experiment.name
    n_missing = len(configs) - n_tested
    if n_missing:
        print(
            f"warning: {name}: {n_missing} of {len(configs)} trials failed or are not finished: "
            "left out"
        )
    n_aside = len(set(experiment.trial_keys()) - configs.keys())
    if n_aside:
        print(f"{name}: {n_aside} trials that are not of its search space now stay aside")


# What --keep copies


def check_kept(kept):
    """Raises InputError where the folder to keep an Experiment in holds something else."""
    if kept.storage.list(kept.name) and not kept.is_kept():
        raise InputError(
            f"--keep: {kept.address} is there, and not what --keep made: name another folder."
        )


def keep_tables(kept, plan, table, epochs):
    """Copies what tables and figures need, predictions left out; kept: an Experiment."""
    name = kept.name
    kept.storage.write(RECORD.format(name), json.dumps(reduced(plan), indent=2) + "\n")
    kept.storage.write(EPOCHS.format(name), epochs)
    table = table.drop(columns=["logdir", "predictions"])
    kept.storage.write(table_of(name), table.to_csv())
    print(f"{name}: kept in {kept.address}")


def keep_networks(kept, experiment, table, data_dir):
    """Copies the networks of the best trial with a trained window and of the best without.

    Those that were kept before go. A line tells where none is kept, or not both.
    """
    contents = {}
    reason = ""
    for trainable in (True, False):
        rows = table[table["config/trainable"] == trainable].to_dict("records")
        if not rows:
            continue
        key = max(rows, key=rank)["trial_id"]
        state = experiment.read_trial(key)
        config = state["config"]
        if not has_licence(config, data_dir):
            folder = datasets.find_folder(config.dataset_name, data_dir)
            reason = f"there is no file {', '.join(LICENCES)} of the recordings in '{folder}'"
            continue

        needed = {"classes": datasets.class_names(config, data_dir)}
        for name in ("config", "history", "best_net", "data", "scripts"):
            needed[name] = state[name]
        content = content_of_trial(needed)
        n_mib = len(content) / 2**20
        if n_mib > MAX_KEPT_MIB:
            reason = f"that of trial {key} takes {n_mib:.1f} MiB, and {MAX_KEPT_MIB} are the most"
            continue
        contents[key] = content

    name = kept.name
    for key in set(kept.trial_keys()) - contents.keys():
        kept.storage.remove(f"{name}/trials/{key}.pt")
    for key, content in contents.items():
        kept.storage.write(f"{name}/trials/{key}.pt", content)
    if contents:
        print(f"{name}: networks kept of {', '.join(contents)}")
    if reason:
        print(f"{name}: {'one' if contents else 'no'} network is kept: {reason}")


def has_licence(config, data_dir):
    """Whether a network may be passed on: its recordings have a licence, or there are none."""
    if config.dataset_name not in datasets.DATASETS:
        return True
    folder = datasets.find_folder(config.dataset_name, data_dir)
    if not folder.is_dir():
        return False
    files = [path.name.upper() for path in folder.iterdir() if path.is_file()]
    return any(name.startswith(LICENCES) for name in files)


def reduced(plan):
    """What is kept of a Plan: NAME.csv has the configs, and words that name folders are private."""
    starts = []
    for start in plan.starts:
        command = re.sub(r"(--(ray_root|data)_dir) ", r"\1=", start["command"])
        words = [
            word
            for word in shlex.split(command)
            if not re.match(r"--(ray_root|data)_dir|.*/", word)
        ]
        starts.append(start | {"command": shlex.join(words)})

    budgets = [config["max_epochs"] for config in plan.trials.values()]
    return {
        "version": plan.version,
        "seeds": plan.seeds,
        "n_trials": len(plan.trials),
        "max_epochs": max(budgets),
        "starts": starts,
    }


if __name__ == "__main__":
    run(main)
