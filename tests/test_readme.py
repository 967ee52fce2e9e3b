"""The README: its examples run, and it names every file."""

import re
import shlex
import shutil

import numpy as np
import pandas as pd
import soundfile
from conftest import ROOT, Project

README = (ROOT / "README.md").read_text()
KEPT = (ROOT / "results" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_layer_example(capsys):
    (example,) = (block for block in EXAMPLES if "from dmel" in block)
    scope = {}
    exec(example, scope)
    assert 0.03 < float(capsys.readouterr().out.split()[0]) < 0.04
    assert abs(abs(scope["layer"].lambd.item() - 8000 * 0.035 / 6) - 1.0) < 1e-3  # one step of Adam at its own rate


def test_changed_experiments(tmp_path):
    """Another window grid, another model and another dataset, added to the scripts as the README says."""
    project = Project(tmp_path / "project", spaces="")
    for block in EXAMPLES:
        if found := re.match(r"# (\w+\.py)\n", block):
            script = project.folder / found[1]
            text = script.read_text()
            before = text.index("\n\ndef main():") if "\n\ndef main():" in text else len(text)
            script.write_text(text[:before] + "\n\n" + block + text[before:])
    random = np.random.default_rng(0)
    for species in ("robin", "wren"):
        folder = project.folder / "data" / "birds" / species
        folder.mkdir(parents=True)
        for i in range(10):
            soundfile.write(folder / f"{i}.wav", random.uniform(-1, 1, 24000), 8000)
    for speaker in (28, 12, 26):
        folder = project.folder / "data" / "audio_mnist" / "data" / f"{speaker}"
        folder.mkdir(parents=True)
        for digit in range(10):
            soundfile.write(folder / f"{digit}_{speaker}_0.wav", random.uniform(-1, 1, 8000), 8000)

    for name, n_trials, model in (("birds", 6, "mel_wide_mlp"), ("windows", 4, "mel_mlp_net")):
        project.run("main.py", f"--name={name}", "--max_epochs=1")
        project.run("predict_test.py", f"--dataset_name={name}")
        trials = pd.read_csv(project.folder / "ray_results" / name / f"{name}.csv")
        assert len(trials) == n_trials and set(trials["config/model_name"]) == {model}
    assert sorted(set(trials["config/init_lambd"])) == [8000 * 0.020 / 6, 8000 * 0.080 / 6]
    assert "| mel_wide_mlp | 10 ms |" in project.run("produce_tables.py").stdout


def test_every_script_is_in_the_file_table():
    table = re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE)
    scripts = {path.name for pattern in ("*.py", "*.sh") for path in ROOT.glob(pattern)}
    assert scripts <= set(table)


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_tables_are_those_of_the_kept_results(project):
    command = re.search(r"^python (produce_tables.*) > results/tables.txt$", KEPT, re.MULTILINE)[1]
    shutil.copytree(ROOT / "results", project.folder / "results")
    tables = project.run(*shlex.split(command)).stdout
    assert tables == (ROOT / "results" / "tables.txt").read_text()
    assert (project.folder / "results" / "tables.csv").read_text() == (ROOT / "results" / "tables.csv").read_text()
    results = README.split("## Results")[1].split("\n## ")[0]
    paper, beyond = results.split("### Beyond the paper")
    rows = re.findall(r"^\| .*\|$", paper, re.MULTILINE) + re.findall(r"^\| .* n = .*\|$", beyond, re.MULTILINE)
    assert len(rows) > 10 and [row for row in rows if row not in tables.splitlines()] == []
