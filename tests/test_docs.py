"""The pages for people: links, examples, commands, tables and numbers in them are those of the
repository.
"""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import ROOT, Project

import convergence_rate

PATHS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    *ROOT.glob("docs/*.md"),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README, EXTENDING = PAGES["README.md"], PAGES["docs/extending.md"]
KEPT = (
    "results",
    "results/earlier",
    "results/voices",
)  # folders of results with the tables made of them
TABLES = [
    line for folder in KEPT for line in (ROOT / folder / "tables.txt").read_text().splitlines()
]
PYTHON, SHELL = list(ROOT.glob("*.py")), list(ROOT.glob("*.sh"))
SCRIPTS = (
    "main",
    "predict_test",
    "classify",
    "produce_tables",
    "produce_figures",
    "convergence_rate",
    "datasets",
    "benchmarks",
)
FLAGS_GO_TO = {"run_experiments": "main", "run_test_predictions": "predict_test"}
OTHERS = {
    "export",
    "pip",
    "ray",
    "tensorboard",
    "cd",
    "for",
    ".",
    "git",
    "sbatch",
}  # programs whose flags are not ours
# Of run_tests.sh, of mypy on the layer's page, of `ray start --num-cpus`, and of Slurm.
FLAGS_OF_OTHERS = {"--slow", "--strict", "--follow", "--num"}
FLAGS_OF_OTHERS |= {"--nodes", "--gpus", "--cpus", "--signal", "--requeue"}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def tables(page):
    """Lists of rows, each a list of cells, the header first and the line of dashes left out."""
    found = re.findall(r"^\|.*\|$(?:\n\|.*\|$)+", without_blocks(page), re.MULTILINE)
    return [[cells(row) for i, row in enumerate(table.splitlines()) if i != 1] for table in found]


# Text


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_no_folder_of_one_machine_is_named(name):
    for file, anchor in re.findall(
        r"\[[^\]]*\]\((?!https://)([^)#]*)#?([^)]*)\)", without_blocks(PAGES[name])
    ):
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), file
        assert not anchor or anchor in anchors(target.read_text()), anchor
    notes = re.findall(r"\[\^(\w+)\](?!:)", PAGES[name])
    assert set(notes) == set(re.findall(r"^\[\^(\w+)\]: ", PAGES[name], re.MULTILINE))
    assert re.findall(r"(?:^|[\s`(=])/(?:work|home|root|tmp|mnt)\b", PAGES[name]) == []
    assert name == "README.md" or f"({name}" in README


def test_lines_of_pages_are_no_longer_than_120():
    for name, page in PAGES.items():
        for line in without_blocks(page).splitlines():
            cannot_be_broken = line.startswith(("|", "![")) or "https://" in line
            assert len(line) <= 120 or cannot_be_broken, (name, line)


def test_tables_of_files_are_those_of_the_repository():
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in PYTHON + SHELL)
    (table,) = (table for table in tables(PAGES["CONTRIBUTING.md"]) if table[0][0] == "file")
    told = {name.strip("`"): set(imports.split(", ")) - {"none"} for name, imports, _ in table[1:]}
    found = {}
    for path in PYTHON:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        found[path.name] = names & {path.stem for path in PYTHON}
    assert told == found


def test_settings_are_those_of_the_scripts():
    (table,) = (table for table in tables(README) if table[0][0] == "variable")
    told = {name for cells in table[1:] for name in re.findall(r"`(\w+)`", cells[0])}
    scripts = "".join(path.read_text() for path in PYTHON + SHELL)
    assert told and [name for name in told if not re.search(rf"\b{name}\b", scripts)] == []
    shell = "".join((ROOT / name).read_text() for name in ("doit.sh", "download_data.sh"))
    assert set(re.findall(r"\{(\w+):[-=]", shell)) <= told


# Commands


@pytest.fixture(scope="module")
def flags():
    """The flags that the --help of each script tells."""
    known = {}
    for name in SCRIPTS:
        module = importlib.import_module("benchmarks.__main__" if name == "benchmarks" else name)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as text,
        ):
            patch.setattr(sys, "argv", [name, "--help"])
            with pytest.raises(SystemExit, match="0"):
                module.run() if name == "benchmarks" else module.main()
        known[name] = set(re.findall(r"--\w+", text.getvalue()))
    return known


