"""main.py, predict_test.py and produce_tables.py as a user runs them, through real Ray."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pandas as pd
import pytest
from test_plan import Bomb

import cluster
import main
import search_spaces
from config import InputError

ORIGINAL_COLUMNS = {
    *[
        "loss",
        "valid_loss",
        "valid_acc",
        "best_valid_acc",
        "best_valid_loss",
        "lambd_est",
        "best_lambd_est",
        "energy",
    ],
    *[
        "logdir",
        "trial_id",
        "training_iteration",
        "test_accuracy",
        "config/trainable",
        "config/init_lambd",
    ],
}


def train_tiny(project, *flags, **options):
    return project.run("main.py", "--name=tiny", "--max_epochs=2", *flags, **options)


def read_table(project, name="tiny"):
    return pd.read_csv(project.folder / "ray_results" / name / f"{name}.csv", index_col=0)


def test_grid_is_trained_tested_and_tabulated(project, tmp_path):
    output = train_tiny(project, HOME=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []  # no token of Ray's in the home
    assert "No CUDA device: training on the CPU" in output
    header, *rows = output.strip().split("\n\n")[-2].splitlines()[:5]  # the last table
    assert header.split() == [
        *cluster.PARAMETERS,
        "trial",
        "epoch",
        "loss",
        "valid_loss",
        "valid_acc",
        "lambd_est",
    ]
    assert [row.split()[3:5] for row in rows] == [["finished", "2"]] * 4

    flags = [
        "--ray_results_dir=ray_results",
        "--data_base_dir=data",
        "--dataset_name=tiny",
        "--keep=results",
    ]
    project.run("predict_test.py", *flags)
    trials = read_table(project)
    assert set(trials) >= ORIGINAL_COLUMNS | {
        f"config/{key}" for key in search_spaces.time_frequency(2)
    }
    assert len(trials) == 4 and trials["test_accuracy"].between(0.2, 1).all()
    assert set(trials["config/seed"]) == {0} and set(trials["training_iteration"]) == {2}
    for folder, loss in zip(trials["logdir"], trials["loss"], strict=True):  # for TensorBoard
        assert any(name.startswith("events.out.tfevents") for name in os.listdir(folder))
        assert pd.read_csv(os.path.join(folder, "progress.csv"))["loss"].tolist()[-1] == loss

    epochs = pd.read_csv(project.folder / "ray_results" / "tiny" / "epochs.csv")
    assert epochs["epoch"].tolist() == [1, 2] * 4 and epochs["trial"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    last = epochs.groupby("trial")["lambd"].last()
    assert last.tolist() == pytest.approx(trials["lambd_est"].tolist(), rel=1e-4)

    tables = project.run("produce_tables.py").stdout
    assert "% esc50" not in tables and "% tiny: 4 trials" in tables
    rows = re.findall(r"LinearNet & ([\d.]+) & .* & (DSPEC|baseline) & \$([\d.]+)\$", tables)
    starts, methods = [row[0] for row in rows], [row[1] for row in rows]
    assert starts == ["1.3", "1.3", "31.9", "31.9"] and methods == ["DSPEC", "baseline"] * 2
    expected = trials.sort_values(
        ["config/init_lambd", "config/trainable"], ascending=[True, False]
    )["test_accuracy"]
    assert [float(row[2]) for row in rows] == pytest.approx((100 * expected).tolist(), abs=0.051)

    # Tables and figures follow from what is kept, and nothing there tells of this machine.
    kept = "".join(path.read_text() for path in (project.folder / "results" / "tiny").iterdir())
    assert str(project.folder) not in kept and "main.py --name=tiny --max_epochs=2" in kept
    assert project.run("produce_tables.py", "--ray_results_dir=results").stdout == tables


def test_finished_experiment_is_left_alone(project):
    train_tiny(project)
    folder = project.folder / "ray_results" / "tiny"
    shutil.rmtree(folder / "ray")
    before = files_in(folder)
    result = train_tiny(project, PYTHONPATH=folder)  # Ray is not even started
    told = f"tiny: 4 trials: 4 finished\ntiny: all trials are finished, in {folder}\n"
    assert result.stdout == told
    assert files_in(folder) == before


def files_in(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_runs_are_added_and_nothing_of_a_results_folder_runs(project):
    """With a pickle planted in every file there, each script says a sentence, and a new start
    trains them anew.
    """
    train_tiny(project)
    project.run("predict_test.py", "--dataset_name=tiny")
    folder = project.folder / "ray_results" / "tiny"
    plan = (folder / "experiment.json").read_text()
    for path in files_in(folder):
        path.write_bytes(pickle.dumps(Bomb()))
    commands = {
        "main.py": ["--name=tiny", "--max_epochs=2"],
        "predict_test.py": ["--dataset_name=tiny"],
        "produce_tables.py": [],
        "produce_figures.py": ["--output_dir=planted_figures"],
    }
    for script, arguments in commands.items():
        result = project.run(script, *arguments, check=False)
        assert result.returncode == 1 and "unpickled" not in result.stdout + result.stderr, script
        assert (
            result.stderr.startswith(f"{script}: {folder.parent}")
            and result.stderr.strip().count("\n") == 0
        )
    (folder / "experiment.json").write_text(plan)
    result = project.run("predict_test.py", "--dataset_name=tiny", check=False)
    assert (
        result.stderr.count("is damaged") == 4
        and "no finished trial" in result.stderr.splitlines()[-1]
    )
    result = train_tiny(project, "--num_samples=2")
    assert (
        result.stderr.count("main.py trains it anew") == 4
        and "all trials are finished" in result.stdout
    )
    table = result.stdout.split("\n\n")[-2]
    assert table.count(" 0 finished ") == table.count(" 1 finished ") == 4  # seeds
    project.run("predict_test.py", "--dataset_name=tiny")
    seeds = (
        read_table(project)
        .groupby(["config/init_lambd", "config/trainable"])["config/seed"]
        .apply(sorted)
    )
    assert seeds.tolist() == [[0, 1]] * 4
    starts = json.loads((folder / "experiment.json").read_text())["starts"]
    assert [batch["seeds"] for batch in starts] == [[0], [1]]
    for batch in starts:
        assert batch["command"].startswith("python main.py --name=tiny")
        assert batch["versions"]["torch"].startswith("2.11.0")
        assert (
            batch["hardware"]["cpu_cores"] == os.cpu_count()
            and batch["git_commit"]
            and batch["n_trials"] == 4
        )


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """URI of a folder on an S3 server on this machine, and the environment to reach it."""
    port = 20000 + os.getpid() % 20000
    server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/lab", method="PUT")
                urllib.request.urlopen(request)
                break
            time.sleep(0.1)
        keys = {
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield (
            f"s3://lab/results?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1",
            keys,
        )
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_random_search_space_on_s3_from_training_to_tables(project, bucket):
    uri, keys = bucket
    name = "my_tiny_uniform_3"  # it contains that of the search space
    flags = [f"--name={name}", "--max_epochs=1", f"--ray_root_dir={uri}", "--num_samples=2"]
    project.run("main.py", *flags, **keys)
    again = project.run("main.py", *flags, **keys).stdout
    assert again.endswith(f"\n{name}: all trials are finished, in s3://lab/results/{name}\n")
    project.run(
        "predict_test.py",
        f"--dataset_name={name}",
        f"--ray_results_dir={uri}",
        "--keep=kept",
        **keys,
    )
    trials = pd.read_csv(project.folder / "kept" / name / f"{name}.csv", index_col=0)
    assert len(trials) == 4
    assert trials["config/init_lambd"].nunique() == 2  # one for each run
    assert trials["config/init_lambd"].between(1, 30).all()
    assert set(trials["config/lr_model"]) <= {1e-3, 1e-2}
    assert (
        f"% {name}: 4 trials"
        in project.run("produce_tables.py", f"--ray_results_dir={uri}", **keys).stdout
    )
    restarted = project.run("main.py", *flags, "--restart", "--num_samples=1", **keys).stdout
    aside = re.search(r"what was there is now (\S+)", restarted)[1]
    kept = project.run("produce_tables.py", f"--ray_results_dir={uri}", **keys).stdout
    assert aside not in kept and "trials are not tested: run predict_test.py" in kept


WRONG = {
    "unknown name": (
        ["--name=esc51"],
        r"esc51 contains none .*: audio_mnist, .*esc50, time_frequency",
    ),
    "no epochs": (["--name=esc50", "--max_epochs=0"], r"--max_epochs=0 must be 1 or more"),
    "no runs": (["--name=esc50", "--num_samples=0"], r"--num_samples=0 must be 1 or more"),
    "negative": (["--name=esc50", "--save_seconds=-1"], r"--save_seconds=-1 must be 0 or more"),
    "no CPU": (["--name=esc50", "--cpus_per_trial=0"], r"--cpus_per_trial=0 must be more than 0"),
    "missing data": (
        ["--name=esc50", "--data_dir=nowhere"],
        r"no recordings in 'nowhere.*download_data",
    ),
    "results folder": (
        ["--name=time_frequency", "--ray_root_dir=file"],
        r"File exists: '\S+/file'",
    ),
    "results URI": (
        ["--name=time_frequency", "--ray_root_dir=s9://x"],
        r"cannot use 's9://x' for results",
    ),
    "no name": (
        ["--name=../time_frequency"],
        r"'../time_frequency' cannot be the name of an experiment",
    ),
    "too many CPUs": (
        ["--name=time_frequency", "--cpus_per_trial=999"],
        r"has 999 CPUs and 0 GPUs .* 2 CPUs",
    ),
    "no GPU": (
        ["--name=time_frequency", "--gpus_per_trial=0.25"],
        r"has 4 CPUs and 0.25 GPUs .*--gpus",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_sentence(case, tmp_path, monkeypatch):
    arguments, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setattr(cluster.ray, "init", lambda **options: None)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes({"CPU": 2.0}))
    monkeypatch.setattr(cluster.signal, "signal", lambda *_: None)
    with pytest.raises((InputError, OSError), match=rf"^[^\n]*{message}[^\n]*$"):
        main.main()


@pytest.mark.parametrize(
    ("machines", "flags", "expected"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}], {}, {"cpu": 4, "gpu": 0.25}),
        ([{"CPU": 2.0, "GPU": 1.0}], {}, {"cpu": 1, "gpu": 0.25}),
        ([{"CPU": 8.0}], {}, {"cpu": 1, "gpu": 0}),
        ([{"CPU": 8.0}], {"cpus": 2.0}, {"cpu": 2.0, "gpu": 0}),
        (
            [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}],
            {},
            {"cpu": 2, "gpu": 0.25},
        ),
        ([{"CPU": 16.0, "GPU": 2.0}], {"gpus": 1.0}, {"cpu": 4, "gpu": 1.0}),
        ([{"CPU": 16.0, "GPU": 2.0}], {"gpus": 0.0}, {"cpu": 1, "gpu": 0.0}),
    ],
)
def test_resources_fit_the_machine(machines, flags, expected, monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes(*machines))
    assert cluster.resources(main.RESOURCES_PER_TRIAL, **flags) == expected


def nodes(*resources):
    return [{"Alive": True, "Resources": each} for each in resources] + [
        {"Alive": False, "Resources": {"CPU": 99.0}}
    ]


def test_without_an_experiment(project):
    result = project.run("predict_test.py", "--dataset_name=nothing", check=False)
    assert (
        result.returncode != 0
        and "no experiment in" in result.stderr
        and result.stderr.strip().count("\n") == 0
    )
