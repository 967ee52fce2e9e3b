"""Tests the best network of every finished trial of an experiment.

    python predict_test.py --ray_results_dir=ray_results --data_base_dir=data --dataset_name=esc50

Writes RAY_RESULTS_DIR/NAME/NAME.csv, one row per trial: what it reported last, config/<key> for
every key of its config, logdir, trial_id, and test_accuracy (0..1); and beside it epochs.csv, for
the figures.
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
from results import EPOCHS, RECORD, TABLE, Experiment, Storage


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
    name, rows, epochs = args.dataset_name, [], []
    experiment = Experiment(args.ray_results_dir, name)
    if (plan := experiment.read_plan()) is None:
        raise InputError(
            f"no experiment in {experiment.address}: train it with main.py --name={name}."
        )
    with experiment.alone():
        recordings = datasets.recordings_of(next(iter(plan.trials.values())), args.data_base_dir)
        plan.keep_to(recordings, name, args.data_base_dir)
        for key, state in tqdm(
            experiment.finished_trials(plan), f"testing {name}", len(plan.trials), unit="trial"
        ):
            if (accuracy := accuracy_of(state, recordings)) is None:
                print(
                    f"warning: {name}/trials/{key}.pt holds no network of its config: left out",
                    file=sys.stderr,
                )
                continue
            for report in (history := state["history"]):
                epoch = {
                    "trial": len(rows),
                    "epoch": report["training_iteration"],
                    "lambd": report["lambd_est"],
                }
                epochs.append({**epoch, "seconds": report["time_this_iter_s"]})
            row = {
                **history[-1],
                "time_total_s": sum(report["time_this_iter_s"] for report in history),
            }
            row |= {
                "trial_id": key,
                "logdir": state["logdir"],
                "scripts": "+".join(state["scripts"]),
            }
            row |= {f"config/{name}": value for name, value in state["config"].items()}
            rows.append({**row, "test_accuracy": accuracy})
        if not rows:
            raise InputError(
                f"no finished trial in {experiment.address}: run main.py --name={name} to its end."
            )
        if n_missing := len(plan.trials) - len(rows):
            print(
                f"warning: {name}: {n_missing} of {len(plan.trials)} trials failed or are not finished: left out"
            )
        trials, epochs = (
            pd.DataFrame(rows),
            pd.DataFrame(epochs).to_csv(index=False, float_format="%.5g"),
        )
        experiment.storage.write(EPOCHS.format(name), epochs)
        experiment.storage.write(TABLE.format(name), trials.to_csv())
    print(f"{name}: {len(rows)} trials tested, in {experiment.address}/{name}.csv")
    if args.keep:
        kept = Storage(args.keep)
        kept.write(EPOCHS.format(name), epochs)
        kept.write(TABLE.format(name), trials.drop(columns="logdir").to_csv())
        kept.write(RECORD.format(name), json.dumps(reduced(plan), indent=2) + "\n")
        print(f"{name}: kept in {kept.address}/{name}")


def reduced(plan):
    """What is kept of a plan: search space, data, and batches, without the words of commands that
    name folders.
    """
    kept = plan.model_dump(include={"search_space", "data", "batches"})
    for batch in kept["batches"]:
        words = shlex.split(re.sub(r"(--(ray_root|data)_dir) ", r"\1=", batch["command"]))
        batch["command"] = shlex.join(
            word for word in words if not re.match(r"--(ray_root|data)_dir|.*/", word)
        )
    return kept


def accuracy_of(state, recordings):
    """Accuracy (0..1) of a trial's best network on its test split, None where it does not fit its
    config.
    """
    import train  # not for --help: torch takes seconds

    config = {**state["config"], "pretrained": False}
    net, loss_function, device = train.prepare(config)
    try:
        net.load_state_dict(state["best_net"])
    except (AttributeError, TypeError, RuntimeError):
        return None
    data = datasets.load(config, recordings).to(device)
    return train.evaluate(net, loss_function, data, data.splits["test"], config["batch_size"])[1]


if __name__ == "__main__":
    run(main)
