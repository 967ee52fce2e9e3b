"""produce_tables.py and produce_figures.py, on results made up so that the answers are known."""

import argparse
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_audio_mnist
from test_results import write_experiment, write_plan

import datasets
import produce_figures
import produce_tables
import search_spaces
import summary
from config import InputError, plain
from dmel import DMEL
from results import Experiment, Storage


@pytest.fixture
def output(monkeypatch, capsys, tmp_path):
    """Runs a script's main on the results in tmp_path, and returns what it prints."""

    def run(script, *flags):
        monkeypatch.setattr(
            sys, "argv", [script.__name__, f"--ray_results_dir={tmp_path}", *map(str, flags)]
        )
        script.main()
        return capsys.readouterr().out

    return run


def write_csv(folder, name, rows, **columns):
    """NAME.csv of rows of (initial λ, trainable, λ, accuracy, seed), and further columns."""
    names = [
        "config/init_lambd",
        "config/trainable",
        "best_lambd_est",
        "test_accuracy",
        "config/seed",
    ]
    about = {"config/model_name": "linear_net", "config/max_epochs": 1000} | columns
    (folder / name).mkdir()
    pd.DataFrame(rows, columns=names).assign(**about).to_csv(folder / name / f"{name}.csv")


def change_table(folder, name="audio_mnist", **columns):
    """Writes other values into columns of NAME.csv, config keys given without config/."""
    path = folder / name / f"{name}.csv"
    trials = pd.read_csv(path, index_col=0)
    trials.assign(**{f"config/{key}": value for key, value in columns.items()}).to_csv(path)


