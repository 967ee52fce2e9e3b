"""Files below a folder or the URI of any storage that Ray accepts; each is replaced whole or not at all."""

import contextlib
import os
from pathlib import Path

from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from config import InputError


class Storage:
    """Files below a folder, given as a path or as a URI; raises OSError where one cannot be read or written."""

    def __init__(self, root):
        try:
            self.filesystem, path = FileSystem.from_uri(str(root if "://" in str(root) else Path(root).absolute()))
        except (ValueError, OSError) as error:
            remedy = "name a folder or a URI that Ray accepts"
            raise InputError(f"cannot use '{root}' for results ({first_line(error)}): {remedy}.") from None
        self.root = path.rstrip("/")  # without the settings that a URI has behind ?, or a password before @
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.address = self.root if self.is_local else f"{self.filesystem.type_name}://{self.root}"  # for people

    def path(self, name):
        return f"{self.root}/{name}"

    def read(self, name):
        """Content of a file as bytes, None where there is none."""
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name, content):
        """Replaces a file, whole; content: bytes or text."""
        open_file = whole_file if self.is_local else self.filesystem.open_output_stream  # where none appears in part
        with open_file(self.path(name)) as file:
            file.write(content.encode() if isinstance(content, str) else content)

    def list(self, name=""):
        """Names of what a folder holds, hidden files left out."""
        files = self.filesystem.get_file_info(FileSelector(self.path(name), allow_not_found=True))
        return sorted(file.base_name for file in files if not file.base_name.startswith("."))


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which takes its place at the end; where that fails, nothing is left or changed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error):
    """What an exception says, in one line."""
    return " ".join((str(error).strip() or repr(error)).split())[:300]
