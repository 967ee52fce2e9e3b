"""The benchmark: what it compares computes the same, and every section runs."""

import json

import pytest
import torch

from clip_by_clip import ClipByClip
from dmel import DMEL, DifferentiableSpectrogram


@pytest.mark.parametrize("layer", [DMEL(8000, 64, 80, 46.7), DifferentiableSpectrogram(16, 20.0)])
def test_clip_by_clip_computes_the_same(layer):
    clips = torch.randn(3, 2000)
    outputs, gradients = [], []
    for way in (layer, ClipByClip(layer)):
        outputs.append(way(clips))
        gradients.append(torch.autograd.grad(outputs[-1].square().mean(), layer.lambd)[0])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


def test_sections_run(project, tmp_path):
    sections = ["layer", "memory", "scaling", "jumps", "epoch", "step", "copies"]
    report = tmp_path / "report.json"
    result = project.run("benchmark.py", "--tiny", "--output", report, "--experiments", "tiny", "--sections", *sections)
    report = json.loads(report.read_text())
    assert list(report["sections"]) == sections
    assert {"versions", "hardware", "threads"} <= report.keys()
    for section in report["sections"].values():
        assert section["title"] in result.stdout
        assert section["rows"]
    assert len(report["sections"]["epoch"]["rows"]) == 2
    for row in report["sections"]["copies"]["rows"]:
        assert row["its own memory for it"] < 0.2 * row["data"]


def test_wrong_arguments(project):
    assert project.run("benchmark.py", "--sections", "speed", check=False).returncode == 2
    result = project.run("benchmark.py", "--experiments", "nothing", "--sections", "epoch", check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("benchmark.py: --name=nothing contains none of the experiments")