def test_scripts_start_without_torch_and_ray():
    code = (
        "import sys, summary, produce_tables, produce_figures;"
        "print({'torch', 'ray', 'scipy.stats'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


# Tables


def test_tables_of_the_paper(output, tmp_path):
    short, long = 8000 * 0.010 / 6, 8000 * 0.3 / 6
    trained = [
        (long, True, 400.0, 0.5, 0),
        (short, True, -53.4, 0.94, 0),
        (short, True, 46.7, 0.95, 1),
    ]
    fixed = [(short * (1 + 1e-15), False, 13.333334, 0.90, 0), (short, False, 13.333334, 0.92, 1)]
    rows = [*trained, (short, True, 47.0, 0.96, 2), *fixed]
    write_csv(
        tmp_path, "esc50", rows, **{"config/model_name": "panns_cnn6", "config/resample_rate": 8000}
    )
    tables = output(produce_tables, "--latex=original")
    assert (
        r"""
Model & $l_{\lambda_{init}}$ & $l_{\lambda_{est}}$ & Method & Accuracy \\
\hline \hline
CNN6 & 10 ms & (35, 40) ms & DMEL & $95.0 \pm 1.0$ \\
CNN6 & 10 ms & 10 ms & baseline & $91.0 \pm 1.4$ \\
\hline
CNN6 & 300 ms & (300, 300) ms & DMEL & $50.0$ \\
\hline
"""
        in tables
    )
    assert "| CNN6 | 10 ms | (35, 40) ms | DMEL | 95.0 ± 1.0 | 3 |" in tables
    assert "% audio_mnist" not in tables and "% time_frequency" not in tables  # were not run


ROWS = [(5.0, False, 5.0, 0.5, 0), (5.0, False, 5.0, 0.7, 1)]


def test_tables_keep_an_order(output, tmp_path):
    for name in ("time_frequency", "other", "esc50", "audio_mnist_run2", "other.20260101-000000"):
        write_csv(tmp_path, name, ROWS)
    tables = output(produce_tables)
    names = ["esc50", "time_frequency", "audio_mnist_run2", "other"]
    assert re.findall(r"% (\S+): ", tables) == names


def test_experiments_that_were_moved_aside_are_shown_where_they_are_named(output, tmp_path):
    write_csv(tmp_path, "other", ROWS)
    aside = Experiment(tmp_path, "other").move_aside()
    write_csv(tmp_path, "other", ROWS)
    assert re.findall(r"% (\S+): ", output(produce_tables, "--experiment", aside)) == [aside]
    assert f"{aside} − other" in output(produce_tables, "--compare", "other", aside)


def test_trials_that_differ_in_another_key_than_the_seed_have_rows_of_their_own(output, tmp_path):
    write_csv(tmp_path, "time_frequency", ROWS, **{"config/model_name": ["mlp_net", "linear_net"]})
    differing = {"config/lr_model": [0.1, 0.2], "config/split": [None, "folds"]}
    write_csv(tmp_path, "other", ROWS, **differing)
    tables = output(produce_tables, "--latex=original")
    rows = [
        r"LinearNet & 5.0 & 5.0 & baseline & $70.0$ \\",
        r"\hline",
        r"mlp\_net & 5.0 & 5.0 & baseline & $50.0$ \\",
        r"\hline",
        r"LinearNet, lr\_model=0.1, split=None & 5.0 & 5.0 & baseline & $50.0$ \\",
        r"\hline",
        r"LinearNet, lr\_model=0.2, split=folds & 5.0 & 5.0 & baseline & $70.0$ \\",
    ]
    assert re.findall(r"^\S*(?:LinearNet|mlp).*\\\\$|^\\hline$", tables, re.MULTILINE)[:7] == rows
    assert "| LinearNet, lr_model=0.2, split=folds | 5.0 | 5.0 | baseline | 70.0 | 1 |  |" in tables


def test_several_versions_of_the_scripts_are_told_in_a_line(output, tmp_path):
    write_csv(tmp_path, "esc50", ROWS, scripts="a1+b2")
    write_csv(tmp_path, "audio_mnist_run2", ROWS, scripts="a1")
    write_csv(tmp_path, "other", ROWS, scripts=["a1", "b2"])
    write_csv(tmp_path, "unknown", ROWS)
    told = re.findall(r"several versions of the scripts: (.*)", output(produce_tables))
    assert told == ["a1+b2", "a1, b2"]

    pairs = [("audio_mnist_run2", "audio_mnist_run2"), ("audio_mnist_run2", "other")]
    pairs.append(("other", "unknown"))
    flags = [word for pair in pairs for word in ("--compare", *pair)]
    comparisons = output(produce_tables, *flags).split("(95 % interval):\n")[1:]
    told = [re.findall("several versions.*: (.*)", part) for part in comparisons]
    assert told == [[], ["a1, b2"], ["a1, b2, unknown"]]


def test_trials_that_are_not_tested_are_told(output, tmp_path):
    write_experiment(tmp_path)
    write_plan(tmp_path, changed=["trial3", "trial4"])
    assert "% 2 trials are not tested: run predict_test.py" in output(produce_tables)


def test_trials_with_more_epochs_than_asked_for_are_told(output, tmp_path):
    write_experiment(tmp_path)
    write_plan(tmp_path, max_epochs=40)
    tables = output(produce_tables)
    assert "% audio_mnist: 30 trials\n" in tables
    assert "% 30 of 30 trials have more than the 40 epochs asked for" in tables


def test_without_results_tables_name_the_folder(output, tmp_path):
    with pytest.raises(InputError, match=f"there are no results in '{tmp_path}'"):
        output(produce_tables)


def claims(tables):
    """(claim, start, paper, measured, n, data, verdict) of each row on audio_mnist."""
    rows = []
    for line in tables.split("Claims of the paper")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[1].startswith("audio_mnist"):
            rows.append(cells)
    return rows


def verdicts(tables):
    return [row[-1] for row in claims(tables)]


def test_claims_are_decided_by_paired_differences(output, tmp_path):
    write_experiment(tmp_path, recordings=3000)
    tables = output(produce_tables, "--csv", tmp_path / "tables.csv")
    bounds = summary.Interval([8.0 + 0.1 * seed for seed in range(5)]).bounds()
    assert f"| LNet | 10 ms | +8.2 | 5 | {bounds} |" in tables
    other_data = "not the paper's: 3000 recordings, not 30000"
    assert claims(tables) == [
        ["1", "audio_mnist, 10 ms", "+5.6", f"+8.2 ({bounds})", "5", other_data, "holds"],
        ["1", "audio_mnist, 35 ms", "+3.1", "+0.2 (0.0 to 0.4)", "5", other_data, "holds"],
        ["2", "audio_mnist, 300 ms", "+0.0", "-0.8 (-1.0 to -0.6)", "5", other_data, "holds"],
        [
            "3",
            "audio_mnist, all starts: 200 to 1000 ms",
            "(314, 442) ms; (398, 484) ms; (516, 608) ms",
            "(120, 120) ms; (120, 120) ms; (120, 120) ms",
            "5",
            other_data,
            "does not hold",
        ],
    ]
    assert "| 1, 2, 3 | esc50 |  |  |  |  | not run |" in tables
    rows = pd.read_csv(tmp_path / "tables.csv")
    means = [70.2, 62.0, 72.2, 72.0, 66.2, 67.0]
    assert len(rows) == 6 and rows["mean"].tolist() == pytest.approx(means)
    assert rows["paper_mean"].tolist() == [94.9, 89.3, 95.0, 91.9, 95.3, 95.3]


def test_a_claim_is_open_where_its_interval_is_on_both_sides(output, tmp_path):
    write_experiment(tmp_path)
    worse = np.where(np.arange(30) % 5 == 0, -0.02, 0.0) * (np.arange(30) < 15)  # one run of DMEL
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    trials = pd.read_csv(path, index_col=0)
    trials.assign(test_accuracy=trials["test_accuracy"] + worse).to_csv(path)
    assert verdicts(output(produce_tables)) == ["holds", "undecided", "undecided", "does not hold"]


def test_cost_is_decided_by_the_interval_of_its_repetitions(output, tmp_path):
    write_experiment(tmp_path)
    assert "| 4 |  | about 0.5 |  |  |  | not run |" in output(produce_tables)
    rows = [
        {"experiment": "audio_mnist", "quotient": 0.11, "quotients": [0.1, 0.11, 0.12, 0.11, 0.1]},
        {"experiment": "esc50", "quotient": 0.5, "quotients": [0.4, 0.6, 0.5, 0.45, 0.55]},
    ]
    (tmp_path / "cost.json").write_text(json.dumps({"sections": {"cost": {"rows": rows}}}))
    tables = output(produce_tables)
    assert "| 4 | audio_mnist | about 0.5 | 0.11 (0.10 to 0.12) | 5 |  | holds |" in tables
    assert "| 4 | esc50 | about 0.5 | 0.50 (0.40 to 0.60) | 5 |  | undecided |" in tables


def test_the_papers_numbers_stand_beside_ours(output, tmp_path):
    write_experiment(tmp_path, "of_any_name")
    tables = output(produce_tables)
    row = "| LNet | 35 ms | (120, 120) ms | DMEL | 72.2 ± 1.7 | 5 | 70.0 to 74.4 |"
    assert f"{row} (398, 484) ms | 95.0 ± 0.8 |" in tables
    assert (
        r"& (398, 484) ms & $95.0 \pm 0.8$ \\" in tables and r"\begin{tabular}{llllllll}" in tables
    )

    change_table(tmp_path, "of_any_name", zero_floor=True)  # no longer the paper's experiment
    tables = output(produce_tables)
    assert f"{row}\n" in tables and r"\begin{tabular}{llllll}" in tables


def test_latex_tables_have_as_many_columns_everywhere_and_bold_face_for_the_better(
    output, tmp_path
):
    write_experiment(tmp_path)
    lines = output(produce_tables).split(r"\begin{tabular}{llllllll}")[1]
    lines = lines.split(r"\end{tabular}")[0].splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 7 and {line.count("&") for line in rows} == {7}
    bold = [line.split(" & ")[3] for line in rows if "boldmath" in line]
    assert bold == ["DMEL", "DMEL", "baseline"]  # +8.2, +0.2 (0.0 to 0.4), -0.8 (-1.0 to -0.6)

    write_experiment(tmp_path / "few", n_runs=4)
    flags = ["--ray_results_dir", tmp_path / "few"]
    assert "boldmath" not in output(produce_tables, *flags)


def test_few_runs_decide_nothing_and_cut_and_failed_trials_are_counted(output, tmp_path):
    write_experiment(tmp_path, n_runs=4, started=30, max_epochs=100, patience=70)
    tables = output(produce_tables)
    assert "% audio_mnist: 24 trials, of 30: 6 failed or are not finished" in tables
    assert "% 24 of 24 trials ended after 100 epochs, before patience ran out" in tables
    assert verdicts(tables) == ["not enough runs"] * 4


def test_experiments_are_compared_within_runs(output, tmp_path):
    write_experiment(tmp_path)
    write_experiment(tmp_path, "other", n_runs=7)  # runs 5 and 6 have no partner
    path = tmp_path / "other" / "other.csv"
    trials = pd.read_csv(path, index_col=0)
    trials["test_accuracy"] += 0.02 * trials["config/trainable"]
    trials["config/init_lambd"] *= np.where(trials["config/init_lambd"] > 300, 1.1, 1 + 1e-6)
    trials.to_csv(path)
    tables = output(
        produce_tables, "--compare", "audio_mnist", "other", "--compare", "other", "audio_mnist"
    )
    table = (
        tables.split("other − audio_mnist (95 % interval):\n\n")[1]
        .split("\n\n")[0]
        .splitlines()[2:]
    )
    assert table == [
        "| LNet | DMEL | 10 ms | +2.0 (2.0 to 2.0) | 5 | (120, 120) ms | (120, 120) ms |",
        "| LNet | baseline | 10 ms | +0.0 (0.0 to 0.0) | 5 | 10 ms | 10 ms |",
        "| LNet | DMEL | 35 ms | +2.0 (2.0 to 2.0) | 5 | (120, 120) ms | (120, 120) ms |",
        "| LNet | baseline | 35 ms | +0.0 (0.0 to 0.0) | 5 | 35 ms | 35 ms |",
        "| LNet | DMEL | 330 ms | none to compare | 0 |  |  |",
        "| LNet | baseline | 330 ms | none to compare | 0 |  |  |",
    ]
    assert "audio_mnist − other (95 % interval):" in tables
    with pytest.raises(InputError, match="no results of 'esc50', but of audio_mnist, other"):
        output(produce_tables, "--compare", "audio_mnist", "esc50")


def test_comparisons_match_every_key_that_varies_within_one_of_the_two(output, tmp_path):
    """A key that is the same within each of them, such as the model, may differ between them."""
    write_csv(tmp_path, "first", ROWS, **{"config/model_name": "mlp_net"})
    rows = [(5.0, False, 5.0, 0.6, 0), (5.0, False, 5.0, 0.9, 0)]
    write_csv(tmp_path, "second", rows, **{"config/lr_tf": [1.0, 0.5], "config/zero_floor": True})
    change_table(tmp_path, "first", lr_tf=1.0)
    tables = output(produce_tables, "--compare", "first", "second")
    assert "| LinearNet, lr_tf=1 | baseline | 5.0 | +10.0 | 1 | 5.0 | 5.0 |" in tables
    assert "| LinearNet, lr_tf=0.5 | baseline | 5.0 | none to compare | 0 |  |  |" in tables


def test_comparisons_match_models_that_vary(output, tmp_path):
    for name in ("first", "second"):
        rows = [(5.0, False, 5.0, 0.9, 0), (5.0, False, 5.0, 0.5, 0)]
        write_csv(tmp_path, name, rows, **{"config/model_name": ["linear_net", "mlp_net"]})
    tables = output(produce_tables, "--compare", "first", "second")
    for model in ("LinearNet", "mlp_net"):
        assert f"| {model} | baseline | 5.0 | +0.0 | 1 | 5.0 | 5.0 |" in tables


def test_claims_are_of_the_papers_experiments_where_nothing_else_varies(output, tmp_path):
    write_experiment(tmp_path, "other")
    assert "Claims of the paper" not in output(produce_tables)
    write_experiment(tmp_path)
    assert "Claims of the paper" in output(produce_tables)
    change_table(tmp_path, lr_tf=[0.5] * 15 + [1.0] * 15)
    assert "Claims of the paper" not in output(produce_tables)


def test_what_was_computed_in_bfloat16_is_told(output, tmp_path):
    """Its tables have the paper's numbers, and its claims stand in for those in float32."""
    write_experiment(tmp_path, "audio_mnist_bfloat16", patience=51, bf16=True, recordings=30000)
    tables = output(produce_tables)
    assert "% computed in bfloat16\n" in tables
    assert "| (314, 442) ms | 94.9 ± 1.0 |" in tables
    assert {row[1].split(",")[0] for row in claims(tables)} == {"audio_mnist_bfloat16"}
    assert {row[5] for row in claims(tables)} == {
        "30000 recordings, as many as in the paper; 100 epochs; bfloat16"
    }
    change_table(tmp_path, "audio_mnist_bfloat16", bf16=False)  # of that name alone
    assert "Claims of the paper" not in output(produce_tables)
    change_table(tmp_path, "audio_mnist_bfloat16", bf16=True)

    write_experiment(tmp_path)
    tables = output(produce_tables)
    assert tables.count("% computed in bfloat16\n") == 1
    assert {row[1].split(",")[0] for row in claims(tables)} == {"audio_mnist"}
    assert {row[5] for row in claims(tables)} == {"not recorded"}


def test_claims_are_of_the_papers_data_layer_and_network(output, tmp_path):
    write_experiment(tmp_path)
    changes = ({"n_mels": 16}, {"normalize_window": True}, {"split": "folds"})
    two_models = {"model_name": ["mel_linear_net", "mel_mlp_net"] * 15}
    for changed in (*changes, {"optimized": False}, two_models):
        change_table(tmp_path, **changed)
        tables = output(produce_tables)
        assert "Claims of the paper" not in tables and "paper: est" not in tables
        change_table(tmp_path, n_mels=64, normalize_window=False, split="speakers")
        change_table(tmp_path, optimized=True, model_name="mel_linear_net")
    change_table(tmp_path, lr_model=1e-3, optimizer_name="sgd")
    assert "Claims of the paper" in output(produce_tables)


def test_where_lambda_goes_is_claimed_of_all_starts(output, tmp_path):
    write_experiment(tmp_path)
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    trials = pd.read_csv(path, index_col=0)
    epochs = pd.read_csv(path.with_name("epochs.csv"))
    trials["best_lambd_est"] = np.where(trials["config/trainable"], 400, 46)
    trials.to_csv(path)
    assert verdicts(output(produce_tables))[-1] == "holds"

    for starts, verdict in (([13, 47], "not all starts"), ([], "not run")):
        is_left = trials["config/init_lambd"].round().isin(starts) | ~trials["config/trainable"]
        trials[is_left].to_csv(path)
        is_left = epochs["trial"].isin(trials.index[is_left])
        epochs[is_left].to_csv(path.with_name("epochs.csv"), index=False)
        assert verdicts(output(produce_tables))[-1] == verdict


def test_empty_numbers_are_a_value_of_their_own():
    merged = summary.merged(pd.Series([32.0, np.nan, 64, 64 * (1 + 1e-9)]))
    assert merged.fillna(-1).tolist() == [32, -1, 64, 64]
    trial = pd.Series({f"config/{key}": value for key, value in CONFIG.items()})
    spoken = {"n_mels": 64.0, "n_points": 8000.0, "resample_rate": 8000.0, "init_lambd": 13.0}
    names = {"model_name": "mel_linear_net", "dataset_name": "audio_mnist", "trainable": True}
    for key, value in (spoken | names | {"max_epochs": 1}).items():
        trial[f"config/{key}"] = value
    assert produce_figures.config_of(trial).n_mels == 64


def test_a_damaged_experiment_does_not_matter_where_others_are_named(output, tmp_path):
    write_experiment(tmp_path)
    write_experiment(tmp_path, "other")
    (tmp_path / "other" / "experiment.json").write_text("{")
    assert "% audio_mnist: " in output(produce_tables, "--experiment", "audio_mnist")
    flags = ["--output_dir", tmp_path / "figures", "--figures", "accuracy"]
    output(produce_figures, *flags, "--experiment", "audio_mnist")
    for command in ([produce_tables], [produce_figures, *flags]):
        with pytest.raises(InputError, match=r"other/experiment.* main\.py --name=other --restart"):
            output(*command)
    with pytest.raises(InputError, match=r"other/experiment\.json cannot be used"):
        output(produce_tables, "--experiment", "audio_mnist", "other")


def test_a_window_that_ran_away_is_shown(output, tmp_path):
    """In float32, where the loss stayed finite."""
    write_experiment(tmp_path)
    path = tmp_path / "audio_mnist" / "audio_mnist.csv"
    trials = pd.read_csv(path, index_col=0)
    trials.loc[0, "best_lambd_est"] = -4.9e32
    trials.to_csv(path)
    assert re.search(r"\(120, \d{30,}\) ms \| DMEL", output(produce_tables))


def test_a_csv_of_tables_is_a_file(output, tmp_path):
    write_experiment(tmp_path)
    with pytest.raises(InputError, match=r"--csv=s3://bucket/tables.csv: name a file"):
        output(produce_tables, "--csv=s3://bucket/tables.csv")


def test_damaged_costs_and_rates_are_named(output, tmp_path):
    write_experiment(tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps({"sections": {"epoch": {}}}))
    assert "| 4 |  | about 0.5 |  |  |  | not run |" in output(produce_tables)
    for content in ("{", '{"sections": {"cost": {"rows": [{"experiment": "a"}]}}}'):
        (tmp_path / "cost.json").write_text(content)
        message = r"cost\.json cannot be used .* python -m benchmarks cost --output=.*cost\.json\.$"
        with pytest.raises(InputError, match=message):
            output(produce_tables)
    (tmp_path / "cost.json").unlink()
    (tmp_path / "convergence_rate").mkdir()
    for content in ("", "rate,init\n30,1\n"):
        (tmp_path / "convergence_rate" / "iterations.csv").write_text(content)
        message = r"iterations\.csv cannot .* with convergence_rate\.py\.$"
        with pytest.raises(InputError, match=message):
            output(produce_tables)


# Figures


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "cache"))
    return write_audio_mnist(
        tmp_path / "data" / "audio_mnist", speakers=("28", "12", "26", "30")
    ).parent


