"""Files and names changed at random are read as before, or refused in one line, or what is left out is told.

DMEL_EXAMPLES sets how many each property tries.
"""

import contextlib
import io
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from config import InputError
from recordings import list_audio_mnist, list_esc50, read_recording

TABLE = ["filename,fold,target,category"]
TABLE += [f'{i % 5 + 1}-{100 + i}-A-{4 * i}.wav,{i % 5 + 1},{4 * i},"a, b"' for i in range(12)]
ROWS = [[f"audio/{name}", int(target), int(fold)] for name, fold, target, *_ in (row.split(",") for row in TABLE[1:])]
some = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


@st.composite
def damaged(draw, content):
    """A file's content after some bytes of it are replaced by others, by none, or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(content), draw(st.sampled_from([64, len(content)])))))
        end = place + draw(st.sampled_from([0, 1, 20, len(content)]))
        new = draw(st.binary(max_size=20) | st.sampled_from([b"\0", b'"', b",", b"\n"]))
        content[place:end] = draw(st.sampled_from([new, b"", 2 * content[place:end]]))
    return bytes(content)


def listed(list_files, folder):
    """What a list function returns and what it prints; None where it refuses, which takes one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return list_files(folder), told.getvalue()
    except InputError as error:
        assert str(error).startswith(str(folder)) and len(str(error).splitlines()) == 1
        return None, told.getvalue()


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esc50")
    (folder / "meta").mkdir()
    (folder / "audio").mkdir()
    for file, *_ in ROWS:
        (folder / file).touch()
    return folder


@some
@given(content=damaged("\n".join(TABLE).encode()))
def test_damaged_tables_give_the_same_or_less_and_say_so(esc50, content):
    (esc50 / "meta" / "esc50.csv").write_bytes(content)
    rows, told = listed(list_esc50, esc50)
    if rows is not None and rows != ROWS:
        assert rows == [row for row in ROWS if row in rows]  # nothing new, nothing twice, in the same order
        assert f"{len(ROWS) - len(rows)} entries of" in told


@some
@given(
    columns=st.permutations(range(5)),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from(["", "\ufeff"]),
    more=st.text(st.characters(codec="utf-8", exclude_characters='\r\n"'), max_size=20),
)
def test_tables_that_are_written_differently_give_the_same(esc50, columns, ending, mark, more):
    rows = [[*row.split(",", 3), "more" if row is TABLE[0] else f'"{more}"'] for row in TABLE]
    content = mark + ending.join(",".join(row[i] for i in columns) for row in rows) + 2 * ending
    (esc50 / "meta" / "esc50.csv").write_bytes(content.encode())
    assert listed(list_esc50, esc50) == (ROWS, "")


FILES = [f"{place}/{digit}_{int(place)}_{n}.wav" for place in ("07", "28") for digit in (0, 9) for n in (0, 10)]


@st.composite
def renamed(draw, name):
    """A file's path after some characters of it are changed, taken out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(name)))
        new = draw(st.sampled_from([*"0123456789_.- wavW²٣\n", ""]))
        name = name[:place] + new + name[place + draw(st.integers(0, 1)) :]
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) if len(parts) == 2 else "x/x"


def clip_of(file):
    """(speaker, digit, repetition) that a path says, None where it is not that of a clip."""
    place, digit, speaker, repetition, *_ = re.split("[/_.]", f"{file}____")
    if file == f"{place}/{digit}_{speaker}_{repetition}.wav" and len(digit) == 1:
        numbers = [place, digit, speaker, repetition]
        if all(number.isascii() and number.isdigit() for number in numbers) and 1 <= int(speaker) == int(place) <= 60:
            return int(speaker), int(digit), int(repetition)
    return None


@some
@given(i=st.integers(0, len(FILES) - 1), data=st.data())
def test_renamed_clips_are_what_their_name_says_or_told(i, data):
    changed = data.draw(renamed(FILES[i]))
    files = {*FILES[:i], *FILES[i + 1 :], changed}
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            path = Path(folder, "data", file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        rows, told = listed(list_audio_mnist, Path(folder))
    clips = {clip_of(file): f"data/{file}" for file in sorted(files, reverse=True)}  # of two the first
    assert rows == [[clips[clip], clip[1], clip[0]] for clip in sorted(clip for clip in clips if clip)]
    hidden = any(part.startswith(".") for part in changed.split("/"))
    assert hidden or len(rows) == len(files) or "1 entries of" in told


@pytest.mark.parametrize("kind", ["WAV", "OGG", "FLAC", "MP3", "AIFF"])
def test_damaged_recordings_are_read_or_refused(kind, tmp_path):
    path = tmp_path / f"recording.{kind.lower()}"
    soundfile.write(path, np.sin(np.arange(2000) * 0.1), 8000, format=kind)
    refusals = []

    @some
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            clip = read_recording(path, 8000)
        except InputError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            refusals.append(error)
        else:
            assert clip.ndim == 1 and len(clip) > 0 and np.isfinite(clip).all()

    check()
    assert refusals
