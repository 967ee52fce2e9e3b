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

# Of the original software's table.
REPORTED = {"loss", "valid_loss", "valid_acc", "lambd_est", "energy", "training_iteration"}
BEST = {"best_valid_acc", "best_valid_loss", "best_lambd_est"}
OTHERS = {"logdir", "trial_id", "test_accuracy", "config/trainable", "config/init_lambd"}


def train_tiny(project, *flags, **options):
    return project.run("main.py", "--name=tiny", "--max_epochs=2", *flags, **options)


def read_table(project, name="tiny"):
    return pd.read_csv(project.folder / "ray_results" / name / f"{name}.csv", index_col=0)


def test_grid_is_trained_tested_and_tabulated(project, tmp_path):
    output = train_tiny(project, HOME=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []  # no token of Ray's in the home
    assert "No CUDA device: training on the CPU" in output
    last_table = output.strip().split("\n\n")[-2]
    header, *rows = last_table.splitlines()[:5]
    columns = ["trial", "epoch", "loss", "valid_loss", "valid_acc", "lambd_est"]
    assert header.split() == [*cluster.PARAMETERS, *columns]
    assert [row.split()[3:5] for row in rows] == [["finished", "2"]] * 4

    flags = ["--ray_results_dir=ray_results", "--data_base_dir=data", "--dataset_name=tiny"]
    project.run("predict_test.py", *flags, "--keep=results")
    trials = read_table(project)
    keys = {f"config/{key}" for key in search_spaces.time_frequency(2)}
    assert set(trials) >= REPORTED | BEST | OTHERS | keys
    assert len(trials) == 4
    assert trials["test_accuracy"].between(0.2, 1).all()
    assert set(trials["config/seed"]) == {0} and set(trials["training_iteration"]) == {2}
    for folder, loss in zip(trials["logdir"], trials["loss"], strict=True):  # for TensorBoard
        assert any(name.startswith("events.out.tfevents") for name in os.listdir(folder))
        assert pd.read_csv(os.path.join(folder, "progress.csv"))["loss"].tolist()[-1] == loss

    epochs = pd.read_csv(project.folder / "ray_results" / "tiny" / "epochs.csv")
    assert epochs["epoch"].tolist() == [1, 2] * 4
    assert epochs["trial"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    last = epochs.groupby("trial")["lambd"].last()
    assert last.tolist() == pytest.approx(trials["lambd_est"].tolist(), rel=1e-4)

    tables = project.run("produce_tables.py").stdout
    assert "% esc50" not in tables and "% tiny: 4 trials" in tables
    rows = re.findall(r"LinearNet & ([\d.]+) & .* & (DSPEC|baseline) & \$([\d.]+)\$", tables)
    assert [start for start, _, _ in rows] == ["1.3", "1.3", "31.9", "31.9"]
    assert [method for _, method, _ in rows] == ["DSPEC", "baseline"] * 2
    order = ["config/init_lambd", "config/trainable"]
    in_order = trials.sort_values(order, ascending=[True, False])
    expected = (100 * in_order["test_accuracy"]).tolist()
    assert [float(percent) for _, _, percent in rows] == pytest.approx(expected, abs=0.051)

    # Tables and figures follow from what is kept, and nothing there tells of this machine.
    folder = project.folder / "results" / "tiny"
    kept = b"".join(path.read_bytes() for path in files_in(folder))
    assert str(project.folder).encode() not in kept
    assert b"main.py --name=tiny --max_epochs=2" in kept
    assert len(list((folder / "trials").iterdir())) == 2
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
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.slow
def test_runs_are_added_and_nothing_of_a_results_folder_runs(project):
    """A pickle is planted in every file: all scripts say a sentence, and a start trains anew."""
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
        assert result.stderr.startswith(f"{script}: {folder.parent}")
        assert result.stderr.strip().count("\n") == 0

    (folder / "experiment.json").write_text(plan)
    result = project.run("predict_test.py", "--dataset_name=tiny", check=False)
    assert result.stderr.count("is damaged") == 4
    assert "no finished trial" in result.stderr.splitlines()[-1]

    result = train_tiny(project, "--num_samples=2")
    assert result.stderr.count("main.py trains it anew") == 4
    assert "all trials are finished" in result.stdout
    table = result.stdout.split("\n\n")[-2]
    assert table.count(" 0 finished ") == table.count(" 1 finished ") == 4  # seeds

    project.run("predict_test.py", "--dataset_name=tiny")
    cells = read_table(project).groupby(["config/init_lambd", "config/trainable"])
    assert cells["config/seed"].apply(sorted).tolist() == [[0, 1]] * 4

    starts = json.loads((folder / "experiment.json").read_text())["starts"]
    assert [batch["seeds"] for batch in starts] == [[0], [1]]
    for batch in starts:
        assert batch["command"].startswith("python main.py --name=tiny")
        assert batch["versions"]["torch"].startswith("2.11.0")
        assert batch["hardware"]["cpu_cores"] == os.cpu_count()
        assert batch["git_commit"]
        assert batch["n_trials"] == 4


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
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield f"s3://lab/results?{options}", keys
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

    from_bucket = f"--ray_results_dir={uri}"
    project.run("predict_test.py", f"--dataset_name={name}", from_bucket, "--keep=kept", **keys)
    trials = pd.read_csv(project.folder / "kept" / name / f"{name}.csv", index_col=0)
    assert len(trials) == 4
    assert trials["config/init_lambd"].nunique() == 2  # one for each run
    assert trials["config/init_lambd"].between(1, 30).all()
    assert set(trials["config/lr_model"]) <= {1e-3, 1e-2}
    tables = project.run("produce_tables.py", from_bucket, **keys).stdout
    assert f"% {name}: 4 trials" in tables

    restarted = project.run("main.py", *flags, "--restart", "--num_samples=1", **keys).stdout
    aside = re.search(r"what was there is now (\S+)", restarted)[1]
    tables = project.run("produce_tables.py", from_bucket, **keys).stdout
    assert aside not in tables and "trials are not tested: run predict_test.py" in tables
    moved = project.run("produce_tables.py", from_bucket, "--experiment", aside, **keys).stdout
    assert f"% {aside}: 4 trials" in moved


WRONG = [
    ("--name=esc51", r"esc51 contains none .*: audio_mnist, .*esc50, .*time_frequency"),
    ("--name=esc50 --max_epochs=0", r"--max_epochs=0 must be 1 or more"),
    ("--name=esc50 --num_samples=0", r"--num_samples=0 must be 1 or more"),
    ("--name=esc50 --save_seconds=-1", r"--save_seconds=-1 must be 0 or more"),
    ("--name=esc50 --cpus_per_trial=0", r"--cpus_per_trial=0 must be more than 0"),
    ("--name=esc50 --data_dir=nowhere", r"no recordings in 'nowhere.*download_data"),
    (
        "--name=time_frequency --ray_root_dir=file",
        r"cannot lock \S+/file/\S+ \(File exists\): set RAY",
    ),
    ("--name=time_frequency --ray_root_dir=s9://x", r"cannot use 's9://x' for results"),
    ("--name=../time_frequency", r"'../time_frequency' cannot be the name of an experiment"),
    ("--name=time_frequency --cpus_per_trial=999", r"has 999 CPUs and 0 GPUs .* 2 CPUs"),
    ("--name=time_frequency --gpus_per_trial=0.25", r"has 4 CPUs and 0.25 GPUs .*--gpus"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments.split()])
    monkeypatch.setattr(cluster.ray, "init", lambda **options: None)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes({"CPU": 2.0}))
    monkeypatch.setattr(cluster.signal, "signal", lambda *_: None)
    with pytest.raises((InputError, OSError), match=rf"^[^\n]*{message}[^\n]*$"):
        main.main()


SEVERAL = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("machines", "flags", "expected"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}], {}, {"cpu": 4, "gpu": 0.25}),
        ([{"CPU": 2.0, "GPU": 1.0}], {}, {"cpu": 1, "gpu": 0.25}),
        ([{"CPU": 8.0}], {}, {"cpu": 1, "gpu": 0}),
        ([{"CPU": 8.0}], {"cpus": 2.0}, {"cpu": 2.0, "gpu": 0}),
        (SEVERAL, {}, {"cpu": 2, "gpu": 0.25}),
        ([{"CPU": 16.0, "GPU": 2.0}], {"gpus": 1.0}, {"cpu": 4, "gpu": 1.0}),
        ([{"CPU": 16.0, "GPU": 2.0}], {"gpus": 0.0}, {"cpu": 1, "gpu": 0.0}),
    ],
)
def test_resources_fit_the_machine(machines, flags, expected, monkeypatch):
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes(*machines))
    assert cluster.resources(main.RESOURCES_PER_TRIAL, **flags) == expected


def nodes(*resources):
    alive = [{"Alive": True, "Resources": each} for each in resources]
    return [*alive, {"Alive": False, "Resources": {"CPU": 99.0}}]


def test_without_an_experiment(project):
    result = project.run("predict_test.py", "--dataset_name=nothing", check=False)
    assert result.returncode != 0
    assert "no experiment in" in result.stderr
    assert result.stderr.strip().count("\n") == 0