CONFIG = {  # what write_experiment leaves out
    **{
        "n_mels": 64,
        "hop_length": 80,
        "energy_normalize": True,
        "optimized": True,
        "normalize_window": True,
    },
    **{
        "optimizer_name": "adam",
        "lr_model": 1e-4,
        "lr_tf": 1.0,
        "batch_size": 64,
        "patience": 100,
        "device": "cpu",
    },
    **{
        "continuous": True,
        "checkpoint_path": np.nan,
        "noise_std": np.nan,
        "sigma_ref": np.nan,
        "split": "speakers",
    },
}


def read(folder):
    return {
        name: results
        for name, results in summary.read_all(Storage(folder)).items()
        if len(results.trials)
    }


def flags_of(experiment, **others):
    return argparse.Namespace(experiment=experiment, **others)


def test_figures_are_drawn_or_said_to_be_skipped(output, tmp_path, recordings):
    write_experiment(tmp_path)
    change_table(tmp_path, **CONFIG)
    flags = ["--output_dir", tmp_path / "figures", "--data_base_dir"]
    told = output(produce_figures, *flags, tmp_path)
    names = [
        f"{name}.{suffix}"
        for name in ("accuracy", "convergence", "time_complexity")
        for suffix in ("pdf", "png")
    ]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == names
    assert all(path.stat().st_size > 10000 for path in (tmp_path / "figures").iterdir())
    assert "data_example: skipped: there are no results of time_frequency" in told
    for name in ("dmel", "before_after"):
        assert f"{name}: skipped: audio_mnist: no recordings in" in told
    for clip in (-1, 2):
        with pytest.raises(InputError, match=f"--clip={clip}: the test split has clips 0 to 1"):
            output(produce_figures, *flags, recordings, "--figures", "dmel", f"--clip={clip}")
    with pytest.raises(
        InputError, match="--experiment: there are no results of 'x', but of audio_mnist"
    ):
        output(
            produce_figures,
            *flags,
            recordings,
            "--figures",
            "accuracy",
            "--experiment",
            "audio_mnist",
            "x",
        )
    for split in ("{'train': [28], 'va", "{'train': x}", "{[]: 1}", "{28}", "3", "other"):
        change_table(tmp_path, split=split)
        with pytest.raises(InputError, match="config: split"):
            output(produce_figures, *flags, recordings, "--figures", "before_after")


