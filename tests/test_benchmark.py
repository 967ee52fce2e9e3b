"""The benchmark: what it compares computes the same, and every section runs."""

import json

import numpy as np
import pytest
import torch

from benchmarks.clip_by_clip import ClipByClip
from benchmarks.layer import levels
from benchmarks.measure import forward_backward
from benchmarks.training import count_operators
from dmel import DMEL, DifferentiableSpectrogram
from recordings import Recordings

MEL = DMEL(sample_rate=8000, n_mels=64, hop_length=80, init_lambd=46.7)


@pytest.mark.parametrize("layer", [MEL, DifferentiableSpectrogram(hop_length=16, init_lambd=20.0)])
def test_clip_by_clip_computes_the_same(layer):
    clips = torch.randn(3, 2000)
    outputs, gradients = [], []
    for way in (layer, ClipByClip(layer)):
        outputs.append(way(clips))
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), layer.lambd)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


def test_operators_are_counted():
    """The same number again, and for any number of clips; the other way starts some for every clip."""
    few, many = torch.randn(2, 2000), torch.randn(9, 2000)
    counts = count_operators(forward_backward(MEL, few))
    assert counts["_fft_r2c"] == 2 and counts.keys().isdisjoint(
        {"view", "detach", "empty_like", "promote_types"}
    )
    assert (
        counts
        == count_operators(forward_backward(MEL, few))
        == count_operators(forward_backward(MEL, many))
    )
    few, many = (count_operators(forward_backward(ClipByClip(MEL), clips)) for clips in (few, many))
    assert many.total() > 4 * few.total()


def test_level_of_silence(monkeypatch):
    """The floor, ln(1e-10), or 0; one speaker for each part of the split."""
    silence = Recordings(
        np.zeros((3, 8000), np.float32), np.zeros(3, np.int64), np.array([1, 12, 26])
    )
    monkeypatch.setattr("benchmarks.layer.recordings_of", lambda space, args: silence)
    assert {(row["default"], row["zero_floor"]) for row in levels(None)} == {("23.03", "0.00")}


@pytest.mark.slow
def test_sections_run(project, tmp_path):
    sections = [
        "layer",
        "memory",
        "scaling",
        "jumps",
        "epoch",
        "step",
        "operators",
        "prepare",
        "copies",
    ]
    flags = [
        "--tiny",
        "--output",
        tmp_path / "report.json",
        "--experiments",
        "tiny",
        "--sections",
        *sections[1:],
    ]
    output = project.run("-m", "benchmarks", sections[0], *flags).stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"versions", "hardware", "threads"} <= report.keys()
    assert all(section["title"] in output for section in report["sections"].values())
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    assert list(rows) == sections and all(rows.values()) and len(rows["epoch"]) == 2
    assert all(
        0 < row["of which the layer"] < row["DMEL"] < row["clip by clip"]
        for row in rows["operators"]
    )
    for row in rows["prepare"]:
        assert (
            row["clips"] == 60
            and row["cache, MiB"] > 60 * 8000 * 4 / 2**20
            and row["peak memory, MiB"] > 50
        )
    assert all(row["its own memory for it"] < 0.2 * row["data"] for row in rows["copies"])


@pytest.mark.slow
def test_wrong_arguments(project):
    assert project.run("-m", "benchmarks", "--sections", "speed", check=False).returncode == 2
    result = project.run(
        "-m", "benchmarks", "--experiments", "nothing", "--sections", "epoch", check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith(
        "python -m benchmarks: --name=nothing contains none of the experiments"
    )
