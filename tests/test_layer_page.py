"""The layer's page, docs/layer.md: examples, tables, installation, mypy, torchaudio beside it."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import torch
import torchaudio
from conftest import ROOT

from dmel import DMEL, DifferentiableSpectrogram

PAGE = (ROOT / "docs" / "layer.md").read_text()
USER = """
import torch
from torch import Tensor, nn

from dmel import DMEL, DifferentiableSpectrogram, parameter_groups


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = DMEL(sample_rate=8000, n_mels=16, hop_length=80, init_lambd=46.7)
        self.head = nn.Linear(16 * 11, 4)

    def forward(self, clips: Tensor) -> Tensor:
        features: Tensor = self.layer(clips)
        outputs: Tensor = self.head(features.flatten(1))
        return outputs


network = Network()
optimizer = torch.optim.AdamW(parameter_groups(network, lr_lambd=0.5), lr=1e-4)
milliseconds: float = 1000 * network.layer.window_length
n_fft: int = network.layer.n_fft
frozen: nn.Module = network.layer.frozen()
whole = DifferentiableSpectrogram(hop_length=80, init_lambd=46.7)
spectrogram: nn.Module = whole.frozen(n_samples=800)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python with the layer installed from its wheel, its site-packages, and the wheel.

    It sees this environment's packages too.
    """
    folder = tmp_path_factory.mktemp("installed")
    patterns = (".*", "data", "ray_results*", "results", "figures", "build", "*.egg-info")
    kept_out = shutil.ignore_patterns(*patterns)
    shutil.copytree(ROOT, folder / "tree", ignore=kept_out)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "these_too.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", "wheels", "./tree"]
    subprocess.run([*pip, *build], cwd=folder, check=True, timeout=120)
    (wheel,) = (folder / "wheels").iterdir()
    install = ["install", *offline, "--target", str(packages), str(wheel)]
    subprocess.run([*pip, *install], cwd=folder, check=True, timeout=120)
    return python, packages, wheel


def test_wheel_holds_the_one_module(installed, tmp_path):
    python, packages, wheel = installed
    assert wheel.name == "differentiable_mel_spectrogram-1.0.0-py3-none-any.whl"
    (metadata,) = packages.glob("differentiable_mel_spectrogram-*.dist-info")
    files = zipfile.ZipFile(wheel).namelist()
    assert [file for file in files if not file.startswith(metadata.name)] == ["dmel.py"]

    fields = (metadata / "METADATA").read_text().splitlines()
    required = [field for field in fields if field.startswith("Requires-Dist:")]
    assert required == ["Requires-Dist: torch>=2.4"]
    assert {"Requires-Python: >=3.10", "License-Expression: Apache-2.0"} <= set(fields)

    code = """
import sys, dmel
print(dmel.__file__)
dmel.DMEL(8000, n_mels=8, hop_length=80, init_lambd=40.0)
others = {"torchaudio", "ray", "librosa", "pandas", "datasets", "models"}
assert not others & sys.modules.keys()
"""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout == f"{packages / 'dmel.py'}\n", result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_mypy_beside_a_copy_and_installed(installed, tmp_path):
    def mypy(folder, *flags):
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache"]
        result = subprocess.run(
            [*command, *flags, "user.py"],
            cwd=tmp_path / folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return result.stdout

    for folder in ("copy", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "user.py").write_text(USER)
    shutil.copy(ROOT / "dmel.py", tmp_path / "copy")
    python = ["--python-executable", str(installed[0])]
    clean = "Success: no issues found in 1 source file\n"
    assert mypy("copy") == clean
    assert "missing library stubs or py.typed marker" in mypy("site", *python)
    settings = "[mypy]\n[mypy-dmel]\nfollow_untyped_imports = true\n"
    (tmp_path / "site" / "mypy.ini").write_text(settings)
    assert mypy("site", *python) == clean

    wrong = USER.replace("sample_rate=8000", 'sample_rate="8000"')
    for folder, flags in (("copy", []), ("site", python)):
        (tmp_path / folder / "user.py").write_text(wrong)
        lines = mypy(folder, *flags).splitlines()
        (error,) = (line for line in lines if "error:" in line)
        assert 'Argument "sample_rate" to "DMEL" has incompatible type "str"' in error


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": "slaney", "mel_scale": "slaney", "f_min": 50.0, "f_max": 3500.0},
        {"hop_length": 37, "n_mels": 40},
    ],
)
def test_parity_with_torchaudio(arguments):
    arguments = {"sample_rate": 8000, "n_mels": 64, "hop_length": 80} | arguments

    def window(length):
        return torch.exp(-((torch.arange(length) - length / 2) ** 2) / (2 * 46.7**2))

    torch.set_default_dtype(torch.float64)  # in float32 torchaudio's own rounding is 1e-5
    try:
        layer = DMEL(init_lambd=46.7, remove_mean=False, log=False, **arguments)
        options = {"n_fft": layer.n_fft, "window_fn": window, "pad_mode": "constant"}
        mel = torchaudio.transforms.MelSpectrogram(**options, **arguments)
        clips = torch.randn(3, 4001) + 0.5
        expected = mel(clips)
        actual = layer(clips)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.max().item())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the ONNX exporter's
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_page_examples(capsys):
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        if not example.startswith("# fsdp"):  # test_two_processes runs it
            exec(example, scope)
    milliseconds = float(re.search(r"([\d.]+) ms", capsys.readouterr().out)[1])
    step = 1000 * 6 / 8000  # Adam's first step: λ by one sample, here in ms of the window
    assert abs(milliseconds - 35) == pytest.approx(step, abs=1e-3)

    x = torch.randn(3, 4000)
    exported = scope["exported"].module()(x)
    torch.testing.assert_close(exported, scope["layer"](x).detach(), rtol=1e-5, atol=1e-5)


def test_page_names_tests_that_exist():
    tests = []
    for path in (ROOT / "tests").glob("*.py"):
        tests += re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)

    table = PAGE.split("## What works")[1].split("\n###")[0]
    _, _, *rows = (line for line in table.splitlines() if line.startswith("|"))
    assert len(rows) > 15
    for row in rows:
        assert "`test_" in row.split("|")[-2], row
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= set(tests)


def test_page_names_every_argument():
    section = PAGE.split("## Arguments")[1].split("\n##")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]*\| `?([^|`]+)`? \|", section, re.MULTILINE)

    defaults = {}
    for field in dataclasses.fields(DMEL):
        if field.default is dataclasses.MISSING:
            defaults[field.name] = "required"
        else:
            defaults[field.name] = repr(field.default).replace("'", '"')
    assert dict(rows) == defaults

    shared = [field.name for field in dataclasses.fields(DifferentiableSpectrogram)]
    assert [name for name, _ in rows][:5] == shared