@pytest.mark.parametrize(
    "changed", [{}, {"continuous": False, "normalize_window": False, "energy_normalize": False}]
)
def test_pictures_are_what_the_network_sees(tmp_path, recordings, changed):
    """Of the clip of the trial's own split, with all settings of its layer, at the λ that the title
    tells.
    """
    config = CONFIG | {"split": "{'train': [28], 'valid': [30], 'test': [12, 26]}"} | changed
    write_experiment(tmp_path, n_runs=1)
    change_table(tmp_path, **config)
    flags = flags_of(None, data_base_dir=recordings, clip=3)
    figure = produce_figures.before_after(read(tmp_path), flags)
    shown = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}
    trial = read(tmp_path)["audio_mnist"].trials.iloc[0]
    clips = datasets.recordings_of(produce_figures.config_of(trial), recordings).clips
    groups = np.repeat([12, 26, 28, 30], 2)  # of the recordings, in the order of their names
    settings = {
        key: config[key]
        for key in ("n_mels", "hop_length", "normalize_window", "continuous", "optimized")
    }
    for title, seconds in (("before training: 35 ms", 0.035), ("after training: 120 ms", 0.120)):
        layer = DMEL(
            8000, init_lambd=8000 * seconds / 6, log=config["energy_normalize"], **settings
        )
        expected = layer(torch.from_numpy(clips[groups == 26][1])).detach()
        np.testing.assert_allclose(shown[title], expected, rtol=1e-5, atol=1e-8)
    table = pd.read_csv(tmp_path / "audio_mnist" / "audio_mnist.csv")
    change_table(tmp_path, n_mels=np.where(table["config/init_lambd"] < 20, 32, 64))
    figure = produce_figures.before_after(read(tmp_path), flags)  # of the first network alone
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["before training: 10 ms", "after training: 120 ms"]
    change_table(tmp_path, n_mels=64)
    titles = [axis.get_title() for axis in produce_figures.dmel(read(tmp_path), flags).axes]
    assert titles == ["waveform", "10 ms", "120 ms, trained", "300 ms"]


