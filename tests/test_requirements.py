"""constraints.txt: one exact pin for all that the requirements need, on every version of Python."""

from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def requirements_of(*names):
    """The Requirements in files; a line that is none, such as one with an index, is an error."""
    found = []
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if text and text != "-r requirements.txt":
                found.append(Requirement(text))
    return found


DIRECT = requirements_of("requirements.txt", "requirements-dev.txt")
CONSTRAINTS = requirements_of("constraints.txt")


def pins_for(python):
    """Versions by name that hold for a version of Python on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    pins = {}
    for requirement in CONSTRAINTS:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pins
            (specifier,) = requirement.specifier
            pins[name] = specifier.version
    return pins


def test_each_line_is_an_exact_pin():
    for requirement in CONSTRAINTS:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, requirement
        assert not requirement.extras and not requirement.url  # pip refuses extras here


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_those_of_the_requirements(python):
    pins = pins_for(python)
    for requirement in DIRECT:
        (specifier,) = requirement.specifier
        assert pins.get(canonicalize_name(requirement.name)) == specifier.version, requirement


def test_all_that_the_requirements_need_is_pinned():
    """As the installed packages tell it."""
    pinned = {canonicalize_name(requirement.name) for requirement in CONSTRAINTS}
    to_read = list(DIRECT)
    read = set()
    missing = set()
    while to_read:
        requirement = to_read.pop()
        name = canonicalize_name(requirement.name)
        if name not in pinned:
            missing.add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) in read:
                continue
            read.add((name, extra))
            for text in metadata.requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    to_read.append(needed)
    assert missing == set()
