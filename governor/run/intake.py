"""Read a batch file into a journal that holds all of it, or return to an existing journal: the work left, by pool.

Memory stays flat: lines go from the file into the journal; only 80 bytes of sizes per request remain here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from governor.forecast.forecast import FIRST_TOKEN_S, PER_TOKEN_S, Demand, assumed_answer
from governor.forecast.guard import check_fits
from governor.journal.database import JournalError
from governor.journal.journal import Journal, fingerprint_of
from governor.journal.schema import INGEST_BYTES
from governor.model.errors import BadInput, Oversized, Refused, quoted
from governor.model.estimate import TOKENS_PER_FILE
from governor.model.pools import Pool, groups_of, pool_for
from governor.model.requests import Request, UnseenContent, read_requests
from governor.model.work import Work, reserve_of, work_of
from governor.run.amend import Amendment
from governor.run.outputs import errors_path
from governor.scheduler.router import Spread

# A journal holds each line about twice (its body, its answer) and some hundred bytes of records per attempt.
JOURNAL_BYTES_PER_INPUT_BYTE = 1.3
JOURNAL_BYTES_PER_REQUEST = 4_000
RESULT_BYTES_PER_REQUEST = 2_500
Check = Callable[[Request, int, Pool], None]
# SQLite's log: 4 MiB, and the largest transaction (while a journal is filled) on top.
WAL_BYTES = 4 * 2**20 + 2 * INGEST_BYTES


@dataclass(frozen=True, slots=True)
class BatchBegun:
    """A journal ready to run. `demands`: the work left, by pool. `is_new`: this command created it.

    `oversized`: requests that will end unsent (`--skip-oversized`). Changes to the journal wait until the run may
    start, so that a refusal leaves everything as it was: `retried`, failed requests to be tried again
    (`Journal.retry_failed`), and `amended`, the changes of a corrected input file.
    """

    journal: Journal
    demands: Mapping[str, Demand]
    is_new: bool
    oversized: int
    retried: int
    amended: AmendedInput | None = None


@dataclass(frozen=True, slots=True)
class AmendedInput:
    """A corrected input, not yet adopted. `works()` reads it anew; see `amend` for the figures."""

    amendment: Amendment
    works: Callable[[], Iterator[Work]]
    fingerprint: str

    def apply(self) -> None:
        """Write the corrected input into the journal."""
        self.amendment.apply(self.works(), self.fingerprint)


# ---------------------------------------------------------------- reading the input


class _Hashed:
    """The lines of a binary file, and the SHA-256 of the bytes read."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        for line in self._file:
            self.sha256.update(line)
            yield line


def pooled(requests: Iterable[Request], pools: Sequence[Pool], name: str) -> Iterator[tuple[Request, Pool]]:
    """Yield each request with its pool; raise BadInput, naming the request, if no pool takes its model.

    Pools of one group divide their requests; a live run shares them out anew, as each can be launched.
    """
    found: dict[str, Pool] = {}
    shares = {members[0].name: _Share(members) for members in groups_of(pools) if len(members) > 1}
    for request in requests:
        pool = found.get(request.model)
        if pool is None:
            pool = pool_for(request.model, pools)
            if pool is None:
                what = f"request {request.index} ({quoted(request.custom_id)}) asks for model {quoted(request.model)}"
                raise BadInput(f"{what}, which no pool takes: add a pattern for it to the pools file", name)
            found[request.model] = pool
        share = shares.get(pool.name)
        if share is not None:
            pool = share.of(request)
        yield replace(request, pool=pool.name), pool


