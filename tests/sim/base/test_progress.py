"""The progress bar: there on a terminal, nothing at all elsewhere, never the result's channel."""

from __future__ import annotations

import io

from sim.base.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_written_where_nobody_watches() -> None:
    stream = io.StringIO()
    with Progress("planning", 10, stream) as bar:
        bar.add(5)
        bar.say("searching")
    assert not bar.shown
    assert stream.getvalue() == ""


def test_a_terminal_sees_the_task_and_it_vanishes_in_the_end(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with Progress("planning", 10, stream) as bar:
        assert bar.shown
        bar.add(5)
        bar.say("searching")
    text = stream.getvalue()
    assert "searching" in text
    # Erase the line: what was shown leaves no trace above the result.
    assert text.rstrip().endswith("\x1b[2K")


def test_more_work_than_was_foreseen_never_shows_as_done(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sim.base.progress.EVERY_S", 0.0)
    stream = Terminal()
    with Progress("planning", 10, stream) as bar:
        for _ in range(30):
            bar.add()
        bar.say("writing")
    assert "100%" not in stream.getvalue()
    assert " 99%" in stream.getvalue()
