"""produce_tables.py and produce_figures.py, on results made up so that the answers are known."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_audio_mnist
from test_results import write_experiment

import datasets
import produce_figures
import produce_tables
import summary
from config import InputError
from dmel import DMEL
from storage import Storage


@pytest.fixture
def output(monkeypatch, capsys):
    """Runs a script's main with flags, and returns what it prints."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()
        return capsys.readouterr().out

    return run


def write_csv(folder, name, rows, resample_rate=8000, model="panns_cnn6"):
    columns = ["config/init_lambd", "config/trainable", "best_lambd_est", "test_accuracy", "config/seed"]
    trials = pd.DataFrame(rows, columns=columns).assign(**{"config/model_name": model})
    if resample_rate:
        trials["config/resample_rate"] = resample_rate
    (folder / name).mkdir()
    trials.to_csv(folder / name / f"{name}.csv")


def change_table(folder, name="audio_mnist", **columns):
    """Writes other values into columns of NAME.csv, config keys given without config/."""
    path = folder / name / f"{name}.csv"
    trials = pd.read_csv(path, index_col=0)
    trials.assign(**{f"config/{key}": value for key, value in columns.items()}).to_csv(path)


def test_scripts_start_without_torch_and_ray():
    slow = "{'torch', 'ray', 'matplotlib', 'scipy.stats'} & set(sys.modules)"
    code = f"import sys, summary, produce_tables, produce_figures, predict_test; print({slow})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# Tables


def test_tables_of_the_paper(output, tmp_path):
    short, long = 8000 * 0.010 / 6, 8000 * 0.3 / 6
    write_csv(
        tmp_path,
        "esc50",
        [
            (long, True, 400.0, 0.5, 0),
            (short, True, -53.4, 0.94, 0),
            (short, True, 46.7, 0.95, 1),
            (short, True, 47.0, 0.96, 2),
            (short * (1 + 1e-15), False, 13.333334, 0.90, 0),
            (short, False, 13.333334, 0.92, 1),
        ],
    )
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
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
    assert "% audio_mnist: no results yet" in tables and "% time_frequency: no results yet" in tables


def test_models_have_rows_of_their_own(output, tmp_path):
    rows = [(5.0, False, 5.0, 0.5, 0)]
    write_csv(tmp_path, "time_frequency", rows, None, "linear_net")
    path = tmp_path / "time_frequency" / "time_frequency.csv"
    trials = pd.read_csv(path, index_col=0)
    pd.concat([trials, trials.assign(**{"config/model_name": "mlp_net"})], ignore_index=True).to_csv(path)
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
    rows = [rf"{model} & 5.0 & 5.0 & baseline & $50.0$ \\" for model in ("LinearNet", "mlp_net")]
    assert f"{rows[0]}\n\\hline\n{rows[1]}\n\\hline\n" in tables


def test_tables_follow_the_paper_s_order(output, tmp_path):
    for name in ("time_frequency", "audio_mnist_run2", "other", "esc50"):
        write_csv(tmp_path, name, [(5.0, False, 5.0, 0.5, 0)], None, "linear_net")
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
    assert re.findall(r"% (\w+):", tables) == ["esc50", "audio_mnist", "time_frequency", "audio_mnist_run2", "other"]


def test_tables_say_what_they_average_over(output, tmp_path):
    write_csv(tmp_path, "esc50", [(5.0, False, 5.0, 0.5, 0), (5.0, False, 5.0, 0.7, 0)])
    change_table(tmp_path, "esc50", lr_model=[0.1, 0.2])
    assert "averaged over lr_model: [0.1, 0.2]" in output(produce_tables, f"--ray_results_dir={tmp_path}")


@pytest.mark.parametrize(
    ("scripts", "told"), [(["a1", "a1"], None), (["a1", "b2"], "a1, b2"), (["a1+b2"] * 2, "a1+b2"), ([None] * 2, None)]
)
def test_tables_tell_where_the_scripts_were_edited(output, tmp_path, scripts, told):
    write_csv(tmp_path, "esc50", [(5.0, False, 5.0, 0.5, 0), (5.0, False, 5.0, 0.7, 1)])
    path = tmp_path / "esc50" / "esc50.csv"
    pd.read_csv(path, index_col=0).assign(scripts=scripts).to_csv(path)
    note = re.search(
        r"% trained by several versions of the scripts: (.*)", output(produce_tables, "--ray_results_dir", tmp_path)
    )
    assert (note and note[1]) == told


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", None])
def test_tables_without_results(output, tmp_path, content):
    folder = tmp_path / "results"
    if content is not None:
        (folder / "esc50").mkdir(parents=True)
        (folder / "esc50" / "esc50.csv").write_text(content)
    with pytest.raises(InputError, match=re.escape(str(folder))) as error:
        output(produce_tables, f"--ray_results_dir={folder}")
    assert "\n" not in str(error.value)


