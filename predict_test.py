"""Tests the best network of every finished trial of an experiment.

    python predict_test.py --ray_results_dir=ray_results --data_base_dir=data --dataset_name=esc50

Writes RAY_RESULTS_DIR/NAME/NAME.csv, one row per trial: what it reported last, config/<key> for every key of its
config, logdir, trial_id, training_iteration and test_accuracy (0..1); and beside it epochs.csv, for the figures.
"""

import argparse
import sys

import pandas as pd
from tqdm import tqdm

import datasets
import train
from datasets import InputError
from results import EPOCHS, TABLE, Experiment, finished, read_checkpoint


def main():
    parser = argparse.ArgumentParser(description="Test the best network of every finished trial of an experiment.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder of all results (ray_results)")
    parser.add_argument("--data_base_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)")
    parser.add_argument("--dataset_name", required=True, help="the experiment: --name of main.py")
    args = parser.parse_args()

    experiment = Experiment(args.ray_results_dir, args.dataset_name)
    if experiment.record is None:
        raise InputError(f"no experiment in {experiment.address}: train it with main.py --name={args.dataset_name}.")
    trials = [trial for batch in experiment.record["batches"] for trial in experiment.trials(batch)]
    done = [trial for trial in trials if finished(trial)]
    if len(done) < len(trials):
        failed = sum(trial.error is not None for trial in trials)
        others = f"{failed} failed, {len(trials) - len(done) - failed} not finished"
        print(f"warning: {args.dataset_name}: left out of {len(trials)} trials: {others}")
    if not done:
        raise InputError(
            f"no finished trial in {experiment.address}: run main.py --name={args.dataset_name} to its end."
        )

    recordings = datasets.recordings_of(done[0].config, args.data_base_dir)
    rows = [
        {**row(trial), "test_accuracy": accuracy_of(trial, recordings)}
        for trial in tqdm(done, desc=f"testing {args.dataset_name}", unit="trial")
    ]
    table, epochs = TABLE.format(experiment.name), EPOCHS.format(experiment.name)
    histories = pd.concat([history_of(i, experiment.history(trial)[0]) for i, trial in enumerate(done)])
    experiment.storage.write(epochs, histories.to_csv(index=False, float_format="%.5g"))
    experiment.storage.write(table, pd.DataFrame(rows).to_csv())
    print(f"{args.dataset_name}: {len(rows)} trials tested, in {experiment.storage.address}/{table}")


def row(trial):
    """The last report of a trial and its config, flat."""
    metrics = {key: value for key, value in trial.metrics.items() if key != "config"}
    config = {f"config/{key}": value for key, value in trial.config.items()}
    return {**metrics, **config, "logdir": trial.path}


def history_of(number, reports):
    """What the figures need of the epochs of a trial, given its number in the table."""
    columns = {"training_iteration": "epoch", "lambd_est": "lambd", "time_this_iter_s": "seconds"}
    history = pd.DataFrame(reports, columns=list(columns)).rename(columns=columns)
    history.insert(0, "trial", number)
    return history


def accuracy_of(trial, recordings):
    """Accuracy (0..1) of a trial's best network on its test split."""
    config = trial.config
    state = read_checkpoint(trial.checkpoint)
    net, loss_function, device = train.prepare({**config, "pretrained": False})
    try:
        net.load_state_dict(state["best_net"])
    except (KeyError, TypeError, RuntimeError) as error:
        message = f"{trial.checkpoint.path} holds no {config['model_name']} of this trial ({error!r:.200}): remove it."
        raise InputError(message) from None
    data = datasets.load(config, recordings).to(device)
    _, accuracy = train.evaluate(net, loss_function, data, data.splits["test"], config["batch_size"])
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"predict_test.py: {error}")
