"""The layer's page, docs/layer.md: its examples and tables, installation, mypy, and torchaudio
beside it.
"""

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
spectrogram: nn.Module = DifferentiableSpectrogram(hop_length=80, init_lambd=46.7).frozen(n_samples=800)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python with the layer installed from its wheel, and the wheel. It sees this environment's
    packages too.
    """
    folder = tmp_path_factory.mktemp("installed")
    kept_out = shutil.ignore_patterns(
        ".*", "data", "ray_results*", "results", "figures", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=kept_out)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "these_too.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        "wheels",
        "./tree",
    ]
    subprocess.run([*pip, *build], cwd=folder, check=True, timeout=120)
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
    assert [field for field in fields if field.startswith("Requires-Dist:")] == [
        "Requires-Dist: torch>=2.4"
    ]
    assert {"Requires-Python: >=3.10", "License-Expression: Apache-2.0"} <= set(fields)
    code = (
        "import sys, dmel; print(dmel.__file__); dmel.DMEL(8000, n_mels=8, hop_length=80, init_lambd=40.0);"
        "assert not {'torchaudio', 'ray', 'librosa', 'pandas', 'datasets', 'models'} & sys.modules.keys()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout == f"{packages / 'dmel.py'}\n", result.stderr


@pytest.mark.slow
def test_mypy_beside_a_copy_and_installed(installed, tmp_path):
    def mypy(folder, *flags):
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            tmp_path / "cache",
            *flags,
            "user.py",
        ]
        return subprocess.run(
            command, cwd=tmp_path / folder, capture_output=True, text=True, timeout=300
        ).stdout

    for folder in ("copy", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "user.py").write_text(USER)
    shutil.copy(ROOT / "dmel.py", tmp_path / "copy")
    python, clean = (
        ["--python-executable", str(installed[0])],
        "Success: no issues found in 1 source file\n",
    )
    assert mypy("copy") == clean
    assert "missing library stubs or py.typed marker" in mypy("site", *python)
    (tmp_path / "site" / "mypy.ini").write_text(
        "[mypy]\n[mypy-dmel]\nfollow_untyped_imports = true\n"
    )
    assert mypy("site", *python) == clean
    for folder, flags in (("copy", []), ("site", python)):
        (tmp_path / folder / "user.py").write_text(
            USER.replace("sample_rate=8000", 'sample_rate="8000"')
        )
        errors = [line for line in mypy(folder, *flags).splitlines() if "error:" in line]
        assert (
            len(errors) == 1
            and 'Argument "sample_rate" to "DMEL" has incompatible type "str"' in errors[0]
        )


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
        expected, actual = mel(clips), layer(clips)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.max().item())


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # the ONNX exporter's
def test_page_examples(capsys):
    scope = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        if not example.startswith("# fsdp"):  # test_two_processes runs it
            exec(example, scope)
    milliseconds = float(re.search(r"([\d.]+) ms", capsys.readouterr().out)[1])
    assert abs(milliseconds - 35) == pytest.approx(
        1000 * 6 / 8000, abs=1e-3
    )  # Adam's first step: one sample
    x = torch.randn(3, 4000)
    torch.testing.assert_close(
        scope["exported"].module()(x), scope["layer"](x).detach(), rtol=1e-5, atol=1e-5
    )


def test_page_names_tests_that_exist():
    tests = re.findall(
        r"^def (test_\w+)",
        "".join(path.read_text() for path in (ROOT / "tests").glob("*.py")),
        re.M,
    )
    table = PAGE.split("## What works")[1].split("\n###")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 15 and [row for row in rows if "`test_" not in row.split("|")[-2]] == []
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= set(tests)


def test_page_names_every_argument():
    rows = re.findall(
        r"^\| `(\w+)` \| [^|]*\| `?([^|`]+)`? \|",
        PAGE.split("## Arguments")[1].split("\n##")[0],
        re.MULTILINE,
    )
    fields = dataclasses.fields(DMEL)
    defaults = {
        f.name: "required"
        if f.default is dataclasses.MISSING
        else repr(f.default).replace("'", '"')
        for f in fields
    }
    assert dict(rows) == defaults
    assert [name for name, _ in rows][:5] == [
        f.name for f in dataclasses.fields(DifferentiableSpectrogram)
    ]