def test_claims_are_decided_by_paired_differences(output, tmp_path):
    write_experiment(tmp_path)
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}", "--csv", tmp_path / "tables.csv")
    low, high = summary.interval([8.0 + 0.1 * seed for seed in range(5)])[3:]
    assert f"| LNet | 10 ms | +8.2 | 5 | {low:.1f} to {high:.1f} |" in tables
    claims = [line for line in tables.splitlines() if line.startswith("| audio_mnist")]
    assert [line.split(" | ")[-1] for line in claims] == ["holds |", "holds |", "does not hold |", "holds |"]
    assert "from the best window, 35 ms" in claims[1]
    assert "as much as 3.0 (3.0 to 3.0)" in claims[3]
    rows = pd.read_csv(tmp_path / "tables.csv")
    assert len(rows) == 6 and rows["mean"].tolist() == pytest.approx([70.2, 62.0, 72.2, 72.0, 66.2, 67.0])


def test_trials_that_max_epochs_ended_are_told(output, tmp_path):
    write_experiment(tmp_path, max_epochs=100)
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
    assert "% 30 of 30 trials ended at max_epochs = 100, before patience ran out" in tables


def test_a_claim_is_open_where_its_interval_is_on_both_sides(output, tmp_path):
    write_experiment(tmp_path, spread=0.01)  # 300 ms: -1 to 3 points
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
    claims = [line for line in tables.splitlines() if line.startswith("| audio_mnist")]
    assert [line.split(" | ")[-1] for line in claims] == ["holds |", "holds |", "not enough runs |", "holds |"]


def test_few_runs_decide_nothing_and_failed_trials_are_counted(output, tmp_path):
    write_experiment(tmp_path, n_runs=4, started=30)
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}")
    assert "% audio_mnist: 24 trials, of 30: the others failed or are not finished" in tables
    assert tables.count("not enough runs") == 4 and "holds" not in tables


def test_experiments_are_compared_within_runs(output, tmp_path):
    write_experiment(tmp_path)
    write_experiment(tmp_path, "other", n_runs=7)  # runs 5 and 6 have no partner
    path = tmp_path / "other" / "other.csv"
    trials = pd.read_csv(path, index_col=0)
    trials["test_accuracy"] += 0.02 * trials["config/trainable"]
    trials["config/init_lambd"] *= np.where(trials["config/init_lambd"] > 300, 1.1, 1 + 1e-6)
    trials.to_csv(path)
    tables = output(produce_tables, f"--ray_results_dir={tmp_path}", "--compare", "audio_mnist", "other")
    table = tables.split("other − audio_mnist (95 % interval):\n\n")[1].split("\n\n")[0].splitlines()[2:]
    assert table == [
        "| DMEL | 10 ms | +2.0 (2.0 to 2.0), n = 5 | +0.0 (0.0 to 0.0), n = 5 |",
        "| baseline | 10 ms | +0.0 (0.0 to 0.0), n = 5 | none to compare |",
        "| DMEL | 35 ms | +2.0 (2.0 to 2.0), n = 5 | +0.0 (0.0 to 0.0), n = 5 |",
        "| baseline | 35 ms | +0.0 (0.0 to 0.0), n = 5 | none to compare |",
        "| DMEL | 330 ms | none to compare | none to compare |",
        "| baseline | 330 ms | none to compare | none to compare |",
    ]
    assert " − audio_mnist" not in output(produce_tables, f"--ray_results_dir={tmp_path}")
    pairs = ("--compare", "audio_mnist", "other", "--compare", "other", "audio_mnist")
    assert output(produce_tables, f"--ray_results_dir={tmp_path}", *pairs).count("(95 % interval):") == 2
    with pytest.raises(InputError, match="no results of 'esc50', but of audio_mnist, other"):
        output(produce_tables, f"--ray_results_dir={tmp_path}", "--compare", "audio_mnist", "esc50")


# Figures


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    monkeypatch.setenv("DMEL_CACHE_DIR", str(tmp_path / "cache"))
    write_audio_mnist(tmp_path / "data" / "audio_mnist", speakers=("28", "12", "26", "30"))
    return tmp_path / "data"


CONFIG = {  # what write_experiment leaves out
    **{"n_mels": 64, "hop_length": 80, "energy_normalize": True, "optimized": True, "normalize_window": True},
    **{"optimizer_name": "adam", "lr_model": 1e-4, "lr_tf": 1.0, "batch_size": 64, "patience": 100, "device": "cpu"},
    **{"continuous": True, "checkpoint_path": np.nan, "noise_std": np.nan},
}


