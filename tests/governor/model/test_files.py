"""Files appear whole or not at all, and what the system refuses is one line that names the path."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from governor.model.errors import BadInput
from governor.model.files import write_atomically
from tests.disks import read_only


def test_the_content_takes_the_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with write_atomically(target) as unfinished:
        unfinished.write_text("new")
        assert target.read_text() == "old"
        assert unfinished.parent == tmp_path
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize("failure", [ValueError("ours"), KeyboardInterrupt(), BrokenPipeError(errno.EPIPE, "a pipe")])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def half() -> None:
        with write_atomically(target) as unfinished:
            unfinished.write_text("half")
            raise failure

    with pytest.raises(type(failure)) as caught:
        half()
    assert caught.value is failure
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path: Path, number: int, said: str) -> None:
    target = tmp_path / "a.csv"
    with pytest.raises(BadInput) as caught, write_atomically(target):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{target}: cannot be written: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_outgrows_what_is_allowed_is_not_left_behind(tmp_path: Path) -> None:
    """A true refusal in the middle of writing: the system's own limit on the size of files."""
    pytest.importorskip("resource")
    script = (
        "import resource, sys\n"
        "from governor.model.errors import BadInput\n"
        "from governor.model.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with write_atomically(sys.argv[1]) as unfinished:\n"
        "        unfinished.write_bytes(b'x' * 2000)\n"
        "except BadInput as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "big.json"
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{target}: cannot be written: {os.strerror(errno.EFBIG)}\n"
    assert not list(tmp_path.iterdir())


def test_missing_folders_and_taken_names_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name, said in (
        ("none/a.csv", "there is no folder"),
        ("plain/a.csv", "there is no folder"),
        ("folder", "a folder has this name"),
        ("fifo", "not an ordinary file"),
    ):
        with pytest.raises(BadInput, match=said), write_atomically(tmp_path / name):
            pytest.fail("the block must not begin")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "plain"]


def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    said = "no permission|file system is read-only"  # a folder that refuses us, or a mount that refuses root as well
    with read_only(folder), pytest.raises(BadInput, match=said), write_atomically(folder / "a.csv"):
        pytest.fail("the block must not begin")
    assert list(folder.iterdir()) == []


def test_links_stay_links_and_permissions_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.html"
    link.symlink_to(tmp_path / "real" / "report.html")
    before = os.umask(0o022)
    try:
        with write_atomically(link) as unfinished:
            unfinished.write_text("text")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert link.read_text() == "text"
    assert (tmp_path / "real" / "report.html").stat().st_mode & 0o777 == 0o644
