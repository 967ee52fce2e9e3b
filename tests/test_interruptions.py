"""Whatever happens to a run, the same command continues it and the results are those of an undisturbed run."""

import shutil
import signal

import psutil
import pytest
from conftest import Project
from runs import Run, assert_same

from datasets import InputError
from results import Experiment

METRICS = [
    *["loss", "energy", "valid_loss", "valid_acc", "lambd_est"],
    *["best_valid_loss", "best_valid_acc", "best_lambd_est"],
]
STEADY = """

def steady(max_epochs):
    return {**time_frequency(max_epochs), "n_samples": 1500, "init_lambd": tune.grid_search([1.276, 31.9])}


def single(max_epochs):
    return {**steady(max_epochs), "init_lambd": 1.276, "trainable": True}


def diverging(max_epochs):
    return {**steady(max_epochs), "init_lambd": 6.38, "trainable": False, "lr_model": tune.grid_search([1e-3, 1e38])}
"""
EPOCHS = 18
QUICK = {"CHECKPOINT_SECONDS": 0.3, "MAX_FAILURES": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("interrupted"), STEADY, **QUICK)


def steady(project, results, **options):
    return Run(project, results, "steady", **{"epochs": EPOCHS} | options)


@pytest.fixture(scope="module")
def undisturbed(project):
    run = steady(project, "undisturbed")
    run.finish()
    return run


def test_one_seed_gives_one_result_and_another_another(project, undisturbed):
    run = steady(project, "seeds", epochs=2, flags=["--num_samples=2"])
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
    run = steady(project, "signals")
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
    run = steady(project, "worker")
    process = run.start()
    run.wait_for_epochs(process, 6)
    psutil.Process(run.pids().pop()).kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert_same(run, undisturbed)


def test_a_full_disk_costs_the_trial_and_not_its_checkpoint(project, undisturbed):
    copy = Project(project.folder.parent / f"{project.folder.name}_full_disk", STEADY, **QUICK)
    with open(copy.folder / "train.py", "a") as file:
        file.write(FULL_DISK)
    run = Run(copy, "results", "single", EPOCHS)
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
    run = Run(project, "diverging", "diverging", EPOCHS)
    result = run.finish(check=False)
    assert result.returncode == 3
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("main.py:"))
    assert "1 trials of diverging failed: FloatingPointError: epoch 1: training loss" in message
    assert "'lr_model': 1e+38" in message
    table = run.table
    assert table["config/lr_model"].tolist() == [1e-3] and table["training_iteration"].tolist() == [EPOCHS]
    assert "left out of 2 trials: 1 failed, 0 not finished" in run.test_output


def test_restart_moves_the_old_folder_aside(project, undisturbed):
    run = steady(project, "restarted", epochs=1, flags=["--restart"])
    shutil.copytree(undisturbed.results, run.results)
    before = {path.relative_to(run.results / "steady"): path.read_bytes() for path in files_below(run.results)}
    result = run.finish()
    (aside,) = (path for path in run.results.iterdir() if path.name != "steady")
    assert aside.name in result.stdout
    assert {path.relative_to(aside): path.read_bytes() for path in files_below(aside)} == before
    new = [path.read_text().splitlines() for path in (run.results / "steady").glob("*/*/result.json")]
    assert [len(history) for history in new] == [1, 1, 1, 1]
    tables = project.run("produce_tables.py", f"--ray_results_dir={run.results}").stdout
    assert "% steady: no results yet" in tables and aside.name not in tables


def test_restart_helps_where_the_record_is_damaged(tmp_path):
    (tmp_path / "steady").mkdir()
    (tmp_path / "steady" / "experiment.json").write_text('{"batches": [')
    with pytest.raises(InputError, match=r"experiment.json .*: start anew with --restart"):
        Experiment(tmp_path, "steady")
    experiment = Experiment(tmp_path, "steady", restart=True)
    assert experiment.record is None and (tmp_path / experiment.aside / "experiment.json").exists()


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]