class _Share:
    """Divides the requests of a group over its pools, so that all are expected to end together."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools
        self._spread = Spread([pool.policy.params() for pool in pools])

    def of(self, request: Request) -> Pool:
        sizes = request.sizes
        needs = [
            pool.policy.weights.of(reserve_of(pool.policy, sizes), float(sizes.prompt_tokens)) for pool in self._pools
        ]
        return self._pools[self._spread.choose(needs, FIRST_TOKEN_S + PER_TOKEN_S * assumed_answer(sizes))]


def read_demands(
    path: Path, pools: Sequence[Pool], unseen: UnseenContent | None = None, *, file_tokens: int = TOKENS_PER_FILE
) -> dict[str, Demand]:
    """Return a batch file's demand on each pool, without sending or keeping anything.

    Raise BadInput for an invalid file. `unseen`: is told of every request. `file_tokens`: assumed for each file or
    other content that a request only points to.
    """
    demands = {pool.name: Demand() for pool in pools}
    with _opened(path) as file:
        requests = read_requests(file, str(path), keep_body=False, file_tokens=file_tokens, in_background=True)
        for request, pool in pooled(requests, pools, str(path)):
            demands[pool.name].add(request.model, request.sizes, reserve_of(pool.policy, request.sizes), request.tier)
            if unseen is not None:
                unseen.add(request)
    return demands


def _opened(path: Path) -> BinaryIO:
    name = str(path)
    try:
        if path.is_dir():
            raise BadInput("this is a folder: name a batch file (JSONL)", name)
        file = path.open("rb")
    except FileNotFoundError:
        raise BadInput("there is no such file", name) from None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", name) from None
    if not file.seekable():
        file.close()
        raise BadInput("a run can be resumed only from a file: write the lines to one first", name)
    return file


# ---------------------------------------------------------------- new, or resumed


def prepare(
    path: Path,
    out: Path | None,
    where: str | Path,
    pools: Sequence[Pool],
    *,
    seed: int,
    skip_oversized: bool = False,
    overwrite: bool = False,
    retry_failed: str | None = None,
    resend_changed: bool = False,
    file_tokens: int = TOKENS_PER_FILE,
    check: Check = check_fits,
) -> BatchBegun:
    """Return the journal of this run, created from the input or already there. All errors are found before a send.

    `check`: raises what a request must not be, `Oversized` if it may be left out.

    `resend_changed`: lines that changed after they were answered are sent again. `retry_failed`: None = no, "" = all
    that failed, else those with this failure code. Raise BadInput, Oversized or JournalError; an unfinished new journal
    is removed again.
    """
    if Journal.exists(where):
        return _resumed(
            path,
            out,
            where,
            pools,
            skip_oversized=skip_oversized,
            overwrite=overwrite,
            retry_failed=retry_failed,
            resend_changed=resend_changed,
            file_tokens=file_tokens,
            check=check,
        )
    for file in () if out is None else (out, errors_path(out)):
        # An empty file holds nothing to lose: a run that was ended before its first answer may have left it.
        if file.exists() and not overwrite and not (file.is_file() and file.stat().st_size == 0):
            raise BadInput(
                f"it exists, and no journal at {where} says that it is this run's: move it away, name another --out, "
                "or add --overwrite",
                str(file),
            )
    return _made(path, where, pools, seed, skip_oversized, file_tokens, check)


def _made(
    path: Path,
    where: str | Path,
    pools: Sequence[Pool],
    seed: int,
    skip_oversized: bool,
    file_tokens: int,
    check: Check,
) -> BatchBegun:
    _check_disk(path, where, None)
    demands = {pool.name: Demand() for pool in pools}
    oversized = 0

    def works(hashed: _Hashed) -> Iterator[Work]:
        nonlocal oversized
        for request, pool in pooled(
            read_requests(hashed, str(path), file_tokens=file_tokens, in_background=True), pools, str(path)
        ):
            work = work_of(request, pool.policy)
            try:
                check(request, int(work.reserve), pool)
            except Oversized:
                if not skip_oversized:
                    raise
                oversized += 1
            else:
                demands[pool.name].add(request.model, request.sizes, int(work.reserve), request.tier)
            yield work

    with _opened(path) as file:
        fingerprint = fingerprint_of(file)  # type: ignore[arg-type]
        file.seek(0)
        hashed = _Hashed(file)
        journal = Journal.create(where, fingerprint=fingerprint, seed=seed, epoch_s=time.time())
        try:
            journal.ingest(works(hashed))
            if hashed.sha256.hexdigest() != fingerprint:
                raise BadInput("it changed while it was read: let it be written to its end, then run again", str(path))
        except BaseException:
            journal.remove()
            raise
    return BatchBegun(journal, demands, True, oversized, 0)


def _is_of(journal: Journal, file: Path) -> bool:
    """Return whether a file of results or errors is this run's, by its first line; an empty one may be replaced.

    A crash under `--follow` may have cut that line short.
    """
    try:
        with file.open("rb") as opened:
            first = opened.readline(_HEAD_BYTES)
    except OSError:
        return True  # its own error is reported where the file is used
    number = _FIRST.match(first)
    if number is None:
        return not first.strip() or first in b'{"id":"batch_req_'
    custom_id = journal.custom_id(int(number[1]))
    head = b'{"id":"batch_req_%s","custom_id":%s,' % (number[1], json.dumps(custom_id).encode())
    return custom_id is not None and (first.startswith(head[:_HEAD_BYTES]) or head.startswith(first))


# The beginning of our lines, by which a file's run is recognised.
_FIRST = re.compile(rb'\{"id":"batch_req_([0-9]{1,15})"')
_HEAD_BYTES = 4_096


def _resumed(
    path: Path,
    out: Path | None,
    where: str | Path,
    pools: Sequence[Pool],
    *,
    skip_oversized: bool,
    overwrite: bool,
    retry_failed: str | None,
    resend_changed: bool,
    file_tokens: int,
    check: Check,
) -> BatchBegun:
    with _opened(path) as file:
        fingerprint = fingerprint_of(file)  # type: ignore[arg-type]
    journal = Journal.open(where, to_run=True)
    try:
        if journal.run().purged_epoch_s >= 0.0:
            raise JournalError(f"{journal.name}: it was purged, nothing is left to send or to write: start a new one")
        for target in () if overwrite or out is None else (out, errors_path(out)):
            if target.exists() and not _is_of(journal, target):
                raise BadInput(
                    f"it exists, and is not what {journal.name} has written: move it away, name another --out, or add "
                    "--overwrite",
                    str(target),
                )
        if journal.run().requests < 0:
            # Its process was killed while filling it: nothing has been sent yet.
            seed = journal.run().seed
            journal.remove()
            return _made(path, where, pools, seed, skip_oversized, file_tokens, check)
        counts = journal.counts()
        retried = 0 if retry_failed is None else counts.failures.get(retry_failed, 0) if retry_failed else counts.failed
        left = counts.pending + counts.in_flight + retried
        amended = None
        if journal.run().fingerprint != fingerprint:
            amended = _amended(
                path, journal, pools, fingerprint, resend_changed=resend_changed, file_tokens=file_tokens
            )
        demands, oversized = _left(journal, pools, skip_oversized, retry_failed, left, amended, check)
        _check_disk(path, where, left)
    except BaseException:
        journal.close()
        raise
    return BatchBegun(journal, demands, False, oversized, retried, amended)


def _amended(
    path: Path,
    journal: Journal,
    pools: Sequence[Pool],
    fingerprint: str,
    *,
    resend_changed: bool,
    file_tokens: int,
) -> AmendedInput:
    """Return the changes of a corrected input; they are known once `works` has been read to its end."""
    amendment = Amendment(journal)

    def works() -> Iterator[Work]:
        with _opened(path) as file:
            hashed = _Hashed(file)
            read = read_requests(hashed, str(path), file_tokens=file_tokens, in_background=True)
            changes = amendment.changes(read, resend=resend_changed, name=str(path))
            for request, pool in pooled(changes, pools, str(path)):
                yield work_of(request, pool.policy)
            if hashed.sha256.hexdigest() != fingerprint:
                raise BadInput("it changed while it was read: let it be written to its end, then run again", str(path))

    return AmendedInput(amendment, works, fingerprint)


def _left(
    journal: Journal,
    pools: Sequence[Pool],
    skip_oversized: bool,
    retry_failed: str | None,
    left: int,
    amended: AmendedInput | None,
    check: Check,
) -> tuple[dict[str, Demand], int]:
    """Return a journal's work left (`left` in all), under today's settings, and how many requests can never run."""
    demands = {pool.name: Demand() for pool in pools}
    oversized = taken = 0
    by_name = {pool.name: pool for pool in pools}

    def to_do() -> Iterator[Request]:
        nonlocal taken
        replaced: set[int] = set()
        if amended is not None:
            yield from (work.request for work in amended.works())
            replaced = amended.amendment.numbers
        for pool in pools:
            for request in journal.unfinished(pool.name, failed=retry_failed):
                taken += 1
                if request.index not in replaced:
                    yield request

    for request in to_do():
        pool = by_name[request.pool]
        reserve = reserve_of(pool.policy, request.sizes)
        try:
            check(request, reserve, pool)
        except Oversized:
            if not skip_oversized:
                raise
            oversized += 1
        else:
            demands[pool.name].add(request.model, request.sizes, reserve, request.tier)
    if taken < left:
        names = ", ".join(pool.name for pool in pools)
        raise BadInput(
            f"{left - taken:,} of its requests belong to a pool that is not among those of this command ({names}): "
            "use the pools file that it was begun with",
            journal.name,
        )
    return demands, oversized


def _check_disk(path: Path, where: str | Path, left: int | None) -> None:
    """Raise Refused if the journal, its log and the results would hardly fit on the disk together.

    `left`: requests left in an existing journal, which holds their bodies already; None = a journal to be created.
    """
    if "://" in str(where) or left == 0:
        return
    folder = Path(where).absolute().parent
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # its own error is reported where the file is used
    needed = disk_needed(size, lines) if left is None else disk_needed(0, left)
    if needed > free:
        raise Refused(
            f"the journal and the results need about {needed / 2**20:,.0f} MiB in {os.fspath(folder)}, "
            f"{free / 2**20:,.0f} MiB are free: make room, or name other places with --journal and --out"
        )


def disk_needed(size: int, lines: int) -> int:
    """Return the approximate bytes that journal and results of a batch file of this size will take.

    The journal's write-ahead log repeats every write until it is merged into the file every few MiB.
    """
    journal = round(size * JOURNAL_BYTES_PER_INPUT_BYTE + lines * JOURNAL_BYTES_PER_REQUEST)
    return journal + min(journal, WAL_BYTES) + lines * RESULT_BYTES_PER_REQUEST