def test_curves_show_the_experiments_that_have_them(output, tmp_path):
    """Means with their intervals where both halves are there, |λ| in ms of every trained run."""
    for name in ("audio_mnist", "audio_mnist_zero_floor"):
        write_experiment(tmp_path, name)
    path = tmp_path / "audio_mnist_zero_floor" / "audio_mnist_zero_floor.csv"
    trials, epochs = pd.read_csv(path, index_col=0), pd.read_csv(path.with_name("epochs.csv"))
    trials[trials["config/trainable"]].to_csv(path)
    epochs[epochs["trial"] < 15].to_csv(path.with_name("epochs.csv"), index=False)
    experiments = read(tmp_path)
    [axis] = produce_figures.accuracy(experiments, None).axes
    assert axis.get_title() == "audio_mnist, n = 5"
    bars = axis.containers[0][2][0].get_segments()[0]  # from 10 ms: the interval of 68 to 72.4 %
    values = summary.Interval([68.0, 69.1, 70.2, 71.3, 72.4])
    assert bars[:, 1] == pytest.approx([values.low, values.high])
    of_one = experiments["audio_mnist"].trials
    of_one = of_one.assign(model=np.where(of_one["config/trainable"], "one", "other"))
    halves = {"halves": experiments["audio_mnist"]._replace(trials=of_one)}  # the others failed
    [axis] = produce_figures.accuracy(halves, None).axes
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["one, DMEL", "other, baseline"]
    axes = produce_figures.convergence(experiments, None).axes
    assert [axis.get_title() for axis in axes] == ["audio_mnist", "audio_mnist_zero_floor"]
    assert axes[0].lines[0].get_ydata()[[0, -1]] == pytest.approx([10, 120])
    flags = ["--output_dir", tmp_path / "figures", "--figures", "accuracy", "--experiment"]
    assert output(produce_figures, *flags, "audio_mnist_zero_floor", "audio_mnist").startswith(
        "accuracy: "
    )
    with pytest.raises(InputError, match=r"^there are no results\.$"):
        output(produce_figures, *flags, "audio_mnist_zero_floor")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no results of 'x', but of none\.$"):
        output(produce_figures, "--ray_results_dir", tmp_path / "empty", "--experiment", "x")
    with pytest.raises(
        InputError, match="no experiment shown here has a window trained on recordings"
    ):
        produce_figures.dmel(
            {"audio_mnist": experiments["audio_mnist"]._replace(in_samples=True)}, flags_of(None)
        )


