"""convergence_rate.py: its steps are those of the layer, and what it tells is what happened."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import convergence_rate
from config import InputError
from convergence_rate import LONG, SHORT, SIGMA, descend, draw_signals, steps_to_arrive
from dmel import DifferentiableSpectrogram


@pytest.fixture(autouse=True)
def one_thread():
    """As the script has it: the arrays are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer_of(lambd, normalize_window):
    return DifferentiableSpectrogram(
        hop_length=1, init_lambd=lambd, optimized=False, normalize_window=normalize_window
    )


def iterations_from(signals, init, rate, normalize_window):
    _, lambds = descend(signals, init, rate, normalize_window, max_iterations=1000)
    return steps_to_arrive(lambds)


# Signals


@pytest.mark.parametrize("pulses", convergence_rate.PULSES)
def test_signals_are_pulses_of_width_sigma(pulses):
    signals = draw_signals(200, pulses, seed=0).double().numpy()
    n = np.arange(128)
    weight = signals**2 / (signals**2).sum(axis=1, keepdims=True)
    centre = weight @ n
    width = np.sqrt(2 * (weight * (n - centre[:, None]) ** 2).sum(axis=1))
    np.testing.assert_allclose(width, SIGMA, rtol=0.03)
    np.testing.assert_allclose(signals.mean(axis=1), 0, atol=1e-7)

    # A carrier of 0.25 cycles per sample takes four values, and the largest of them is made 1: so
    # the pulse is larger by 1 / cos(φ), φ up to an eighth of a turn.
    amplitude = np.sqrt(2 * (signals**2).sum(axis=1) / (SIGMA * np.sqrt(np.pi)))
    largest = 1 / np.cos(0.95 * np.pi / 4) if pulses == "centred" else 1.02
    assert amplitude.min() == pytest.approx(1, abs=0.01)
    assert np.quantile(amplitude, 0.95) == pytest.approx(largest, abs=0.02)

    spectrum = np.abs(np.fft.rfft(signals, 1024))
    frequency = spectrum.argmax(axis=1) / 1024
    if pulses == "centred":
        np.testing.assert_allclose(centre, 64, atol=0.5)
        np.testing.assert_allclose(frequency, 0.25, atol=0.002)
    else:
        assert np.abs(centre - 64).max() == pytest.approx(128 / 5, rel=0.05)
        assert np.abs(frequency - 0.25).max() == pytest.approx(0.1, rel=0.05)


def test_signals_follow_from_the_seed():
    first = draw_signals(3, "displaced", 1)
    again = draw_signals(3, "displaced", 1)
    other = draw_signals(3, "displaced", 2)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


# Descent


@pytest.mark.parametrize(("normalize_window", "rate"), [(True, 30.0), (False, 0.1)])
@pytest.mark.parametrize("init", [SHORT, LONG])
def test_steps_are_those_of_the_layer_and_sgd(init, normalize_window, rate):
    signals = draw_signals(3, "displaced", seed=0)
    n_steps = 12
    first_errors, lambds = descend(signals, init, rate, normalize_window, n_steps)

    for signal, first_error, path in zip(signals, first_errors, lambds.T, strict=True):
        with torch.no_grad():
            target = layer_of(SIGMA, normalize_window)(signal)
        layer = layer_of(init, normalize_window)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
        expected = [init]
        errors = []
        for _ in range(n_steps):
            optimizer.zero_grad()
            error = (layer(signal) - target).square().mean()
            error.backward()
            optimizer.step()
            errors.append(error.item())
            expected.append(layer.lambd.item())
        np.testing.assert_allclose(path, expected, rtol=1e-5)
        assert abs(expected[-1] - init) > 0.1  # it moved
        assert first_error == pytest.approx(errors[0], rel=1e-5)


def test_known_numbers_of_steps():
    """A few of the signals that docs/convergence_rate.md is about."""
    signals = draw_signals(4, "displaced", seed=0)
    assert np.abs(iterations_from(signals, SHORT, 30.0, True) - 125).max() <= 3
    assert np.abs(iterations_from(signals, SHORT, 0.1, False) - 75).max() <= 2
    assert np.abs(iterations_from(signals, LONG, 0.1, False) - 185).max() <= 5


def test_fourth_power_of_the_amplitude():
    """A signal of half the amplitude takes the same steps at 16 times the rate."""
    signals = draw_signals(2, "displaced", seed=0)
    _, lambds = descend(signals, SHORT, 30.0, True, 20)
    _, of_half = descend(signals / 2, SHORT, 16 * 30.0, True, 20)
    np.testing.assert_allclose(of_half, lambds, rtol=1e-5)


def test_what_arrives_stays_and_is_counted_from_the_start():
    signals = draw_signals(4, "centred", seed=0)  # each in another number of steps
    _, lambds = descend(signals, SHORT, 100.0, True, 1000)
    iterations = steps_to_arrive(lambds)
    assert len(set(iterations)) > 1
    for path, steps in zip(lambds.T, iterations.astype(int), strict=True):
        assert abs(path[steps] - SIGMA) < 0.1 <= abs(path[steps - 1] - SIGMA)
        assert (path[steps:] == path[steps]).all()
    assert len(lambds) == iterations.max() + 1


