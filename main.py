"""Trains the grid of an experiment with Ray Tune, several trials at a time.

    python main.py --name=time_frequency --max_epochs=1000 --num_samples=10

Results go to RAY_ROOT_DIR/NAME, see results.py. The same command again continues what was
interrupted and leaves finished trials alone; a larger --num_samples adds the missing runs. Exit
codes: 0 all trials are finished, 1 a sentence says why it did not run to the end, 3 it did but some
trials failed.
"""

import argparse
import contextlib
import os
import sys
import time
import traceback

from config import InputError, describe, digest, draw, read_search_space, run, trial_key
from results import Experiment, Plan, provenance, scripts

RESOURCES_PER_TRIAL = {"cpu": 4, "gpu": 0.25}


def main():
    parser = argparse.ArgumentParser(description="Train the grid of an experiment with Ray Tune.")
    parser.add_argument(
        "--name", required=True, help="experiment: a search space's name, or one that contains it"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="runs of the grid (1)")
    parser.add_argument(
        "--max_epochs", type=int, default=1000, help="epochs of a trial at most (1000)"
    )
    parser.add_argument(
        "--ray_root_dir", default="ray_results", help="folder or URI of all results (ray_results)"
    )
    parser.add_argument(
        "--data_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first run, each further has one more (0)"
    )
    parser.add_argument(
        "--cpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['cpu']}, without a GPU 1)"
    )
    parser.add_argument(
        "--gpus_per_trial", type=float, help=f"({RESOURCES_PER_TRIAL['gpu']}, without a GPU 0)"
    )
    parser.add_argument(
        "--save_seconds", type=float, default=10, help="work that an interruption may cost (10)"
    )
    parser.add_argument(
        "--report_seconds", type=float, default=60, help="least between tables of trials (60)"
    )
    parser.add_argument(
        "--max_failures", type=int, default=3, help="times that a failed trial starts again (3)"
    )
    parser.add_argument(
        "--ray_address", help="Ray cluster to run on, such as auto (default: a private one here)"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="move the experiment's old results aside and start anew",
    )
    args = parser.parse_args()
    wrong = [
        flag
        for flag, value in vars(args).items()
        if isinstance(value, (int, float)) and not value >= 0
    ]
    if wrong or 0 in (args.num_samples, args.max_epochs, args.cpus_per_trial):
        raise InputError(
            "numbers must not be negative, --num_samples, --max_epochs and --cpus_per_trial not 0."
        )
    if args.ray_address is None:  # a private cluster has a token; Ray reads this as it is imported
        os.environ["RAY_AUTH_MODE"] = "token"
    space = read_search_space(args.name, args.max_epochs)
    experiment = Experiment(args.ray_root_dir, args.name)
    with experiment.alone():
        plan = None if args.restart else experiment.read_plan()
        plan = plan or Plan(search_space=describe(space), batches=[], trials={})
        done = {key for key, _ in experiment.finished_trials(plan)}
        extend(plan, space, args, experiment.address)
        if len(done) < len(plan.trials):
            train_trials(experiment, plan, done, args)
    print(f"{args.name}: all trials are finished, in {experiment.address}")


def extend(plan, space, args, address):
    """Adds the runs that the plan of the experiment at an address lacks; nothing is written."""
    here, there = describe(space), plan.search_space
    if keys := [key for key in sorted(here | there) if here.get(key) != there.get(key)]:
        told = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} now" for key in keys)
        raise InputError(
            f"{address} holds another experiment ({told}): --restart moves it aside, or change --name."
        )
    planned = {config["seed"] for config in plan.trials.values()}
    seeds = [seed for seed in range(args.seed, args.seed + args.num_samples) if seed not in planned]
    if added := {trial_key(config): config for seed in seeds for config in draw(space, seed)}:
        import train  # here, as --help and finished experiments do without

        for config in added.values():
            train.check(config)
        plan.batches.append({"seeds": seeds, "n_trials": len(added), **provenance()})
        plan.trials.update(added)


def train_trials(experiment, plan, done, args):
    """Trains what is not yet done; raises InputError or exits where that does not come to its end."""
    from ray import tune

    import cluster
    import datasets

    recordings = datasets.recordings_of(next(iter(plan.trials.values())), args.data_dir)
    plan.keep_to(recordings, args.name, args.data_dir)
    for config in plan.trials.values() if recordings else ():  # raises where a part is empty
        datasets.load(config, recordings)
    now = scripts()
    if edited := {
        name
        for batch in plan.batches
        for name, old in batch["scripts"].items()
        if now.get(name) != old
    }:
        told = f"edited since this experiment began: {', '.join(sorted(edited))}; its table tells the trials apart"
        print(f"warning: {told}", file=sys.stderr)
    if args.restart and (aside := experiment.move_aside()):
        print(f"{args.name}: what was there is now {aside}")
    experiment.write_plan(plan)
    with cluster.connected(args.ray_address):
        if args.ray_address:
            cluster.check_nodes(experiment, plan)
        given = {
            "recordings": recordings,
            "experiment": experiment,
            "save_seconds": args.save_seconds,
        }
        trial = tune.with_parameters(run_trial, **given)
        resources = cluster.resources(RESOURCES_PER_TRIAL, args.cpus_per_trial, args.gpus_per_trial)
        configs = [config for key, config in plan.trials.items() if key not in done]
        errors = cluster.fit(tune.with_resources(trial, resources), configs, experiment, args)
    last_rows = [state["history"][-1] for _, state in experiment.finished_trials(plan)]
    if any(row["lacked_memory"] for row in last_rows):
        print(
            "Too little memory to keep the features of fixed windows: trials computed them anew in every epoch."
        )
    if errors:
        print(
            f"main.py: {len(errors)} trials of {args.name} failed: {'; '.join(sorted(set(errors)))}",
            file=sys.stderr,
        )
    if (missing := len(plan.trials) - len(last_rows)) > len(errors):
        raise InputError("interrupted: the same command continues.")
    if missing:
        sys.exit(3)


def run_trial(config, recordings, experiment, save_seconds):
    """What Ray runs for a trial: trains, reports every epoch, writes its file at the end and after
    save_seconds.
    """
    import torch
    from ray import tune

    import datasets
    import train

    config, context = config["config"], tune.get_context()
    torch.set_num_threads(max(1, int(context.get_trial_resources().required_resources["CPU"])))
    key, version = trial_key(config), digest(scripts())[:12]
    state = experiment.read_trial(key)
    if state is not None and state["finished"]:  # and then its machine went away
        return tune.report(state["history"][-1])
    earlier = [other for other in (state or {}).get("scripts", []) if other != version]
    log = f"{context.get_experiment_name()}/{os.path.basename(context.get_trial_dir())}"
    about = {"scripts": [*earlier, version], "logdir": f"{experiment.address}/ray/{log}"}
    due = time.monotonic() + save_seconds

    def report(row, snapshot):
        nonlocal due
        begin = time.monotonic()
        if row["finished"] or begin >= due:
            experiment.write_trial(key, {**snapshot(), **about})
            end = time.monotonic()
            due = end + max(
                save_seconds, 50 * (end - begin)
            )  # writing takes 2 % of the time at most
        tune.report(row)

    try:
        train.train(config, datasets.load(config, recordings), report, state)
    except Exception:
        with contextlib.suppress(
            OSError
        ):  # the trial's own failure counts, not that of writing it down
            experiment.storage.write(f"{experiment.name}/trials/{key}.txt", traceback.format_exc())
        raise


if __name__ == "__main__":
    run(main)
