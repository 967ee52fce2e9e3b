"""Trains the grid of an experiment with Ray Tune, several trials at a time.

    python main.py --name=time_frequency --max_epochs=1000 --num_samples=10

An experiment is what its search space in search_spaces.py says now. The same command after any edit
trains what is new and leaves the rest alone: finished trials stay, interrupted ones go on, a larger
--max_epochs takes trials further, a larger --num_samples adds runs, and what the search space does
not have any more stays aside. Results go to RAY_ROOT_DIR/NAME, see docs/cluster.md.

Exit codes: 0 all trials are finished, 1 a sentence says why it did not run to the end, 3 it did but
some trials failed, 130 it was interrupted.
"""

import argparse
import contextlib
import os
import platform
import sys
import time
import traceback
from typing import Any, NamedTuple

from config import NO_IDENTITY, Config, InputError, draw, parse, read_search_space, run
from results import (
    Experiment,
    LastEpoch,
    Plan,
    check_recordings,
    data_of,
    provenance,
    scripts,
)

RESOURCES_PER_TRIAL = {"cpu": 4, "gpu": 0.25}
MOST_NAMED = 3  # values of a key that the sentence before training names


def main():
    args = parse_arguments()
    if args.ray_address is None:  # a private cluster has a token; Ray reads this as it is imported
        os.environ["RAY_AUTH_MODE"] = "token"

    space = read_search_space(args.name, args.max_epochs)
    experiment = Experiment(args.ray_root_dir, args.name)
    if args.dry_run:
        _, work = plan_work(experiment, space, args)
        print(sentence(experiment, work), flush=True)
        warn_of_edited_scripts(args.name, work)
        check_trials(work)
        return

    with experiment.alone():
        old_plan, work = plan_work(experiment, space, args)
        print(sentence(experiment, work), flush=True)
        warn_of_edited_scripts(args.name, work)
        if work.to_train:
            train_trials(experiment, old_plan, work, args)
        else:
            check_recordings(args.name, [trial.data for trial in work.trained.values()])
            plan = new_plan(old_plan, work)
            if plan != old_plan:
                experiment.write_plan(plan)
    print(f"{args.name}: all trials are finished, in {experiment.address}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the grid of an experiment with Ray Tune.")
    parser.add_argument(
        "--name", required=True, help="experiment: a search space's name, or one that contains it"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="runs of the grid (1)")
    parser.add_argument(
        "--max_epochs", type=int, default=1000, help="epochs of a trial at most (1000)"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and end")
    parser.add_argument(
        "--restart", action="store_true", help="move old results aside and train all trials anew"
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
        "--gpus_per_trial",
        type=float,
        help=f"({RESOURCES_PER_TRIAL['gpu']}, without a GPU or for device cpu 0)",
    )
    parser.add_argument(
        "--num_cpus", type=int, help="CPUs to train on (those that this process may use)"
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
        "--ray_address", help="of a Ray cluster that is there, such as auto (one of its own)"
    )
    args = parser.parse_args()

    for flag in ("num_samples", "max_epochs", "num_cpus"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag}={value} must be 1 or more.")
    if args.num_cpus is not None and args.ray_address is not None:
        raise InputError(
            f"--num_cpus={args.num_cpus} is for a cluster of its own: give it to `ray start` "
            f"of {args.ray_address} as --num-cpus={args.num_cpus}."
        )
    if args.cpus_per_trial is not None and not args.cpus_per_trial > 0:
        raise InputError(f"--cpus_per_trial={args.cpus_per_trial:g} must be more than 0.")
    for flag in ("seed", "gpus_per_trial", "save_seconds", "report_seconds", "max_failures"):
        value = getattr(args, flag)
        if value is not None and not value >= 0:
            raise InputError(f"--{flag}={value:g} must be 0 or more.")
    return args


# What belongs to the experiment, and what of it is to be trained


class Trained(NamedTuple):
    """What is known of a trial that has a file."""

    row: dict  # of its last epoch
    data: dict | None  # what it was trained on, see results.data_of
    scripts: list  # hashes of the scripts, of each version that trained it


class Work(NamedTuple):
    """What an experiment consists of now."""

    seeds: list[int]  # of the runs ever asked for
    configs: dict[str, Config]  # of the trials that belong, by key
    trained: dict[str, Trained]  # those of them that have a file
    to_train: list[str]  # keys of those that are not finished
    n_aside: int  # trials that have a file and do not belong
    new_values: dict[str, list[Any]]  # by key of a config: those that no known trial has


def plan_work(experiment, space, args):
    """The Plan as it was, and the Work that the search space asks for now; nothing is written.

    To the experiment belong all trials that the search space draws for the runs asked for, and of
    runs asked for earlier those that it still draws and that are finished.
    """
    old_plan = None
    if not args.restart:
        old_plan = experiment.read_plan()
    if old_plan is None:
        old_plan = Plan()

    asked = range(args.seed, args.seed + args.num_samples)
    drawn = {}
    for seed in sorted({*asked, *old_plan.seeds}):
        drawn |= draw(space, seed)

    trained = {}
    aside = set()
    if not args.restart:
        for key, state in experiment.read_trials(drawn):
            trained[key] = Trained(state["history"][-1], state["data"], state["scripts"])
        aside = set(experiment.trial_keys())

    configs = {}
    to_train = []
    for key, config in drawn.items():
        finished = key in trained and config.is_finished(trained[key].row)
        if config.seed in asked or finished:
            configs[key] = config
            if not finished:
                to_train.append(key)

    aside -= configs.keys()
    trained = {key: trial for key, trial in trained.items() if key in configs}
    fresh = [configs[key] for key in to_train if key not in trained]
    new_values = {}
    if fresh:
        known = list(old_plan.configs().values())
        known += [configs[key] for key in trained]
        known += experiment.read_configs(aside)
        new_values = values_not_known(fresh, known)

    seeds = sorted({*asked, *old_plan.seeds})
    return old_plan, Work(seeds, configs, trained, to_train, len(aside), new_values)


def values_not_known(configs, known):
    """Values of the Configs that no known one has, by key; none where nothing is known."""
    new_values = {}
    if not known:
        return new_values
    for key in Config.model_fields:
        if key in NO_IDENTITY:
            continue
        old = [getattr(config, key) for config in known]
        for config in configs:
            value = getattr(config, key)
            if value not in old:
                new_values.setdefault(key, [])
                if value not in new_values[key]:
                    new_values[key].append(value)
    return new_values


def sentence(experiment, work):
    """What will happen, before it does."""
    n_finished = len(work.configs) - len(work.to_train)
    text = f"{experiment.name}: {len(work.configs)} trials: {n_finished} finished"
    if work.to_train:
        text += f", {len(work.to_train)} to train"

    reasons = []
    begun = [
        work.trained[key].row["training_iteration"] for key in work.to_train if key in work.trained
    ]
    if begun:
        epochs = f"epoch {min(begun)}"
        if min(begun) < max(begun):
            epochs = f"epochs {min(begun)} to {max(begun)}"
        reasons.append(f"{len(begun)} go on from {epochs}")
    for key, values in work.new_values.items():
        named = ", ".join(text_of(value) for value in values[:MOST_NAMED])
        if len(values) > MOST_NAMED:
            named += f" and {len(values) - MOST_NAMED} more"
        verb = "is" if len(values) == 1 else "are"
        reasons.append(f"{key} {named} {verb} new")
    if reasons:
        text += f" ({'; '.join(reasons)})"

    if work.n_aside:
        verb = "other stays" if work.n_aside == 1 else "others stay"
        text += f"; {work.n_aside} {verb} aside"
    return text


def text_of(value):
    """A value of a config in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value!s:.40}"


def warn_of_edited_scripts(name, work):
    """Prints a line where trials were trained by other versions of the scripts than the present."""
    now = scripts()
    edited = set()
    n_trials = 0
    for trial in work.trained.values():
        different = set()
        for version in trial.scripts:
            different |= {script for script in now if version.get(script) != now[script]}
        edited |= different
        n_trials += bool(different)

    if edited:
        print(
            f"warning: {name}: {', '.join(sorted(edited))} edited since {n_trials} of these trials "
            "were trained; NAME.csv tells them apart: if the edit changes numbers, --restart",
            file=sys.stderr,
        )


def check_trials(work):
    """Raises InputError where a trial that is to be trained cannot be, as far as that shows."""
    import train  # here, as --help and finished experiments do without torch

    for key in work.to_train:
        train.check(work.configs[key])


def new_plan(old_plan, work):
    """The Plan of what belongs now, with a start where there are trials or epochs to add."""
    trials = {key: config.model_dump() for key, config in work.configs.items()}
    finished = {}
    for key, trial in work.trained.items():
        if key not in work.to_train:
            row = trial.row
            finished[key] = LastEpoch(
                training_iteration=row["training_iteration"], valid_loss=row["valid_loss"]
            )

    added = []
    for key in work.to_train:
        before = old_plan.trials.get(key)
        if before is None or before["max_epochs"] < work.configs[key].max_epochs:
            added.append(key)
    starts = list(old_plan.starts)
    if added:
        seeds = sorted({work.configs[key].seed for key in added})
        starts.append({"seeds": seeds, "n_trials": len(added), **provenance()})
    return Plan(seeds=work.seeds, trials=trials, finished=finished, starts=starts)


# Training


def train_trials(experiment, old_plan, work, args):
    """Trains what is to be trained; raises InputError or exits where that is not all."""
    from ray import tune

    import cluster  # before Ray, which reads settings as it is imported
    import datasets

    check_trials(work)
    any_config = next(iter(work.configs.values()))  # all have the same recordings and device
    gpus = args.gpus_per_trial
    if gpus is None and any_config.device == "cpu":
        gpus = 0
    if args.ray_address is None and gpus != 0:
        check_gpus([work.configs[key] for key in work.to_train], gpus)
    recordings = datasets.recordings_of(any_config, args.data_dir)
    data = data_of(recordings)
    check_recordings(args.name, [trial.data for trial in work.trained.values()], data)
    check_splits(work.configs.values(), recordings)

    advice = ""
    if args.restart:
        aside = experiment.move_aside()
        if aside:
            print(f"{args.name}: what was there is now {aside}", flush=True)
        advice = "the same command without --restart continues"
    plan = new_plan(old_plan, work)
    experiment.write_plan(plan)

    try:
        with cluster.connected(args.ray_address, args.num_cpus):
            if args.ray_address:
                cluster.check_nodes(experiment, plan)
            resources = cluster.resources(RESOURCES_PER_TRIAL, args.cpus_per_trial, gpus)
            trial = tune.with_parameters(
                run_trial,
                recordings=recordings,
                data=data,
                experiment=experiment,
                save_seconds=args.save_seconds,
            )
            trial = tune.with_resources(trial, resources)
            configs = [work.configs[key] for key in work.to_train]
            errors = cluster.fit(trial, configs, experiment, args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None

    finish(experiment, plan, work, errors, advice)


def check_gpus(configs, gpus=None):
    """Raises InputError where a GPU of this machine cannot train the configs.

    gpus: those that a trial gets, None for the share that it gets anyway.
    """
    import torch

    import machine

    machine.check_driver()
    if not torch.cuda.is_available():
        return

    bf16 = any(config.bf16 for config in configs)
    for index in range(torch.cuda.device_count()):
        machine.check_gpu(index, bf16)

    n_visible = max(1, gpus or 0)  # to a trial, which Ray gives its own GPUs as cuda:0 and so on
    for config in configs:
        index = torch.device(config.device).index or 0
        if index >= n_visible:
            raise InputError(
                f"config: device = {config.device}: a trial sees its own GPU alone, as cuda:0: "
                "write that. CUDA_VISIBLE_DEVICES chooses among GPUs."
            )


def check_splits(configs, recordings):
    """Raises InputError where a part of the recordings is empty by the split of a config."""
    import datasets

    if recordings is None:
        return
    by_split = {str(config.split): config for config in configs}
    for config in by_split.values():
        datasets.load(config, recordings)


def finish(experiment, plan, work, errors, advice):
    """Notes which trials are finished; exits with a sentence where some are not.

    errors: what failed trials said last. advice: how an interrupted run continues.
    """
    lacked_memory = False
    for key, state in experiment.read_trials(work.to_train):
        row = state["history"][-1]
        if work.configs[key].is_finished(row):
            plan.finished[key] = LastEpoch(
                training_iteration=row["training_iteration"], valid_loss=row["valid_loss"]
            )
            lacked_memory = lacked_memory or row["lacked_memory"]
    experiment.write_plan(plan)

    if lacked_memory:
        print(
            "Too little memory to keep the features of fixed windows: trials computed them anew in "
            "every epoch."
        )
    if errors:
        print(
            f"main.py: {len(errors)} trials of {experiment.name} failed: "
            f"{'; '.join(sorted(set(errors)))}",
            file=sys.stderr,
        )
    n_missing = len(work.configs) - len(plan.finished)
    if n_missing > len(errors):  # Ray Tune ends as usual where it is interrupted
        raise KeyboardInterrupt(advice)
    if n_missing:
        sys.exit(3)


def run_trial(config, recordings, data, experiment, save_seconds):
    """What Ray runs for a trial, in a process of its own.

    It trains, reports every epoch, and writes the trial's file at the end and every save_seconds.
    """
    import torch
    from ray import tune

    import datasets
    import train

    config = parse(config["config"])
    key = config.key
    context = tune.get_context()
    resources = context.get_trial_resources().required_resources
    torch.set_num_threads(max(1, int(resources["CPU"])))
    gpus = resources.get("GPU", 0)

    state = dict(experiment.read_trials([key])).get(key)
    versions = [scripts()]
    if state is not None:
        last_row = state["history"][-1]
        if config.is_finished(last_row):  # and then its machine went away
            tune.report(last_row)
            return
        versions = [version for version in state["scripts"] if version != scripts()] + versions

    log_folder = f"{context.get_experiment_name()}/{os.path.basename(context.get_trial_dir())}"
    provenance_of_trial = {
        "config": config,
        "data": data,
        "scripts": versions,
        "logdir": f"{experiment.address}/ray/{log_folder}",
    }
    due = time.monotonic() + save_seconds

    def report(row, snapshot):
        nonlocal due
        begin = time.monotonic()
        if config.is_finished(row) or begin >= due:
            experiment.write_trial(key, {**snapshot(), **provenance_of_trial})
            end = time.monotonic()
            due = end + max(save_seconds, 50 * (end - begin))  # writing takes 2 % of the time
        tune.report(row)

    try:
        if gpus and config.device != "cpu" and not torch.cuda.is_available():
            raise InputError(
                f"{platform.node()}: Ray gave the trial a GPU that CUDA refuses: "
                "`nvidia-smi` there says why, and --gpus_per_trial=0 trains on CPUs."
            )
        train.train(config, datasets.load(config, recordings), report, state, gpus or 1)
    except Exception:
        with contextlib.suppress(OSError):  # the trial's own failure counts, not that of its note
            experiment.storage.write(f"{experiment.name}/trials/{key}.txt", traceback.format_exc())
        raise


if __name__ == "__main__":
    run(main)
