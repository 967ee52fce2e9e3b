"""Whatever happens to a run, the same command continues it and the results are those of an undisturbed run."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from conftest import Project

METRICS = (
    "loss",
    "valid_loss",
    "valid_acc",
    "best_valid_loss",
    "best_valid_acc",
    "energy",
    "lambd_est",
    "best_lambd_est",
)
STEADY = """

def steady(max_epochs):
    return {**time_frequency(max_epochs), "n_samples": 1500, "init_lambd": tune.grid_search([1.276, 31.9])}


def single(max_epochs):
    return {**steady(max_epochs), "init_lambd": 1.276, "trainable": True}


def diverging(max_epochs):
    return {**steady(max_epochs), "init_lambd": 6.38, "trainable": False, "lr_model": tune.grid_search([1e-3, 1e38])}
"""
EPOCHS = 18
CELL = ("seed", "model_name", "init_lambd", "trainable")
OF_THE_MOMENT = {
    *["logdir", "trial_id", "hostname", "node_ip", "pid", "date", "timestamp", "checkpoint_dir_name"],
    *[
        "time_this_iter_s",
        "time_total_s",
        "time_since_restore",
        "iterations_since_restore",
        "should_checkpoint",
        "done",
        "experiment_tag",  # begins with the number of the trial in its batch
    ],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("interrupted"))
    with open(project.folder / "search_spaces.py", "a") as file:
        file.write(STEADY)
    script = project.folder / "main.py"
    text = script.read_text()
    assert "CHECKPOINT_SECONDS = 10 " in text
    assert "MAX_FAILURES = 3 " in text
    text = text.replace("CHECKPOINT_SECONDS = 10 ", "CHECKPOINT_SECONDS = 0.3 ")
    script.write_text(text.replace("MAX_FAILURES = 3 ", "MAX_FAILURES = 1 "))
    return project


class Run:
    """An experiment in a results folder of its own."""

    def __init__(self, project, results, name="steady", flags=(), epochs=EPOCHS):
        self.project, self.name = project, name
        self.results = project.folder / results
        self.command = ["main.py", f"--name={name}", f"--max_epochs={epochs}", f"--ray_root_dir={self.results}", *flags]

    def start(self):
        return subprocess.Popen(
            [sys.executable, *self.command],
            cwd=self.project.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, **options):
        return self.project.run(*self.command, **options)

    def histories(self):
        """Lines of result.json of every trial, by its folder's name."""
        return {path.parent.name: path.read_text().splitlines() for path in self.results.glob("*/*/*/result.json")}

    def wait_for_epochs(self, process, n):
        """Waits until n epochs more than now are reported."""
        until, deadline = sum(map(len, self.histories().values())) + n, time.monotonic() + 120
        while sum(map(len, self.histories().values())) < until:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.05)

    def pids(self):
        """Processes that reported an epoch."""
        lines = [line for history in self.histories().values() for line in history]
        return {json.loads(line)["pid"] for line in lines if line.endswith("}")}

    @functools.lru_cache  # noqa: B019
    def table(self):
        command = ["predict_test.py", f"--ray_results_dir={self.results}", f"--dataset_name={self.name}"]
        self.test_output = self.project.run(*command).stdout
        table = pd.read_csv(self.results / self.name / f"{self.name}.csv", index_col=0)
        cells = [f"config/{key}" for key in CELL]
        return table.sort_values(cells).reset_index(drop=True).drop(columns=OF_THE_MOMENT & set(table))

    def epochs(self):
        """The history of every trial by its cell, from both of its files, what belongs to the moment left out."""
        found = {}
        for path in (self.results / self.name).glob("*/*/result.json"):
            reports = [json.loads(line) for line in path.read_text().splitlines()]
            config = reports[0]["config"]
            table = pd.read_csv(path.parent / "progress.csv")
            assert table["training_iteration"].tolist() == [report["training_iteration"] for report in reports]
            assert table["loss"].tolist() == [report["loss"] for report in reports]
            cell = tuple(config[key] for key in CELL)
            found[cell] = [
                {key: value for key, value in report.items() if key not in OF_THE_MOMENT} for report in reports
            ]
        return found


def assert_same(run, reference, n_epochs=EPOCHS):
    pd.testing.assert_frame_equal(run.table(), reference.table(), check_exact=True)
    assert run.epochs() == reference.epochs()
    assert all(
        [report["training_iteration"] for report in h] == list(range(1, n_epochs + 1)) for h in run.epochs().values()
    )


