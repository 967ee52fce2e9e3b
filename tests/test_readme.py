"""The README: its examples run, and it names every file."""

import re

from conftest import ROOT

import search_spaces
import train

README = (ROOT / "README.md").read_text()


def test_layer_example(capsys):
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from dmel" in block)
    exec(example, {})
    assert 0.03 < float(capsys.readouterr().out.split()[0]) < 0.04


def test_search_space_example():
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def windows" in block)
    scope = vars(search_spaces).copy()
    exec(example, scope)
    space = scope["windows"](5)
    train.check({**space, "trainable": True, "init_lambd": space["init_lambd"]["grid_search"][0]})
    assert space["init_lambd"]["grid_search"][1] == 8000 * 0.080 / 6


def test_every_script_is_in_the_file_table():
    table = re.findall(r"^\| `([\w.]+)` \|", README, re.MULTILINE)
    scripts = {path.name for pattern in ("*.py", "*.sh") for path in ROOT.glob(pattern)}
    assert scripts <= set(table)