def test_examples_of_the_pulses_are_drawn(output, tmp_path):
    write_experiment(tmp_path, "time_frequency")
    own = ("init_lambd", "trainable", "seed")  # of each trial
    space = plain(search_spaces.time_frequency(1))
    changes = {key: value for key, value in space.items() if key not in own}
    change_table(tmp_path, "time_frequency", **changes)
    flags = ["--output_dir", tmp_path / "figures", "--figures", "data_example"]
    assert "skipped" not in output(produce_figures, *flags)
    assert (tmp_path / "figures" / "data_example.png").stat().st_size > 10000


def test_measured_costs_are_drawn_by_the_number_of_windows(tmp_path):
    """A tenth of a search over ten windows is as much as one window."""
    rows = [{"experiment": "esc50", "quotient": 0.1, "quotients": [0.1, 0.1, 0.1]}]
    (tmp_path / "cost.json").write_text(json.dumps({"sections": {"cost": {"rows": rows}}}))
    flags = flags_of(None, ray_results_dir=tmp_path)
    drawn = produce_figures.time_complexity({}, flags).axes[2].lines[0]
    assert drawn.get_label() == "esc50"
    ratio_by_windows = dict(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True))
    assert ratio_by_windows[1] == pytest.approx(1.0)
    assert ratio_by_windows[10] == pytest.approx(0.1)


def test_cost_model_of_the_paper():
    # By hand for one fixed window of 160 samples and 15 steps from 20 ms: the network's cost, then
    # the spectrogram's.
    assert produce_figures.cost_ratio(0.020, 1, 0.0) == pytest.approx(
        (128 * 40000 / 80) / (2 * 128 * 40000 / 160)
    )
    walked = np.linspace(160, 280, 15)
    expected = (40000 / 80 * walked * np.log(walked)).sum() / (15 * 40000 * np.log(160))
    assert produce_figures.cost_ratio(0.020, 1, 1.0) == pytest.approx(expected)
    assert (
        produce_figures.cost_ratio(0.300, 59, 0.9999)
        < 1
        < produce_figures.cost_ratio(0.300, 1, 0.9999)
    )
