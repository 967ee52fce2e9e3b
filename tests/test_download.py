"""download_data.sh leaves the user's folders alone, and its own whole or not there."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import write_audio_mnist, write_esc50

GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


@pytest.fixture
def source(tmp_path):
    """A git working tree with recordings, as a user may have one."""
    folder = write_audio_mnist(tmp_path / "source", repetitions=1)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "recordings"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    return folder


def contents(folder):
    """Everything in a folder: kind, mode, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def download(project, data_dir, url, check=True, name="audio_mnist", **options):
    variable = {"audio_mnist": "AUDIO_MNIST_URL", "esc50": "ESC50_URL"}[name]
    return project.run("download_data.sh", name, check=check, DATA_DIR=data_dir, **{variable: url}, **options)


def refused(project, data_dir, url, *words, **options):
    """The download ends in one sentence with these words, and leaves nothing of its own."""
    before = contents(data_dir) if data_dir.exists() else {}
    result = download(project, data_dir, url, check=False, **options)
    assert result.returncode == 1 and result.stderr.startswith("download_data.sh: ")
    assert result.stderr.strip().count("\n") == 0
    assert all(word in result.stderr for word in words), result.stderr
    assert (contents(data_dir) if data_dir.exists() else {}) == before


SLOW_WAYS = [pytest.param(way, marks=pytest.mark.slow) for way in ("trailing slash", "link and slash", "relative")]


@pytest.mark.parametrize("way", ["folder", "link", "read-only", *SLOW_WAYS])
def test_source_is_copied_and_never_touched(project, source, tmp_path, way):
    (tmp_path / "link").symlink_to(source)
    (source / "data" / "28").rename(tmp_path / "28")
    (source / "data" / "28").symlink_to(tmp_path / "28")  # a link inside is followed
    if way == "read-only":
        for path in [*source.rglob("*"), source]:
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & ~0o222)
    before = contents(tmp_path)
    url = {
        "trailing slash": f"{source}/",
        "link": tmp_path / "link",
        "link and slash": f"{tmp_path / 'link'}/",
        "relative": os.path.relpath(source, project.folder),
    }.get(way, source)
    assert "3 clips of 1 s" in download(project, tmp_path / "data", url).stdout
    copy = tmp_path / "data" / "audio_mnist"
    assert not copy.is_symlink() and not any(path.is_symlink() for path in copy.rglob("*"))
    assert sorted(os.listdir(copy)) == [
        *(f"audio_mnist_8000Hz_8000.{kind}" for kind in ("json", "lock", "npy")),
        "data",
    ]
    assert os.listdir(tmp_path / "data") == ["audio_mnist"]
    shutil.rmtree(tmp_path / "data")
    assert contents(tmp_path) == before


def test_folders_of_the_users_stay(project, source, tmp_path):
    for name in ("audio_mnist.partial", ".audio_mnist"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "notes").write_text("mine")
    download(project, tmp_path / "data", source)
    assert sorted(os.listdir(tmp_path / "data")) == [".audio_mnist", "audio_mnist", "audio_mnist.partial"]
    assert (tmp_path / "data" / "audio_mnist.partial" / "notes").read_text() == "mine"


IN_THE_WAY = {
    "file": lambda path: path.write_text("mine"),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "folder of something else": lambda path: (path / "notes").mkdir(parents=True),
    "folder without recordings": lambda path: (path / "data" / "01").mkdir(parents=True),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_target_that_is_something_else(project, source, tmp_path, kind):
    (tmp_path / "data").mkdir()
    IN_THE_WAY[kind](tmp_path / "data" / "audio_mnist")
    refused(project, tmp_path / "data", source, f"{tmp_path / 'data' / 'audio_mnist'} is in the way")


def test_a_folder_with_the_cache_alone_is_ready(project, source, tmp_path):
    download(project, tmp_path / "data", source)
    shutil.rmtree(tmp_path / "data" / "audio_mnist" / "data")
    output = download(project, tmp_path / "data", "nowhere").stdout
    assert "audio_mnist: in" in output and "3 clips of 1 s" in output


def test_sources_that_cannot_be_copied(project, source, tmp_path):
    data_dir = tmp_path / "data"
    refused(project, data_dir, source, "it has no meta/esc50.csv", name="esc50")
    refused(project, data_dir, source / "data" / "28" / "7_28_0.wav", "audio_mnist could not be fetched from")
    (tmp_path / "file").write_text("")
    refused(project, tmp_path / "file" / "data", source, "cannot make the folder")
    data_dir.mkdir()
    (source / "data" / "29").symlink_to("nowhere")
    refused(project, data_dir, source, "audio_mnist could not be copied from")
    (source / "data" / "29").unlink()
    (source / "data" / "29").symlink_to("..")
    refused(project, data_dir, source, "audio_mnist could not be copied from")


@pytest.mark.parametrize(
    "url", ["--upload-pack=touch {}", "-u touch {}", "ext::sh -c 'touch {}'", "ext::touch {}", "fd::17"]
)
def test_urls_run_no_commands(project, tmp_path, url):
    configuration = {"GIT_CONFIG_COUNT": 1, "GIT_CONFIG_KEY_0": "protocol.allow", "GIT_CONFIG_VALUE_0": "always"}
    refused(project, tmp_path / "data", url.format(tmp_path / "ran"), "fetched from", **configuration)
    assert not (tmp_path / "ran").exists()


def test_full_disk(project, source, small_disk):
    (source / "data" / "28" / "8_28_0.wav").write_bytes(bytes(2**21))
    refused(project, small_disk / "data", source, "could not be copied", "No space left")


def test_file_size_limit(project, source, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "limited.sh").write_text("trap '' XFSZ; ulimit -f 100; exec sh download_data.sh audio_mnist\n")
    result = project.run(tmp_path / "limited.sh", check=False, DATA_DIR=tmp_path / "data", AUDIO_MNIST_URL=source)
    assert result.returncode == 1 and "audio_mnist could not be copied" in result.stderr
    assert result.stderr.strip().count("\n") == 0 and os.listdir(tmp_path / "data") == []


def start(project, data_dir, source, **environment):
    environment = {"DMEL_PYTHON": sys.executable, "DATA_DIR": str(data_dir), "ESC50_URL": str(source), **environment}
    return subprocess.Popen(
        ["sh", "download_data.sh", "esc50"],
        cwd=project.folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def slow_copies(tmp_path):
    """A PATH with a cp that waits until all downloads are at it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cp").write_text('#!/bin/sh\n/bin/cp "$@"; sleep 3\n')
    (tmp_path / "bin" / "cp").chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_two_downloads_at_once(project, tmp_path):
    source = write_esc50(tmp_path / "source")
    path = slow_copies(tmp_path)
    downloads = [start(project, tmp_path / "data", source, PATH=path) for _ in range(2)]
    outputs = [each.communicate(timeout=100) for each in downloads]
    assert [each.returncode for each in downloads] == [0, 0], outputs
    assert all("copying" in output and "esc50: 3 clips of 5 s" in output for output, _ in outputs)
    assert sorted("another download was quicker" in output for output, _ in outputs) == [False, True]
    assert os.listdir(tmp_path / "data") == ["esc50"]
    assert sorted(os.listdir(tmp_path / "data" / "esc50"))[0::4] == ["audio", "meta"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_download_leaves_nothing(project, tmp_path, number):
    process = start(project, tmp_path / "data", write_esc50(tmp_path / "source"), PATH=slow_copies(tmp_path))
    while not list(tmp_path.glob("data/.esc50.*/esc50")):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate(timeout=50)
    assert process.returncode != 0 and os.listdir(tmp_path / "data") == []
