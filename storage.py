"""Files below a folder or the URI of any storage that Ray accepts; each is replaced whole or not at all."""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlsplit

import pydantic
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files

from config import InputError


class Storage:
    """Files below a folder, given as a path or as a URI."""

    def __init__(self, root):
        try:
            if "://" not in str(root):
                self.filesystem, self.root = LocalFileSystem(), str(Path(root).absolute())
                self.address = self.root
            else:  # what follows ? in a URI are the filesystem's settings, and before @ may stand a password
                self.filesystem, path = FileSystem.from_uri(str(root))
                self.root = path.rstrip("/")
                self.address = f"{urlsplit(str(root)).scheme}://{self.root}"
            self.is_local = isinstance(self.filesystem, LocalFileSystem)
        except (ValueError, OSError) as error:
            message = f"cannot use '{root}' for results ({first_line(error)}): name a folder or a URI that Ray accepts"
            raise InputError(f"{message}.") from None

    def path(self, name):
        return f"{self.root}/{name}"

    def exists(self, name):
        return self.filesystem.get_file_info(self.path(name)).type != FileType.NotFound

    def read(self, name):
        """Content of a file as bytes, None where there is none."""
        if not self.exists(name):
            return None
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def write(self, name, content):
        """Replaces a file, whole; content: bytes or text."""
        content, path = content.encode() if isinstance(content, str) else content, self.path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with whole_file(path) as file:
                file.write(content)
        else:  # an object appears when it is whole
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)

    def remove(self, name):
        """Removes a file, if it is there."""
        if self.exists(name):
            self.filesystem.delete_file(self.path(name))

    def list(self, name=""):
        """Names of what a folder holds, hidden files left out."""
        selector = FileSelector(self.path(name), allow_not_found=True)
        names = sorted(info.base_name for info in self.filesystem.get_file_info(selector))
        return [name for name in names if not name.startswith(".")]

    def rename(self, old, new):
        """Renames a folder; False where there is none."""
        if not self.exists(old):
            return False
        try:
            if self.is_local:
                os.rename(self.path(old), self.path(new))
            else:
                copy_files(
                    self.path(old),
                    self.path(new),
                    source_filesystem=self.filesystem,
                    destination_filesystem=self.filesystem,
                )
                self.filesystem.delete_dir(self.path(old))
        except OSError as error:
            raise InputError(f"{self.address}/{old} cannot be renamed ({error}): choose another --name.") from None
        return True


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which takes its place at the end; where that fails, nothing is left or changed."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_whole(path, text):
    """Writes a local text file in one piece."""
    Storage(Path(path).absolute().parent).write(Path(path).name, text)


def first_line(error):
    """What an exception says, in one line."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join((str(error).strip() or repr(error)).split())[:300]
