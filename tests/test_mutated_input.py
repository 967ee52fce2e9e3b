"""Files changed at random are read as before, or refused in one line, or what is left out is told.

DMEL_EXAMPLES sets how many each property tries.
"""

import contextlib
import io

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from config import InputError
from recordings import list_esc50, read_recording

TABLE = ["filename,fold,target,category"]
ROWS = []  # what is listed of it: file, target and fold
for i in range(12):
    fold = i % 5 + 1
    target = 4 * i
    name = f"{fold}-{100 + i}-A-{target}.wav"
    TABLE.append(f'{name},{fold},{target},"a, b"')
    ROWS.append([f"audio/{name}", target, fold])
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
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            rows = list_esc50(esc50)
    except InputError as error:
        assert str(error).startswith(str(esc50)) and len(str(error).splitlines()) == 1
    else:
        known = [row for row in ROWS if row in rows]
        assert rows == known  # nothing new, nothing twice, in the same order
        assert rows == ROWS or f"{len(ROWS) - len(rows)} entries of" in told.getvalue()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["WAV", "RF64", "OGG", "FLAC", "MP3", "AIFF"])
def test_damaged_recordings_are_read_or_refused(kind, tmp_path):
    path = tmp_path / f"recording.{kind.lower()}"
    soundfile.write(path, np.sin(np.arange(2000) * 0.1), 8000, format=kind)
    refusals = []

    @some
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            clip, _ = read_recording(path, 8000)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            refusals.append(error)
        else:
            assert clip.ndim == 1 and len(clip) > 0 and np.isfinite(clip).all()

    check()
    assert refusals
