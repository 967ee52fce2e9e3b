"""Copies what tables and figures need of an experiment into results/, to be kept under version control.

    python keep_results.py --ray_results_dir=ray_results --dataset_name=time_frequency

Columns and flags that tell about the machine's folders and addresses are left out.
"""

import argparse
import io
import json
import shlex
import sys

import pandas as pd

from datasets import InputError
from results import Experiment, Storage

LEFT_OUT = ["logdir", "hostname", "node_ip", "pid"]
FOLDER_FLAGS = ("--ray_root_dir", "--data_dir")


def main():
    parser = argparse.ArgumentParser(description="Copy what tables and figures need of an experiment into results/.")
    parser.add_argument("--ray_results_dir", default="ray_results", help="folder or URI of all results (ray_results)")
    parser.add_argument("--dataset_name", required=True, help="the experiment: --name of main.py")
    parser.add_argument("--output_dir", default="results", help="folder to copy to (results)")
    args = parser.parse_args()
    experiment, kept = Experiment(args.ray_results_dir, args.dataset_name), Storage(args.output_dir)
    tables = [experiment.storage.read(name) for name in (experiment.table, experiment.epochs_table)]
    if experiment.record is None or None in tables:
        raise InputError(f"no tested experiment in {experiment.address}: run main.py and predict_test.py first.")
    trials = pd.read_csv(io.StringIO(tables[0]), index_col=0).drop(columns=LEFT_OUT, errors="ignore")
    for batch in experiment.record["batches"]:
        words = shlex.split(batch["command"])
        batch["command"] = shlex.join(word for word in words if not word.startswith(FOLDER_FLAGS))
    kept.write(experiment.table, trials.to_csv())
    kept.write(experiment.epochs_table, tables[1])
    kept.write(experiment.record_file, json.dumps(experiment.record, indent=2) + "\n")
    print(f"{args.dataset_name}: {len(trials)} trials kept in {kept.address}/{args.dataset_name}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"keep_results.py: {error}")
