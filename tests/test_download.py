"""download_data.sh leaves the user's folders alone, and its own whole or not there."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import write_audio_mnist, write_esc50


@pytest.fixture
def source(tmp_path):
    """A folder with recordings and with something of git's, as a user may have one."""
    folder = write_audio_mnist(tmp_path / "source", repetitions=1)
    (folder / ".git").mkdir()
    return folder


def contents(folder):
    """Everything in a folder: kind, mode, time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = None
        if path.is_file():
            content = path.read_bytes()
        elif path.is_symlink():
            content = os.readlink(path)
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def download(project, data_dir, url, name="audio_mnist", **options):
    variable = {"audio_mnist": "AUDIO_MNIST_URL", "esc50": "ESC50_URL"}[name]
    return project.run("download_data.sh", name, DATA_DIR=data_dir, **{variable: url}, **options)


def refused(project, data_dir, url, message, **options):
    """The download ends in one sentence with this message, and leaves nothing of its own."""
    before = contents(data_dir)
    result = download(project, data_dir, url, check=False, **options)
    assert result.returncode == 1 and result.stderr.startswith("download_data.sh: ")
    assert result.stderr.strip().count("\n") == 0 and message in result.stderr
    assert contents(data_dir) == before


def test_source_is_copied_and_never_touched(project, source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    (source / "data" / "28").rename(tmp_path / "28")
    (source / "data" / "28").symlink_to(tmp_path / "28")  # a link inside is followed
    for path in (source / "data" / "12", source / "data", source):
        path.chmod(0o555)
    data = tmp_path / "data"
    for name in ("audio_mnist.partial", ".audio_mnist"):  # the user's
        (data / name / "notes").mkdir(parents=True)
    left = data / ".audio_mnist.a1B2c3"  # as of an earlier download: the message names it
    (left / "notes").mkdir(parents=True)

    before = contents(tmp_path)
    url = f"{os.path.relpath(tmp_path / 'link', project.folder)}/"
    result = download(project, data, url)
    assert "3 clips of 1 s" in result.stdout
    assert f"{left} was left by" in result.stderr
    copy = data / "audio_mnist"
    assert not copy.is_symlink() and not any(path.is_symlink() for path in copy.rglob("*"))
    caches = [f"audio_mnist_8000Hz_8000.{kind}" for kind in ("json", "lock", "npy")]
    assert sorted(os.listdir(copy)) == [*caches, "data"]
    shutil.rmtree(copy / "data")
    again = download(project, data, "nowhere").stdout  # a folder with the cache alone is ready
    assert "audio_mnist: in" in again and "3 clips of 1 s" in again
    shutil.rmtree(copy)
    os.utime(data, ns=(0, before["data"][1]))
    assert contents(tmp_path) == before


IN_THE_WAY = {
    "file": lambda path: path.write_text("mine"),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "folder without recordings": lambda path: (path / "data" / "01").mkdir(parents=True),
}


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_target_that_is_something_else(project, source, tmp_path, kind):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    IN_THE_WAY[kind](data_dir / "audio_mnist")
    refused(project, data_dir, source, f"{data_dir / 'audio_mnist'} is in the way")


def test_sources_that_cannot_be_copied(project, source, tmp_path):
    data_dir = tmp_path / "data"
    refused(project, data_dir, source, "it has no meta/esc50.csv", name="esc50")
    recording = source / "data" / "28" / "7_28_0.wav"
    refused(project, data_dir, recording, "audio_mnist could not be fetched from")
    (tmp_path / "file").write_text("")
    refused(project, tmp_path / "file" / "data", source, "cannot make the folder")
    data_dir.mkdir()
    for target in ("nowhere", ".."):
        (source / "data" / "29").symlink_to(target)
        refused(project, data_dir, source, "audio_mnist could not be copied from")
        (source / "data" / "29").unlink()

    limited = tmp_path / "limited.sh"
    limited.write_text("trap '' XFSZ; ulimit -f 100; exec sh download_data.sh audio_mnist\n")
    result = project.run(limited, check=False, DATA_DIR=data_dir, AUDIO_MNIST_URL=source)
    assert "audio_mnist could not be copied" in result.stderr and os.listdir(data_dir) == []


@pytest.mark.parametrize("url", ["--upload-pack=touch {}", "ext::sh -c 'touch {}'", "fd::17"])
def test_urls_run_no_commands(project, tmp_path, url):
    configuration = {
        "GIT_CONFIG_COUNT": 1,
        "GIT_CONFIG_KEY_0": "protocol.allow",
        "GIT_CONFIG_VALUE_0": "always",
    }
    url = url.format(tmp_path / "ran")
    refused(project, tmp_path / "data", url, "fetched from", **configuration)
    assert not (tmp_path / "ran").exists()


def start(project, tmp_path, source, n_at_once):
    """A download whose cp waits until n_at_once of them have copied, for a minute at most."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    waiting = f"""#!/bin/sh
