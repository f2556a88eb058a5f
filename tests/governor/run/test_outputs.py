"""Output files: whole or not at all, never half, and errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from governor.model.errors import BadInput
from governor.model.files import check_writable
from governor.run.outputs import FollowedFiles, claimed, errors_path, journal_path, write_results


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_names_stand_beside_the_results() -> None:
    assert errors_path(Path("a/results.jsonl")) == Path("a/results.errors.jsonl")
    assert errors_path(Path("results")) == Path("results.errors.jsonl")
    assert journal_path(Path("a/results.jsonl")) == Path("a/results.journal.db")


def test_lines_go_to_their_file_in_order(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert write_results(out, [(True, "1"), (False, "2"), (True, "3")]) == (2, 1)
    assert (out.read_text(), errors_path(out).read_text()) == ("1\n3\n", "2\n")
    assert hidden(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_files_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write_results(out, [(True, "old"), (False, "old error")])

    def lines():
        yield True, "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(out, lines())
    assert (out.read_text(), errors_path(out).read_text()) == ("old\n", "old error\n")
    assert hidden(tmp_path) == []


def test_following_shows_each_line_at_once_and_begins_with_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    # Half a line, as a crash leaves it.
    out.write_text('{"custom_id"')
    followed = FollowedFiles(out, [(True, "first")])
    followed.add(True, "second")
    followed.add(False, "lost")
    assert (out.read_text(), errors_path(out).read_text()) == ("first\nsecond\n", "lost\n")
    followed.close()


def test_a_trial_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    check_writable(out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("kept")
    check_writable(out)
    assert out.read_text() == "kept"


def test_what_cannot_be_written_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no folder .*: create it first"):
        check_writable(tmp_path / "none" / "r.jsonl")
    with pytest.raises(BadInput, match="a folder has this name"):
        check_writable(tmp_path)
    with pytest.raises(BadInput, match="not an ordinary file"):
        check_writable(Path(os.devnull))
    with pytest.raises(BadInput, match=r"the name is too long|File name too long"):
        check_writable(tmp_path / ("x" * 300))


def test_a_followed_file_that_takes_no_more_is_one_line_of_bad_input(tmp_path: Path) -> None:
    followed = FollowedFiles(tmp_path / "r.jsonl")
    followed.close()
    with open("/dev/full", "w") as full:
        followed._files = (full, full)
        with pytest.raises(BadInput, match=r"^/dev/full: cannot be written: the disk is full: make room"):
            followed.add(True, "a line")
        followed.close()


def test_results_are_as_private_as_the_journal(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    write_results(out, [(True, "an answer"), (False, "a failure")])
    FollowedFiles(out).close()
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "r.jsonl": 0o600,
        "r.errors.jsonl": 0o600,
    }


def test_results_are_claimed_by_one_run_and_free_when_it_ends(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    (tmp_path / "link.jsonl").symlink_to(out)
    for _ in range(2):
        with claimed(out):
            for other in (out, tmp_path / "link.jsonl"):
                with pytest.raises(BadInput, match="another run writes its results there"), claimed(other):
                    raise AssertionError("claimed twice")
            with claimed(tmp_path / "another.jsonl"):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["link.jsonl"]