@pytest.fixture(scope="module")
def undisturbed(project):
    run = Run(project, "undisturbed")
    run.finish()
    return run


def test_one_seed_gives_one_result_and_another_another(project, undisturbed):
    run = Run(project, "seeds", flags=["--num_samples=2"], epochs=2)
    run.finish()
    reference = undisturbed.epochs()
    assert len(run.epochs()) == 8 and len(reference) == 4
    for (seed, *cell), history in run.epochs().items():
        same = [
            all(report[key] == expected[key] for key in METRICS)
            for report, expected in zip(history, reference[0, *cell], strict=False)
        ]
        assert same == [seed == 0] * 2


def test_signals_to_main_and_a_power_cut(project, undisturbed):
    run = Run(project, "signals")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, "power cut"):
        process = run.start()
        run.wait_for_epochs(process, 7)
        family = psutil.Process(process.pid).children(recursive=True)
        if number == "power cut":
            for member in [psutil.Process(process.pid), *family]:
                member.kill()
        else:
            process.send_signal(number)
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert "the same command continues" in output.strip().splitlines()[-1] and "Traceback" not in output
        workers = [member for member in family if member.pid in run.pids()]
        assert not psutil.wait_procs(workers, timeout=60)[1]  # nothing goes on writing
    assert sum(map(len, run.histories().values())) < 4 * EPOCHS + 20  # some work was left to do
    run.finish()
    assert_same(run, undisturbed)


def test_a_killed_worker_starts_again_within_the_run(project, undisturbed):
    run = Run(project, "worker")
    process = run.start()
    run.wait_for_epochs(process, 6)
    psutil.Process(run.pids().pop()).kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert_same(run, undisturbed)


def test_a_full_disk_costs_the_trial_and_not_its_checkpoint(project, undisturbed):
    copy = Project(project.folder.parent / f"{project.folder.name}_full_disk")
    for script in ("main.py", "search_spaces.py"):
        shutil.copy(project.folder / script, copy.folder)
    with open(copy.folder / "train.py", "a") as file:
        file.write(FULL_DISK)
    run = Run(copy, "results", "single")
    result = run.finish(check=False)
    assert result.returncode == 3
    assert "No space left on device" in result.stderr
    failed = [path.parent for path in run.results.glob("*/*/*/error.txt")]
    assert failed and all(list(folder.glob("checkpoint_*/trial.pt")) for folder in failed)
    (copy.folder / "train.py").write_text((copy.folder / "train.py").read_text().replace(FULL_DISK, ""))
    run.finish()
    for cell, history in run.epochs().items():
        for report, expected in zip(history, undisturbed.epochs()[cell], strict=True):
            assert [report[key] for key in METRICS] == [expected[key] for key in METRICS]


FULL_DISK = """

def save_to_a_full_disk(state, path):
    if state["epoch"] < 9:
        save(state, path)
    else:  # half of it fits
        with open(path, "wb") as file, open("/dev/full", "wb", buffering=0) as full:
            file.write(bytes(1000))
            full.write(bytes(1000))


save, torch.save = torch.save, save_to_a_full_disk
"""


def test_a_loss_that_is_no_number_ends_that_trial_alone(project):
    run = Run(project, "diverging", "diverging")
    result = run.finish(check=False)
    assert result.returncode == 3
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("main.py:"))
    assert "1 trials of diverging failed: FloatingPointError: epoch 1: training loss" in message
    assert "'lr_model': 1e+38" in message
    table = run.table()
    assert table["config/lr_model"].tolist() == [1e-3] and table["training_iteration"].tolist() == [EPOCHS]
    assert "left out of 2 trials: 1 failed, 0 not finished" in run.test_output


def test_restart_moves_the_old_folder_aside(project, undisturbed):
    run = Run(project, "restarted", flags=["--restart"], epochs=1)
    shutil.copytree(undisturbed.results, run.results)
    before = {path.relative_to(run.results / "steady"): path.read_bytes() for path in files_below(run.results)}
    result = run.finish()
    (aside,) = (path for path in run.results.iterdir() if path.name != "steady")
    assert aside.name in result.stdout
    assert {path.relative_to(aside): path.read_bytes() for path in files_below(aside)} == before
    new = [path.read_text().splitlines() for path in (run.results / "steady").glob("*/*/result.json")]
    assert [len(history) for history in new] == [1, 1, 1, 1]


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]