/bin/cp "$@"
mkdir -p {tmp_path}/copied/$$
for _ in $(seq 600); do
    [ "$(ls {tmp_path}/copied | wc -l)" -lt {n_at_once} ] || break
    sleep 0.1
done
"""
    (programs / "cp").write_text(waiting)
    (programs / "cp").chmod(0o755)
    settings = {
        "DATA_DIR": str(tmp_path / "data"),
        "AUDIO_MNIST_URL": str(source),
        "DMEL_PYTHON": sys.executable,
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        ["sh", "download_data.sh", "audio_mnist"],
        cwd=project.folder,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_downloads_at_once(project, source, tmp_path):
    downloads = [start(project, tmp_path, source, n_at_once=2) for _ in range(2)]
    outputs = [each.communicate(timeout=100)[0] for each in downloads]
    assert [each.returncode for each in downloads] == [0, 0]
    for output in outputs:
        assert "copying" in output and "audio_mnist: 3 clips of 1 s" in output
    assert sorted("another download was quicker" in output for output in outputs) == [False, True]
    assert os.listdir(tmp_path / "data") == ["audio_mnist"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_download_leaves_nothing(project, source, tmp_path, number):
    process = start(project, tmp_path, source, n_at_once=2)  # the other one never comes
    deadline = time.monotonic() + 50
    while not list(tmp_path.glob("data/.audio_mnist.*/audio_mnist")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate(timeout=50)
    assert process.returncode != 0 and os.listdir(tmp_path / "data") == []


def test_recordings_that_are_unzipped_one_level_too_deep(project, source, tmp_path):
    """They are found in the data folder, and in a folder that is named to be copied."""
    outer = tmp_path / "AudioMNIST-master"
    outer.mkdir()
    source.rename(outer / "AudioMNIST-master")
    copied = download(project, tmp_path / "copied", outer)
    assert "audio_mnist: 3 clips of 1 s" in copied.stdout
    assert (tmp_path / "copied" / "audio_mnist" / "data").is_dir()

    data_dir = tmp_path / "moved"
    data_dir.mkdir()
    outer.rename(data_dir / "audio_mnist")
    for _ in range(2):  # the second time there is a cache
        moved = download(project, data_dir, "nowhere")
        assert "audio_mnist: in" in moved.stdout and "audio_mnist: 3 clips of 1 s" in moved.stdout

    deep = write_esc50(tmp_path / "deep" / "esc50" / "ESC-50" / "ESC-50")
    result = download(project, tmp_path / "deep", deep, "esc50", check=False)
    place = tmp_path / "deep" / "esc50" / "meta" / "esc50.csv"
    assert result.returncode == 1 and f"so that there is {place}" in result.stderr


@pytest.mark.parametrize("url", ["https://example.org/ESC-50-master.zip", "local.zip"])
def test_an_archive_is_to_be_unzipped(project, tmp_path, url):
    message = "is a zip archive: unzip it and name the folder that it gives, ESC50_URL=FOLDER"
    refused(project, tmp_path / "data", url, message, name="esc50")


class CuttingProxy:
    """Passes connections on to a port, and closes each after limit bytes of what comes back."""

    def __init__(self, port):
        self.port = port
        self.limit = None
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.server.accept()
            upstream = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self.copy, args=(client, upstream, None), daemon=True).start()
            back = (upstream, client, self.limit)
            threading.Thread(target=self.copy, args=back, daemon=True).start()

    def copy(self, origin, target, limit):
        n_bytes = 0
        with contextlib.suppress(OSError):
            while chunk := origin.recv(4096):
                n_bytes += len(chunk)
                if limit is not None and n_bytes > limit:
                    break
                target.sendall(chunk)
        for end in (origin, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_download_that_dies_half_way_can_be_done_again(project, source, tmp_path):
    shutil.rmtree(source / ".git")
    (source / "noise").write_bytes(os.urandom(100000))  # git would make little of the tones
    git = ["git", "-C", source, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "recordings"]):
        subprocess.run([*git, *command], check=True)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    options = ["--listen=127.0.0.1", f"--port={port}", "--export-all", f"--base-path={tmp_path}"]
    daemon = subprocess.Popen(["git", "daemon", "--reuseaddr", *options], start_new_session=True)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        proxy = CuttingProxy(port)
        url = f"git://127.0.0.1:{proxy.server.getsockname()[1]}/source"

        proxy.limit = 20000  # bytes; the list of references is shorter
        result = download(project, tmp_path / "data", url, check=False)
        last = result.stderr.splitlines()[-1]
        assert result.returncode == 1 and "the same command tries again" in last
        assert "AUDIO_MNIST_URL=FOLDER sh download_data.sh audio_mnist" in last
        assert os.listdir(tmp_path / "data") == []

        proxy.limit = None
        result = download(project, tmp_path / "data", url)
        assert "audio_mnist: 3 clips of 1 s" in result.stdout
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
