"""Read YAML with error messages that name the line, and write files that appear whole or not at all.

Theory of operation. The content goes into a hidden file beside the target, which is forced to the disk and then takes
the target's name in one step (`os.replace` is atomic within one file system, hence "beside"). Any failure before that
step removes the hidden file and leaves an older target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from governor.model.errors import BadInput, quoted
from governor.model.estimate import kind_of

# Remedies for the common errors.
_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room, or name another folder",
    errno.EDQUOT: "the disk quota is used up: make room, or name another folder",
    errno.EACCES: "no permission to write there: name another folder",
    errno.EPERM: "no permission to write there: name another folder",
    errno.EROFS: "that file system is read-only: name another folder",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


def why(error: OSError) -> str:
    """Return, in one line for people, what is wrong with a file."""
    return _REMEDIES.get(error.errno or 0) or error.strerror or " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- reading


@functools.cache
def _loader(*, exact: bool) -> Any:
    """Return the loader. libyaml's parser is six times as fast; Python's names the place of an error more exactly."""
    import yaml  # only some commands read YAML

    base: Any = yaml.SafeLoader if exact else getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{quoted(key.value)} stands twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, OverflowError) as error:
                # For a scalar that only looks like a date or a number PyYAML would not give the place.
                raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    return Loader


def parsed_yaml(text: str, name: str, wanted: str = "a mapping") -> dict[str, Any]:
    """Return the mapping that a YAML text holds.

    Raise BadInput if the text is not YAML (with the line) or not a mapping of names. A key that occurs twice is an
    error: one of its two values would be lost silently.
    """
    import yaml  # as above

    try:
        try:
            data = yaml.load(text, _loader(exact=False))
        except yaml.YAMLError:
            data = yaml.load(text, _loader(exact=True))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"not YAML: {problem}", name, mark.line + 1 if mark else 0) from None
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        raise BadInput(f"not YAML that can be read: {error}".splitlines()[0], name) from None
    if not isinstance(data, dict):
        raise BadInput("the file is empty" if data is None else f"{kind_of(data)} where {wanted} should be", name)
    for key in data:
        if not isinstance(key, str):
            raise BadInput(f"{quoted(key)} is not a key", name)
    return data


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raise BadInput if it cannot be read, and as `parsed_yaml` does."""
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput("there is no such file", name) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text: {error.reason}", name) from None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", name) from None
    return parsed_yaml(text, name)


def only_keys(data: dict[str, Any], allowed: tuple[str, ...], place: str, name: str) -> None:
    """Raise BadInput for a key that is not one of `allowed`: a misspelt setting that is ignored is worse than none."""
    for key in data:
        if key not in allowed:
            raise BadInput(f"{place}there is no key {quoted(key)}: use {', '.join(allowed)}", name)


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def write_atomically(path: str | Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of an empty file to fill; when the block ends without an error it becomes `path`.

    The block should read and write no other file: an `OSError` in it (a full disk, a folder that vanished) is raised as
    a one-line `BadInput` that names `path`. Any other exception passes through; in both cases nothing is left behind. A
    symbolic link stays a link, and its target is replaced. `mode`: the file's permissions, less the umask.
    """
    name = os.fspath(path)
    target = Path(os.path.realpath(name))
    unfinished = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        _check_target(target, name)
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, target)
        _sync_folder(target.parent)
    except (ConnectionError, ChildProcessError):
        raise  # another program's pipe or process, never a file
    except OSError as error:
        raise BadInput(f"cannot be written: {why(error)}", name) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


@contextlib.contextmanager
def replaced(path: str | Path, *, mode: int = 0o666) -> Iterator[TextIO]:
    """Yield a text file to write, with the guarantees of `write_atomically`."""
    with write_atomically(path, mode=mode) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        yield file


def _check_target(target: Path, name: str) -> None:
    if target.is_dir():
        raise BadInput("cannot be written: a folder has this name", name)
    if target.exists() and not target.is_file():
        raise BadInput("cannot be written: it exists and is not an ordinary file", name)
    if not target.parent.is_dir():
        raise BadInput(f"cannot be written: there is no folder {target.parent}: create it first", name)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system without support for this has already made it as durable as it can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(path: str | Path) -> None:
    """Raise BadInput, before anything is sent, if a file of that name could not be written at the end."""
    with contextlib.suppress(_Tried), write_atomically(path):
        raise _Tried


class _Tried(Exception):  # noqa: N818  (no error: it ends a trial before anything is replaced)
    pass


@contextlib.contextmanager
def prepared_folder(path: str) -> Iterator[Path]:
    """Yield the folder to write into: create it if it is missing, and remove it again if the work fails.

    Raise BadInput if it cannot be created or written to.
    """
    folder = Path(path)
    made: list[Path] = []
    try:
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir()
                made.append(each)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b" ")
    except OSError as error:
        _remove(made)
        reason = "this is not a folder" if isinstance(error, NotADirectoryError) else error.strerror or str(error)
        raise BadInput(f"cannot be written into: {reason}", path) from None
    try:
        yield folder
    except BaseException:
        _remove(made)
        raise


def _remove(folders: list[Path]) -> None:
    for folder in reversed(folders):
        # A folder that is not empty stays: another program has put something there.
        with contextlib.suppress(OSError):
            folder.rmdir()
