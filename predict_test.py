"""Tests the best network of every finished trial of an experiment.

    python predict_test.py --ray_results_dir=ray_results --data_base_dir=data --dataset_name=esc50

Writes RAY_RESULTS_DIR/NAME/NAME.csv, one row per trial that belongs to the experiment: what it
reported last, config/<key> for every key of its config, logdir, trial_id, and test_accuracy (0..1);
and beside it epochs.csv, for the figures.
"""

import argparse
import json
import re
import shlex
import sys

import pandas as pd
from tqdm import tqdm

import datasets
from config import InputError, run
from results import (
    EPOCHS,
    RECORD,
    TABLE,
    Experiment,
    Storage,
    check_recordings,
    data_of,
    scripts_version,
)


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
        "--keep", metavar="DIR", help="folder to copy what tables and figures need to, as DIR/NAME"
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

    with experiment.alone():
        trial_rows, epoch_rows = test_trials(experiment, configs, args.data_base_dir)
        tell_missing(experiment, configs, len(trial_rows))
        if not trial_rows:
            raise InputError(
                f"no finished trial in {experiment.address}: run main.py --name={name} to its end."
            )
        table = pd.DataFrame(trial_rows)
        epochs = pd.DataFrame(epoch_rows).to_csv(index=False, float_format="%.5g")
        experiment.storage.write(EPOCHS.format(name), epochs)
        experiment.storage.write(TABLE.format(name), table.to_csv())
    print(f"{name}: {len(table)} trials tested, in {experiment.address}/{name}.csv")

    if args.keep:
        kept = Storage(args.keep)
        kept.write(EPOCHS.format(name), epochs)
        kept.write(TABLE.format(name), table.drop(columns="logdir").to_csv())
        kept.write(RECORD.format(name), json.dumps(reduced(plan), indent=2) + "\n")
        print(f"{name}: kept in {kept.address}/{name}")


def test_trials(experiment, configs, data_dir):
    """Rows of NAME.csv, one per finished trial, and of epochs.csv, one per epoch of each."""
    any_config = next(iter(configs.values()))  # all of them work on the same recordings
    recordings = datasets.recordings_of(any_config, data_dir)
    data = data_of(recordings)
    trial_rows = []
    epoch_rows = []

    states = experiment.read_trials(configs)
    for key, state in tqdm(states, f"testing {experiment.name}", len(configs), unit="trial"):
        if not configs[key].is_finished(state["history"][-1]):
            continue
        check_recordings(experiment.name, [state["data"]], data)
        accuracy = accuracy_of(configs[key], state["best_net"], recordings)
        if accuracy is None:
            print(
                f"warning: {experiment.name}/trials/{key}.pt holds no network of its config: "
                "left out",
                file=sys.stderr,
            )
            continue

        number = len(trial_rows)
        trial_rows.append(row_of(key, state, accuracy))
        for row in state["history"]:
            epoch_rows.append(
                {
                    "trial": number,
                    "epoch": row["training_iteration"],
                    "lambd": row["lambd_est"],
                    "seconds": row["time_this_iter_s"],
                }
            )
    return trial_rows, epoch_rows


def row_of(key, state, accuracy):
    """A trial's row of NAME.csv."""
    row = dict(state["history"][-1])
    row["time_total_s"] = sum(epoch["time_this_iter_s"] for epoch in state["history"])
    row["trial_id"] = key
    if state["data"] is not None:
        row["recordings"] = state["data"]["clips"]
    row["logdir"] = state["logdir"]
    row["scripts"] = "+".join(scripts_version(hashes) for hashes in state["scripts"])
    for name, value in state["config"]:
        row[f"config/{name}"] = value
    row["test_accuracy"] = accuracy
    return row


def accuracy_of(config, weights, recordings):
    """Accuracy (0..1) of a network with these weights on its test split.

    None where the weights do not fit the config.
    """
    import train  # not for --help: torch takes seconds

    # The published weights are not read once more: the trained ones take their place.
    config = config.model_copy(update={"pretrained": False})
    net, loss_function, device = train.prepare(config)
    try:
        net.load_state_dict(weights)
    except (AttributeError, TypeError, RuntimeError):
        return None

    data = only_test(datasets.load(config, recordings)).to(device)
    _, accuracy = train.evaluate(net, loss_function, data, data.splits["test"], config.batch_size)
    return accuracy


def only_test(data):
    """The Data of the test split alone: a GPU need not hold the others."""
    import torch

    indices = data.splits["test"]
    splits = {"test": torch.arange(len(indices))}
    return datasets.Data(data.clips[indices], data.labels[indices], splits)


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
