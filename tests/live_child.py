"""A process in which the command line is loaded once and then run as often as asked, each time in a child of its own.

Tests start it with `python tests/live_child.py` and write one JSON object per line: the arguments, the environment, the
folder to stand in, and where standard output and error go. It answers with the child's process id on a line, and later
with `PID CODE` when that child has ended (as a shell counts: 128 + signal). A child is a fork: a true process, to be
killed at any moment, without the seconds that importing takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection


def child(order: dict[str, object]) -> None:
    """Runs one command line and never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])  # type: ignore[arg-type]
    os.chdir(str(order["cwd"]))
    for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        os.dup2(os.open(str(name), flags, 0o644), number)
    limit = order.get("limit_bytes")
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(str(limit)), int(str(limit))))
    files = order.get("limit_files")
    if files:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (int(str(files)), int(str(files))))
    if order.get("dies_after"):
        die_after(int(str(order["dies_after"])))
    from sim.app.cli import main

    code: object = 1
    try:
        code = main([str(word) for word in order["args"]])  # type: ignore[attr-defined]
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def die_after(commits: int) -> None:
    """Kills this process as soon as so many transactions are durable."""
    from governor.journal.database import Database

    writing = Database.writing
    left = commits

    @contextlib.contextmanager
    def counted(self: Database) -> Iterator[Connection]:
        nonlocal left
        with writing(self) as connection:
            yield connection
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Database.writing = counted  # type: ignore[method-assign]


def reap() -> None:
    """Tells of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        print(f"{pid} {code if code >= 0 else 128 - code}", flush=True)


def main() -> None:
    """Loads everything, then forks on demand until standard input ends."""
    import scipy.stats

    import governor.provider.sending
    import governor.run.batch
    import governor.run.status
    import governor.service.run
    import sim.app.cli
    import sim.app.whatif
    import sim.validation.run_forecast
    from governor.provider.openai_adapter import Adapter

    assert all(
        (
            scipy.stats,
            governor.run.batch,
            governor.provider.sending,
            governor.run.status,
            sim.app.cli,
            sim.validation.run_forecast,
        )
    )
    assert all((governor.service.run, sim.app.whatif))
    # The SDK fetches half of itself when its first client is made.
    Adapter(environment={"OPENAI_API_KEY": "nobody's"})
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(read_fd, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj == read_fd:
                os.read(read_fd, 4096)
                reap()
                continue
            line = sys.stdin.readline()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                child(json.loads(line))
            print(pid, flush=True)


if __name__ == "__main__":
    main()
