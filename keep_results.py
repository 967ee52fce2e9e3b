"""Copies what tables and figures need of an experiment into results/, to be kept under version control.

    python keep_results.py --ray_results_dir=ray_results --dataset_name=time_frequency

Columns and flags that tell about the machine's folders and addresses are left out.
"""

import argparse
import json
import shlex

from config import InputError, run
from results import EPOCHS, RECORD, TABLE, Experiment
from storage import Storage
from summary import read_table

LEFT_OUT = ["logdir", "hostname", "node_ip", "pid"]
FOLDER_FLAGS = ("--ray_root_dir", "--data_dir")


def main():
    parser = argparse.ArgumentParser(description="Copy what tables and figures need of an experiment into results/.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--dataset_name", required=True, help="the experiment: --name of main.py")
    parser.add_argument("--output_dir", default="results", help="folder to copy to (results)")
    args = parser.parse_args()
    experiment, kept = Experiment(args.ray_results_dir, args.dataset_name), Storage(args.output_dir)
    name = args.dataset_name
    trials = read_table(experiment.storage, TABLE.format(name), {}, index_col=0)
    epochs = experiment.storage.read(EPOCHS.format(name))
    plan = experiment.read_plan()
    if plan is None or trials is None or epochs is None:
        raise InputError(f"no tested experiment in {experiment.address}: run main.py and predict_test.py first.")
    for batch in plan.batches:
        words = shlex.split(batch["command"])
        batch["command"] = shlex.join(word for word in words if not word.startswith(FOLDER_FLAGS))
    record = plan.model_dump(include={"search_space", "data", "batches"})
    kept.write(TABLE.format(name), trials.drop(columns=LEFT_OUT, errors="ignore").to_csv())
    kept.write(EPOCHS.format(name), epochs)
    kept.write(RECORD.format(name), json.dumps(record, indent=2) + "\n")
    print(f"{name}: {len(trials)} trials kept in {kept.address}/{name}")


if __name__ == "__main__":
    run(main)
