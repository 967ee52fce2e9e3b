"""The page of the layer, docs/layer.md: examples, tables, installation, mypy, and beside others."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import librosa
import pytest
import torch
import torchaudio
from conftest import ROOT

from dmel import DMEL, DifferentiableSpectrogram, gaussian_window

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
spectrogram = DifferentiableSpectrogram(hop_length=80, init_lambd=46.7)
frozen_spectrogram: nn.Module = spectrogram.frozen(n_samples=800)
"""


IMPORT = """
import sys
import dmel

print(dmel.__file__)
dmel.DMEL(8000, n_mels=8, hop_length=80, init_lambd=40.0)
others = {"torchaudio", "ray", "librosa", "pandas", "datasets", "models"}
print(sorted(others & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python with the layer installed from its wheel, its folder of packages, and the wheel.

    It sees the packages of this environment too.
    """
    folder = tmp_path_factory.mktemp("installed")
    kept_out = shutil.ignore_patterns(
        ".*", "data", "data_*", "ray_results*", "results", "figures", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=kept_out)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "these_too.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels"]
    subprocess.run([*pip, *build, "./tree"], cwd=folder, check=True, timeout=120)
    (wheel,) = (folder / "wheels").iterdir()
    install = ["install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)]
    subprocess.run([*pip, *install], cwd=folder, check=True, timeout=120)
    return python, packages, wheel


def test_wheel_holds_the_one_module(installed, tmp_path):
    python, packages, wheel = installed
    assert wheel.name == "differentiable_mel_spectrogram-1.0.0-py3-none-any.whl"
    (metadata,) = packages.glob("differentiable_mel_spectrogram-*.dist-info")
    files = zipfile.ZipFile(wheel).namelist()
    assert [file for file in files if not file.startswith(metadata.name)] == ["dmel.py"]

    fields = (metadata / "METADATA").read_text().splitlines()
    requirements = [field for field in fields if field.startswith("Requires-Dist:")]
    assert requirements == ["Requires-Dist: torch>=2.4"]
    assert "Requires-Python: >=3.10" in fields
    assert "License-Expression: Apache-2.0" in fields

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", IMPORT]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == f"{packages / 'dmel.py'}\n[]\n", result.stderr


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
        errors = [line for line in mypy(folder, *flags).splitlines() if "error:" in line]
        assert len(errors) == 1
        assert 'Argument "sample_rate" to "DMEL" has incompatible type "str"' in errors[0]


@pytest.mark.slow
def test_mypy_of_the_file_itself(tmp_path):
    shutil.copy(ROOT / "dmel.py", tmp_path)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache"]
    result = subprocess.run(
        [*command, "dmel.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "Success: no issues found in 1 source file\n"


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

    # In float32 torchaudio's own rounding is 1e-5.
    torch.set_default_dtype(torch.float64)
    try:
        layer = DMEL(init_lambd=46.7, remove_mean=False, log=False, **arguments)
        options = {"n_fft": layer.n_fft, "window_fn": window, "pad_mode": "constant"}
        mel = torchaudio.transforms.MelSpectrogram(**options, **arguments)
        clips = torch.randn(3, 4001) + 0.5
        expected, actual = mel(clips), layer(clips)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.max().item())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, {"htk": True, "norm": None}),
        ({"norm": "slaney", "mel_scale": "slaney"}, {}),
        ({"f_min": 50.0, "f_max": 3500.0}, {"fmin": 50, "fmax": 3500, "htk": True, "norm": None}),
    ],
)
@pytest.mark.parametrize("seconds", [0.010, 0.035, 0.300])
@pytest.mark.filterwarnings("ignore:Empty filters")
def test_parity_with_librosa(seconds, arguments, names):
    init_lambd = 8000 * seconds / 6
    options = {"remove_mean": False, "log": False, **arguments}
    layer = DMEL(8000, n_mels=64, hop_length=80, init_lambd=init_lambd, **options)
    clips = torch.randn(3, 5001) + 0.5
    window, _ = gaussian_window(layer.lambd.detach(), layer.n_fft)
    expected = librosa.feature.melspectrogram(
        y=clips.numpy(),
        sr=8000,
        n_fft=layer.n_fft,
        hop_length=80,
        window=window.numpy(),
        n_mels=64,
        **names,
    )
    tolerance = 1e-6 * float(expected.max())
    actual = layer(clips).detach()
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=tolerance)


# The ONNX exporter's warnings.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_page_examples(capsys):
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        # test_two_processes runs that one.
        if not example.startswith("# fsdp"):
            exec(example, scope)

    # Adam's first step is one sample.
    milliseconds = float(re.search(r"([\d.]+) ms", capsys.readouterr().out)[1])
    assert abs(milliseconds - 35) == pytest.approx(1000 * 6 / 8000, abs=1e-3)

    x = torch.randn(3, 4000)
    exported = scope["exported"].module()(x)
    torch.testing.assert_close(exported, scope["layer"](x).detach(), rtol=1e-5, atol=1e-5)


def test_page_names_tests_that_exist():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    tests = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= set(tests)

    table = PAGE.split("## What works")[1].split("\n###")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15
    troubles = PAGE.split("## When something is wrong")[1].split("\n##")[0]
    rows += [line for line in troubles.splitlines() if line.startswith("|")][2:]
    assert [row for row in rows if "`test_" not in row.split("|")[-2]] == []


def test_page_names_every_argument():
    section = PAGE.split("## Arguments")[1].split("\n##")[0]
    pattern = r"^\| `(\w+)` \| [^|]*\| `?([^|`]+)`? \|"
    arguments = dict(re.findall(pattern, section, re.MULTILINE))

    defaults = {}
    for field in dataclasses.fields(DMEL):
        required = field.default is dataclasses.MISSING
        defaults[field.name] = "required" if required else repr(field.default).replace("'", '"')
    assert arguments == defaults

    of_spectrogram = [field.name for field in dataclasses.fields(DifferentiableSpectrogram)]
    assert list(arguments)[:5] == of_spectrogram
