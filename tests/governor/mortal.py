"""A process that runs a journal and may be killed at any moment: run by `test_journal_harm`, never imported by it.

`python mortal.py JOURNAL LEDGER REQUESTS SEED` reads numbers from stdin. For each it forks a child and prints its
process id; on the next line, whatever it says, it waits for the child's end and prints its status. (Until it is waited
for, nobody else gets a dead child's number: whoever kills it kills the right one.) A child makes or resumes the journal
and runs what is left with the real driver; each request that is sent is written to the ledger first, straight to the
operating system: what stands there was sent, whatever became of the child. (Forked from a process that has imported
everything and runs no thread, a child costs milliseconds.)
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from governor.journal.journal import Journal
from governor.model.keyed import keyed_uniform
from governor.model.requests import Answer
from governor.model.work import Job
from governor.scheduler.driver import Governor
from tests.governor.journals import FREE, answer, refusal, works

CONCURRENCY = 12


def lived(path: str, ledger: int, requests: int, seed: int, life: int) -> None:
    """One child's life: number `life` of this journal."""
    policy = FREE.with_(max_concurrency=CONCURRENCY, launch_order="longest_first" if seed % 2 else "fifo")
    if Journal.exists(path):
        journal = Journal.open(path, to_run=True, fingerprint="print")
    else:
        journal = Journal.create(path, fingerprint="print", seed=seed, epoch_s=time.time())
    with journal:
        if journal.run().requests < 0:
            journal.ingest(works(requests))
        at_s = max(journal.last_s(), time.time() - journal.run().epoch_s)
        recorder = journal.begin({"default": policy}, at_s).recorders["default"]

        async def send(job: Job, timeout_s: float) -> Answer:
            os.write(ledger, f"{life} {job.index} {job.attempt}\n".encode())
            await asyncio.sleep(0.012 * keyed_uniform(seed, job.index, life, 1))
            return refusal() if job.index % 6 == 0 and job.attempt == 1 else answer(job.index)

        async def main() -> float:
            governor = Governor(policy.params(), seed=seed, observer=recorder, state=recorder.state, start_s=at_s)
            source = journal.pending(longest_first=policy.launch_order == "longest_first")
            why = await governor.run((pending.work for pending in source), send)
            assert not why, why
            return governor.now()

        journal.finish(asyncio.run(main()), "finished")


def main() -> None:
    path, ledger_path, requests, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ledger = os.open(ledger_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                lived(path, ledger, requests, seed, int(line))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
