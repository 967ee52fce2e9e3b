"""Files and names changed at random are read as before, or refused in one line, or what is left out is told.

DMEL_EXAMPLES sets how many each property tries.
"""

import contextlib
import csv
import io
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

HEADER = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
TABLE = [[f"{i % 5 + 1}-{100 + i}-A-{4 * i}.wav", i % 5 + 1, 4 * i, "a, b", "True", 100 + i, "A"] for i in range(12)]
ROWS = [[f"audio/{name}", target, fold] for name, fold, target, *_ in TABLE]
some = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


@st.composite
def damaged(draw, content):
    """A file's content after some bytes of it are changed, taken out, put in or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(content), draw(st.sampled_from([64, len(content)])))))
        length = draw(st.integers(1, 20))
        action = draw(st.sampled_from(["change", "insert", "delete", "cut", "repeat"]))
        if action == "change":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif action == "insert":
            content[place:place] = draw(
                st.binary(min_size=1, max_size=20) | st.sampled_from([b"\0", b'"', b",", b"\n"])
            )
        elif action == "delete":
            del content[place : place + length]
        elif action == "repeat":
            content[place:place] = content[place : place + 5 * length]
        else:
            del content[max(place, len(content) - length) :]
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


def text_of(rows, **options):
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    return text.getvalue()


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esc50")
    (folder / "meta").mkdir()
    (folder / "audio").mkdir()
    for name, *_ in TABLE:
        (folder / "audio" / name).touch()
    return folder


@some
@given(content=damaged(text_of([HEADER, *TABLE], lineterminator="\n").encode()))
def test_damaged_tables_give_the_same_or_less_and_say_so(esc50, content):
    (esc50 / "meta" / "esc50.csv").write_bytes(content)
    rows, told = listed(list_esc50, esc50)
    if rows is not None and rows != ROWS:
        assert rows == [row for row in ROWS if row in rows]  # nothing new, nothing twice, in the same order
        assert f"{len(ROWS) - len(rows)} entries are not in" in told


@some
@given(
    line=st.integers(0, 11),
    column=st.integers(0, 2),
    value=st.integers(-1, 99),
    empty_lines=st.integers(0, 2),
    data=st.data(),
)
def test_fields_that_contradict_each_other_are_refused_by_line(esc50, line, column, value, empty_lines, data):
    rows = [list(row) for row in TABLE]
    if column == 0:
        parts = rows[line][0].removesuffix(".wav").split("-")
        part = data.draw(st.sampled_from([0, 3]))
        value = value if str(value) != parts[part] else "x"
        rows[line][0] = "-".join([*parts[:part], str(value), *parts[part + 1 :]]) + ".wav"
    else:
        rows[line][column] = data.draw(st.sampled_from([value, f" {value}", f"0{value}", f"{value}.0", "", "nan"]))
        if rows[line][column] == TABLE[line][column]:
            rows[line][column] = "x"
    (esc50 / "meta" / "esc50.csv").write_text(text_of([HEADER]) + empty_lines * "\n" + text_of(rows))
    with pytest.raises(
        InputError, match=rf"esc50\.csv: line {line + 2 + empty_lines}: .*replace the table by ESC-50's\.$"
    ):
        list_esc50(esc50)


@some
@given(line=st.integers(0, 11), place=st.integers(0, 12), kind=st.sampled_from(["same", "fold", "target", "format"]))
def test_clips_that_are_there_twice_are_refused(esc50, line, place, kind):
    rows = [list(row) for row in TABLE]
    again = list(rows[line])
    if kind in ("fold", "target"):
        again[HEADER.index(kind)] = again[HEADER.index(kind)] % 5 + 1 if kind == "fold" else again[2] + 1
    elif kind == "format":
        again[0] = again[0].replace(".wav", ".ogg")
    rows.insert(place, again)
    (esc50 / "meta" / "esc50.csv").write_text(text_of([HEADER, *rows]))
    with pytest.raises(InputError, match=rf"esc50\.csv: line ({place}|{place + 2}|{line + 2}|{line + 3}): "):
        list_esc50(esc50)


@some
@given(
    columns=st.permutations(range(8)),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC]),
    mark=st.sampled_from(["", "\ufeff"]),
    more=st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20),
    empty_lines=st.integers(0, 3),
)
def test_tables_that_are_written_differently_give_the_same(esc50, columns, ending, quoting, mark, more, empty_lines):
    rows = [[[*row, more][i] for i in columns] for row in [[*HEADER], *TABLE]]
    rows[0][columns.index(7)] = "more"
    content = mark + text_of(rows, lineterminator=ending, quoting=quoting) + empty_lines * ending
    (esc50 / "meta" / "esc50.csv").write_bytes(content.encode())
    assert listed(list_esc50, esc50) == (ROWS, "")


NAMES = [(place, f"{digit}_{int(place)}_{n}.wav") for place in ("07", "28") for digit in (0, 9) for n in (0, 10)]


@st.composite
def renamed(draw, name):
    """A file name after some characters of it are changed, taken out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(name)))
        new = draw(st.sampled_from([*"0123456789_.- wavW²٣\n", ""]))
        name = name[:place] + new + name[place + draw(st.integers(0, 1)) :]
    return name if name not in ("", ".", "..") else "x"


def clip_of(place, name):
    """(speaker, digit, repetition) that a file's name says, None where it is not the name of a clip."""
    fields = [place, *name[:-4].split("_")]
    if len(fields) == 4 and all(field and set(field) <= set("0123456789") for field in fields) and len(fields[1]) == 1:
        return (int(fields[2]), int(fields[1]), int(fields[3])) if name.endswith(".wav") else None
    return None


@some
@given(i=st.integers(0, len(NAMES) - 1), of_folder=st.booleans(), data=st.data())
def test_renamed_clips_are_what_their_name_says_or_told(i, of_folder, data):
    place, name = NAMES[i]
    changed = (data.draw(renamed(place)), name) if of_folder else (place, data.draw(renamed(name)))
    files = {*NAMES[:i], *NAMES[i + 1 :], changed}
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            path = Path(folder, "data", *file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        rows, told = listed(list_audio_mnist, Path(folder))
    clips = sorted((clip, f"data/{place}/{name}") for place, name in files if (clip := clip_of(place, name)))
    contradict = any(clip[0] != int(file.split("/")[1]) or not 1 <= clip[0] <= 60 for clip, file in clips)
    if contradict or len(dict(clips)) < len(clips):
        assert rows is None
    else:
        assert rows == [[file, digit, speaker] for (speaker, digit, _), file in clips]
        hidden = any(part.startswith(".") for part in changed)
        assert hidden or len(clips) == len(files) or "1 entries are no recordings" in told


@pytest.mark.parametrize("kind", ["WAV", "RF64", "OGG", "FLAC", "MP3", "AIFF"])
def test_damaged_recordings_are_read_or_refused(kind, tmp_path):
    path = tmp_path / f"recording.{kind.lower()}"
    soundfile.write(path, np.sin(np.arange(2000) * 0.1), 8000, format=kind)
    read = set()

    @some
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            clip = read_recording(path, 8000)
        except InputError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            read.add(False)
        else:
            assert clip.ndim == 1 and len(clip) > 0 and np.isfinite(clip).all()
            read.add(True)

    check()
    assert False in read