def test_figures_are_drawn_or_said_to_be_skipped(output, tmp_path):
    write_experiment(tmp_path / "results")
    change_table(tmp_path / "results", **CONFIG)
    flags = ["--ray_results_dir", tmp_path / "results", "--data_base_dir", tmp_path]
    told = output(produce_figures, *flags, "--output_dir", tmp_path / "figures")
    drawn = ("accuracy", "convergence", "time_complexity")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")
    }
    assert "data_example: skipped: there are no results of time_frequency" in told
    for name in ("dmel", "before_after"):
        assert f"{name}: skipped: audio_mnist: no recordings in" in told
    for path in (tmp_path / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10000


def test_an_unknown_figure_or_clip_is_told(output, tmp_path, recordings, capsys):
    with pytest.raises(SystemExit, match="2"):
        output(produce_figures, "--figures", "nothing")
    assert "invalid choice" in capsys.readouterr().err
    write_experiment(tmp_path)
    change_table(tmp_path, **CONFIG)
    flags = ["--ray_results_dir", tmp_path, "--data_base_dir", recordings, "--output_dir", tmp_path / "figures"]
    with pytest.raises(InputError, match="--clip=2: the test split has clips 0 to 1"):
        output(produce_figures, *flags, "--figures", "dmel", "--clip=2")
    told = output(produce_figures, *flags, "--figures", "dmel", "--experiment=x")
    assert told == "dmel: skipped: there are no results of x with a window trained on recordings\n"


@pytest.mark.parametrize("changed", [{}, {"continuous": False, "normalize_window": False}, {"energy_normalize": False}])
def test_pictures_are_what_the_network_sees(tmp_path, recordings, changed):
    """Of the clip of the trial's own split, with all settings of its layer, at the λ that the title tells."""
    config = CONFIG | {"split": "{'train': [28], 'valid': [30], 'test': [12, 26]}"} | changed
    write_experiment(tmp_path, n_runs=1)
    change_table(tmp_path, **config)
    results = summary.read_results(Storage(tmp_path), "audio_mnist")
    flags = type("Flags", (), {"experiment": "audio_mnist", "data_base_dir": recordings, "clip": 3})
    figure = produce_figures.before_after([results], flags)
    shown = {axis.get_title(): axis.images[0].get_array() for axis in figure.axes}
    clip = torch.from_numpy(datasets.recordings_of(produce_figures.config_of(results.trials.iloc[0]), recordings).clips)
    groups = np.repeat([12, 26, 28, 30], 2)  # of the recordings, in the order of their names
    settings = {key: config[key] for key in ("n_mels", "hop_length", "normalize_window", "continuous", "optimized")}
    for title, seconds in (("before training: 35 ms", 0.035), ("after training: 120 ms", 0.120)):
        layer = DMEL(8000, init_lambd=8000 * seconds / 6, log=config["energy_normalize"], **settings)
        expected = layer(clip[groups == 26][1]).detach().numpy()
        np.testing.assert_allclose(shown[title], expected, rtol=1e-5, atol=1e-8)
    titles = [axis.get_title() for axis in produce_figures.dmel([results], flags).axes]
    assert titles == ["waveform", "10 ms", "120 ms, trained", "300 ms"]


def test_config_of_a_trial_is_that_of_its_row(tmp_path):
    write_experiment(tmp_path, n_runs=1)
    change_table(tmp_path, **CONFIG, split="speakers")
    config = produce_figures.config_of(summary.read_results(Storage(tmp_path), "audio_mnist").trials.iloc[0])
    assert config["split"] == "speakers" and config["checkpoint_path"] is None and config["noise_std"] is None
    assert [type(config[key]) for key in ("n_mels", "continuous", "lr_tf", "model_name")] == [int, bool, float, str]
    change_table(tmp_path, unknown=1)
    with pytest.raises(InputError, match="unknown key unknown"):
        produce_figures.config_of(summary.read_results(Storage(tmp_path), "audio_mnist").trials.iloc[0])


def test_accuracies_are_shown_where_both_halves_are_there(tmp_path):
    write_experiment(tmp_path, "any_name")
    write_experiment(tmp_path, "trained_alone")
    path = tmp_path / "trained_alone" / "trained_alone.csv"
    trials, epochs = pd.read_csv(path, index_col=0), pd.read_csv(path.with_name("epochs.csv"))
    trials[trials["config/trainable"]].to_csv(path)
    epochs[epochs["trial"] < 15].to_csv(path.with_name("epochs.csv"), index=False)
    experiments = [results for results in summary.read_all(Storage(tmp_path)).values() if len(results.trials)]
    assert [axis.get_title() for axis in produce_figures.accuracy(experiments, None).axes] == ["any_name, n = 5"]
    titles = [axis.get_title() for axis in produce_figures.convergence(experiments, None).axes]
    assert titles == ["any_name", "trained_alone"]
    with pytest.raises(produce_figures.Skipped):
        produce_figures.accuracy(experiments[1:], None)


def test_cost_model_of_the_paper():
    # By hand for one fixed window of 160 samples and 15 steps from 20 ms: the network's cost, then the spectrogram's.
    cost_ratio = produce_figures.cost_ratio
    assert cost_ratio(0.020, 1, 0.0) == pytest.approx((128 * 40000 / 80) / (2 * 128 * 40000 / 160))
    walked = np.linspace(160, 280, 15)
    assert cost_ratio(0.020, 1, 1.0) == pytest.approx(
        (40000 / 80 * walked * np.log(walked)).sum() / (15 * 40000 * np.log(160))
    )
    assert cost_ratio(0.300, 59, 0.9999) < 1 < cost_ratio(0.300, 1, 0.9999)