def test_neither_too_few_steps_nor_too_high_a_rate_arrive():
    signals = draw_signals(2, "displaced", seed=0)
    _, lambds = descend(signals, LONG, 30.0, True, 5)
    assert np.isnan(steps_to_arrive(lambds)).all() and len(lambds) == 6
    _, lambds = descend(signals, SHORT, 3e38, False, 50)  # leaves what float32 can hold
    assert np.isnan(steps_to_arrive(lambds)).all()


# Script


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Runs the script with its output in tmp_path, and returns what it prints."""

    def run(*flags):
        words = ["convergence_rate.py", f"--output_dir={tmp_path}", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        convergence_rate.main()
        return capsys.readouterr().out

    return run


QUICK = ("--rates", 100, "--rates_not_normalized", 0.3, "--n_signals", 2)


def test_script_prints_tables_and_writes_files(script, tmp_path):
    text = script(*QUICK)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"iterations.csv", "convergence_rate.png", "convergence_rate.pdf"}
    table = pd.read_csv(tmp_path / "iterations.csv")
    assert list(table["rate"]) == 4 * [100] + 4 * [0.3]
    assert list(table["normalize_window"]) == 4 * [True] + 4 * [False]
    assert list(table["pulses"]) == 2 * (2 * ["centred"] + 2 * ["displaced"])
    assert list(table["init"]) == 4 * [1.276, 31.9]
    assert (table["n"] == 2).all() and (table["n_not_arrived"] == 0).all()

    markdown = [line for line in text.splitlines() if line.startswith("|")]
    assert "| 75.5 ± 1.3 | 186.0 ± 37.8 | 2.5 | 50 |" in markdown[2]
    assert len(markdown) == 3 + 4
    short, long = table["iterations_mean"][6:]
    assert f"| {long / short:.1f} | 2 |" in markdown[-1] and f"| {short:.1f} ± " in markdown[-1]
    latex = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert r"75.5 $\pm$ 1.3 & 186.0 $\pm$ 37.8" in latex[0] and len(latex) == 1 + 4

    content = (tmp_path / "iterations.csv").read_bytes()
    assert script(*QUICK) == text
    assert (tmp_path / "iterations.csv").read_bytes() == content


def test_signals_that_do_not_arrive_are_told(script, tmp_path):
    flags = ("--rates", 100, "--rates_not_normalized", "--n_signals", 4, "--seed", 3)
    text = script(*flags, "--max_iterations", 30)
    table = pd.read_csv(tmp_path / "iterations.csv")
    centred, displaced = table[table["init"] == 1.276].to_dict("records")
    assert 0 < centred["n_not_arrived"] < 4  # phases decide
    assert displaced["n_not_arrived"] == 4 and np.isnan(displaced["iterations_mean"])
    assert f"({centred['n_not_arrived']} of 4 not within 30)" in text
    assert "| (4 of 4 not within 30) | (4 of 4 not within 30) |  | 4 |" in text  # and no ratio


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rates", "0"], "--rates: 0 is no learning rate"),
        (["--rates_not_normalized", "nan"], "--rates_not_normalized: nan is no learning rate"),
        (["--rates", "--rates_not_normalized"], "both empty"),
        (["--n_signals", "0"], "--n_signals=0 must be from 1 to 1000"),
        (["--max_iterations", "0"], "--max_iterations=0 must be 1 or more"),
        (["--seed", "-1"], "--seed=-1 must be 0 or more"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(script, tmp_path, flags, told):
    with pytest.raises(InputError, match=told):
        script(*flags)
    assert not list(tmp_path.iterdir())


def test_numbers_of_the_paper():
    """results/paper.csv has each cell of tables 2 to 5 once, and in it what that table has."""
    paper = pd.read_csv(ROOT / "results" / "paper.csv")
    assert not paper.duplicated(["table", "init", "method"]).any()
    n_cells = {(2, "esc50"): 6, (3, "audio_mnist"): 6}
    n_cells |= {(4, "time_frequency"): 6, (5, "convergence_rate"): 2}
    assert paper.groupby(["table", "experiment"], sort=False).size().to_dict() == n_cells
    trained = paper["method"].isin(["DMEL", "DSPEC"])
    accuracies = paper["table"] < 5
    assert (paper["est_low"].notna() == (trained & accuracies)).all()
    assert (paper["est_low"] <= paper["est_high"])[trained & accuracies].all()
    assert paper["accuracy_mean"][accuracies].between(80, 100).all()
    assert paper["accuracy_deviation"][accuracies].between(0.1, 1.5).all()
    assert (paper["iterations_mean"].notna() == ~accuracies).all()
    assert (paper["n"] == np.where(accuracies, 10, 50)).all()
    # One number of each table as a check against slips of the columns.
    found = paper.set_index(["table", "init", "method"])
    assert found.loc[(2, 300, "DMEL"), "accuracy_mean"] == 85.8
    assert found.loc[(3, 35, "baseline"), "accuracy_mean"] == 91.9
    assert found.loc[(4, 31.9, "DSPEC"), "est_low"] == 3.4
    assert found.loc[(5, 31.9, "DSPEC"), "iterations_deviation"] == 37.8