def commands(page):
    """The words of each command in blocks of sh, and of those in the text that begin with python or
    sh.
    """
    lines = []
    for block in blocks(page, "sh"):
        if block.startswith("#!"):  # a whole script: of it, the commands that are ours
            lines += re.findall(r"^(?:python|sh) \w+\.(?:py|sh).*$", block, re.MULTILINE)
        else:
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|sh) [^`]+)`", without_blocks(page))
    for command in (command for line in lines for command in line.split("&&")):
        words = shlex.split(command, comments=True)
        if words := [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=.*", word)]:
            yield words


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_flags_are_those_of_the_scripts(name, flags):
    for program, *words in commands(PAGES[name]):
        assert program in {"python", "sh"} | OTHERS
        if program in OTHERS or words[0] == "-c" or words[:2] == ["-m", "ruff"]:
            continue
        script = re.sub(r"\.(py|sh)$", "", words[words[0] == "-m"])
        script = FLAGS_GO_TO.get(script, script)
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        if script in SCRIPTS:
            assert used <= flags[script], words
        else:
            assert (ROOT / words[0]).is_file() and used <= {"--slow"}, words
        if script == "benchmarks":
            sections = importlib.import_module("benchmarks.__main__").SECTIONS
            assert set(re.match(r"[a-z ]*", " ".join(words[2:])).group().split()) <= {
                *sections,
                "voices",
            }, words
    text = " ".join(re.findall(r"`([^`\n]+)`", without_blocks(PAGES[name])))
    assert set(re.findall(r"(?<!\w)--\w+", text)) <= FLAGS_OF_OTHERS.union(*flags.values())


def test_flags_of_main_are_explained(flags):
    pages = " ".join(PAGES.values())
    assert [flag for flag in flags["main"] - {"--help"} if flag not in pages] == []


# Numbers


def test_kept_results_make_the_tables(project):
    """The commands on their page give the files beside them."""
    shutil.copytree(ROOT / "results", project.folder / "results", dirs_exist_ok=True)
    made = [
        words for words in commands(PAGES["results/README.md"]) if words[1] == "produce_tables.py"
    ]
    assert [command[-1] for command in made] == [f"{folder}/tables.txt" for folder in KEPT]
    for *command, _, path in made:
        assert project.run(*command[1:]).stdout == (ROOT / path).read_text()
        table = ROOT / path.replace(".txt", ".csv")
        assert (project.folder / table.relative_to(ROOT)).read_text() == table.read_text()


AT_LEAST = {  # tables
    "README.md": 2,
    "results/README.md": 2,
    "docs/continuous.md": 1,
    "docs/convergence.md": 9,
    "docs/performance.md": 1,
}


@pytest.mark.parametrize("name", AT_LEAST)
def test_tables_are_those_of_the_kept_results(name):
    # The pages of the present results show no others; each table is one kept table or a part of it.
    folders = ["results"] if name.endswith("README.md") else KEPT
    kept = []
    for folder in folders:
        kept += tables((ROOT / folder / "tables.txt").read_text())
    headers = [table[0] for table in kept]
    shown = [table for table in tables(PAGES[name]) if table[0] in headers]
    assert len(shown) >= AT_LEAST[name]
    for table in shown:
        assert any(all(row in one for row in table) for one in kept), table
    # A mean with its interval stands in a table as "mean (low to high)", or in columns of its own.
    text = "\n".join(TABLES)
    columns = re.findall(r"\| ([+-]?\d+\.\d) \| \d+ \| (-?\d+\.\d to -?\d+\.\d) \|", text)
    told = {f"{mean} ({bounds})" for mean, bounds in columns}
    page = " ".join(without_blocks(PAGES[name]).split())
    for values in re.findall(r"[+-]?\d+\.\d \(-?\d+\.\d to -?\d+\.\d\)", page):
        assert values in text or values in told, values


def test_table_of_the_convergence_rate_is_that_of_its_kept_results(capsys):
    folder = ROOT / "results" / "convergence_rate"
    kept = (folder / "tables.txt").read_text()
    (table,) = tables(kept)
    assert table in tables(PAGES["docs/convergence_rate.md"])
    iterations = pd.read_csv(folder / "iterations.csv")
    convergence_rate.print_tables(iterations, convergence_rate.read_paper())
    assert capsys.readouterr().out == kept


# Examples


def test_layer_example(capsys):
    (example,) = (block for block in blocks(README, "python") if "from dmel" in block)
    scope = {}
    exec(example, scope)
    assert 0.03 < float(capsys.readouterr().out.split()[0]) < 0.04
    assert (
        abs(abs(scope["layer"].lambd.item() - 8000 * 0.035 / 6) - 1.0) < 1e-3
    )  # one step of Adam at its own rate


def place_of(name, text):
    """Where the pages say that an example of a file is to stand in it."""
    if name == "config.py":  # a key of Config
        return text.index("\n    @property")
    return text.index("def main():") if name == "datasets.py" else len(text)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The scripts with all examples of the pages, and recordings to run those of README and
    docs/extending.md on.
    """
    project = Project(tmp_path_factory.mktemp("extended"), spaces="")
    for block in (block for page in PAGES.values() for block in blocks(page, "python")):
        if found := re.match(r"# (\w+\.py)\n", block):
            script, example = project.folder / found[1], block[found.end() :]
            text = script.read_text()
            place, space = place_of(found[1], text), "" if found[1] == "config.py" else "\n\n"
            script.write_text(text[:place] + space + example + space + text[place:])
    random = np.random.default_rng(0)
    places = {}
    for species in ("robin", "wren"):
        for i in range(10):
            places[f"birds/{species}/{1 + i % 5}_{i}"] = 24000
    places |= {
        f"audio_mnist/data/{speaker}/{i}_{speaker}_0": 8000
        for speaker in (28, 12, 26)
        for i in range(10)
    }
    for place, n_points in places.items():
        file = project.folder / "data" / f"{place}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, random.uniform(-1, 1, n_points), 8000)
    return project


CHECK = """
import json
import config, datasets, train

def drawn(name):
    return list(config.draw(config.read_search_space(name, 1), 0).values())

for name in ("lower_rates", "windows", "birds"):
    configs = drawn(name)
    for each in configs:
        train.check(each)
    rows = []
    recordings = datasets.recordings_of(configs[0], "data")
    data = datasets.load(configs[0], recordings)
    train.train(configs[0], data, lambda row, snapshot: rows.append(row))
    print(json.dumps([name, [each.model_dump() for each in configs], rows]))
try:
    config.parse(configs[0].model_dump() | {"hidden": 0})
except config.InputError as error:
    print(error)
names = ("esc50", "esc50_35ms", "esc50_35ms_bfloat16")
print(json.dumps([[each.model_dump() for each in drawn(name)] for name in names]))
"""


def test_examples_train(extended):
    """Each example is a search space that works, and its first config trains for an epoch."""
    *lines, refusal, of_esc50 = extended.run("-c", CHECK, OMP_NUM_THREADS=1).stdout.splitlines()
    spaces = {name: configs for name, configs, rows in map(json.loads, lines) if len(rows) == 1}
    assert {name: len(configs) for name, configs in spaces.items()} == {
        "lower_rates": 12,
        "windows": 4,
        "birds": 6,
    }
    assert {config["init_lambd"] for config in spaces["windows"]} == {
        8000 * 0.020 / 6,
        8000 * 0.080 / 6,
    }
    assert {(config["model_name"], config["hidden"]) for config in spaces["birds"]} == {
        ("mel_wide_mlp", 128)
    }
    assert {config["hidden"] for config in spaces["windows"]} == {512}
    assert f"main.py: {refusal}" in EXTENDING
    whole, exact, narrow = json.loads(of_esc50)  # docs/performance.md compares the last two
    assert (
        exact == [cell for cell in whole if cell["init_lambd"] == 8000 * 0.035 / 6]
        and len(exact) == 2
    )
    assert narrow == [cell | {"bf16": True} for cell in exact]


@pytest.mark.slow
def test_examples_run_with_ray(extended):
    """The model, the dataset and the key of docs/extending.md in one experiment, by the commands
    there.
    """
    extended.run("main.py", "--name=birds", "--max_epochs=1")
    extended.run("predict_test.py", "--dataset_name=birds")
    tables = extended.run("produce_tables.py").stdout
    assert "% birds: 6 trials\n" in tables and "| mel_wide_mlp | 10 ms |" in tables
