"""The benchmark: what it compares computes the same, and every section runs."""

import json

import numpy as np
import pytest
import torch

import benchmarks.layer
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
    outputs = []
    gradients = []
    for way in (layer, ClipByClip(layer)):
        output = way(clips)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().mean(), layer.lambd)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


def test_operators_are_counted():
    """The same number again, and for any number of clips; the other way starts some for each."""
    few = torch.randn(2, 2000)
    many = torch.randn(9, 2000)
    counts = count_operators(forward_backward(MEL, few))
    assert counts["_fft_r2c"] == 2  # of the window and of its derivative
    assert counts.keys().isdisjoint({"view", "detach", "empty_like", "promote_types"})
    assert count_operators(forward_backward(MEL, few)) == counts
    assert count_operators(forward_backward(MEL, many)) == counts

    of_few = count_operators(forward_backward(ClipByClip(MEL), few))
    of_many = count_operators(forward_backward(ClipByClip(MEL), many))
    assert of_many.total() > 4 * of_few.total()


def test_level_of_silence(monkeypatch):
    """The floor, ln(1e-10), or 0; one speaker for each part of the split."""
    clips = np.zeros((3, 8000), np.float32)
    silence = Recordings(clips, np.zeros(3, np.int64), np.array([1, 12, 26]))
    monkeypatch.setattr("benchmarks.layer.recordings_of", lambda config, args: silence)
    rows = list(levels(None))
    assert len(rows) == 7
    for row in rows:
        assert (row["default"], row["zero_floor"]) == ("23.03", "0.00")


def test_without_dstft_its_section_is_left_out_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.layer, "DSTFT_VERSION", "3.0.0.of.nobody")
    assert list(benchmarks.layer.dstft(None)) == []
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "`pip install --no-deps dstft==3.0.0.of.nobody`" in sentence


@pytest.mark.slow
def test_sections_run(project, tmp_path):
    sections = ["layer", "memory", "scaling", "jumps"]
    if benchmarks.layer.has_dstft():
        sections.append("dstft")
    sections += ["epoch", "cost", "step", "operators", "prepare", "copies"]
    path = tmp_path / "report.json"
    flags = ["--tiny", "--output", path, "--experiments", "tiny", "--sections", *sections[1:]]
    output = project.run("-m", "benchmarks", sections[0], *flags).stdout

    report = json.loads(path.read_text())
    assert {"versions", "hardware", "threads"} <= report.keys()
    assert list(report["sections"]) == sections
    rows = {}
    for name, section in report["sections"].items():
        assert section["title"] in output
        assert section["rows"]
        rows[name] = section["rows"]

    assert len(rows["epoch"]) == 2
    (cost,) = rows["cost"]
    assert cost["quotient"] == pytest.approx(cost["DMEL, s"] / (10 * cost["fixed, s"]))
    for row in rows["operators"]:
        assert 0 < row["of which the layer"] < row["DMEL"] < row["clip by clip"]
    for row in rows["prepare"]:
        assert row["clips"] == 60
        assert row["cache, MiB"] > 60 * 8000 * 4 / 2**20
        assert row["peak memory, MiB"] > 50
    for row in rows["copies"]:
        assert row["its own memory for it"] < 0.2 * row["data"]


@pytest.mark.slow
def test_wrong_arguments(project):
    result = project.run("-m", "benchmarks", "--sections", "speed", check=False)
    assert result.returncode == 2

    flags = ["--experiments", "nothing", "--sections", "epoch"]
    result = project.run("-m", "benchmarks", *flags, check=False)
    assert result.returncode == 1
    message = "python -m benchmarks: --name=nothing contains none of the experiments"
    assert result.stderr.startswith(message)
