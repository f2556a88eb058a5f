"""OpenAI's files and batches endpoints of the synthetic provider, over the model in `sim/model/batches.py`.

The lines of a batch are answered by the same `Desk` as live requests, when the batch is created; the answers are
written into its output and error files when it ends. No live limit holds them back, and nothing is charged to one.
Files stay in memory until they are deleted or the provider is reset. `expires_after` and `output_expires_after` are
read over; of the endpoints that the real Batch API takes, those that this provider serves are known.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from governor.batchapi.limits import (
    BATCH_CANCELLED,
    BATCH_EXPIRED,
    CANCELLED,
    ENDED,
    EXPIRED,
    FAILED,
    FILE_BYTES,
    VALIDATING,
)
from governor.model.requests import URLS, endpoint_of
from sim.model.batches import Batch, BatchQueue, check_file
from sim.serving import wire
from sim.serving.replies import Desk, Reply

PREFIXES = ("/v1/files", "/v1/batches")
WINDOW = "24h"
# What the multipart form takes beside the file, at most.
FORM_BYTES = 100_000
# After so many lines others get their turn.
LINES_AT_A_TIME = 200

_FILE = re.compile(r"/v1/files/([^/]+)(/content)?")
_BATCH = re.compile(r"/v1/batches/([^/]+)(/cancel)?")
_BYTES = b"application/octet-stream"
_PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
_UNFINISHED = {
    EXPIRED: (BATCH_EXPIRED, "This request could not be executed before the completion window expired."),
    CANCELLED: (BATCH_CANCELLED, "This request was not executed because the batch was cancelled."),
}


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded or written file. `created_at` in the provider's seconds."""

    id: str
    content: bytes
    filename: str
    purpose: str
    created_at: float


@dataclass(slots=True)
class BatchRecord:
    """A batch with what HTTP needs of it. `replies`: one per line, until the files have been written."""

    id: str
    batch: Batch
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    custom_ids: list[str]
    replies: list[Reply]
    is_written: bool = False
    output_file_id: str | None = None
    error_file_id: str | None = None
    # One byte per line: whether its answer is a success.
    is_ok: bytes = b""
    usage: dict[str, Any] | None = None


Listed = TypeVar("Listed", File, BatchRecord)


class ApiRefusal(Exception):  # noqa: N818  (an answer of the provider, not a fault of this program)
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = wire.error_body(message, "invalid_request_error", code, param)


@dataclass(slots=True)
class BatchDesk:
    """The files and batches of one account.

    `desk` answers the lines, `queue` knows how far each batch is.
    """

    desk: Desk
    queue: BatchQueue = field(init=False)
    files: dict[str, File] = field(default_factory=dict)
    jobs: dict[str, BatchRecord] = field(default_factory=dict)
    _made: Counter[str] = field(default_factory=Counter)
    # One at a time: 50,000 lines take seconds, in which a live request waits for one at most (while a file is checked).
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.queue = BatchQueue(self.desk.config.batch_api, self.desk.seed, wire.ORGANIZATION)

    def stats(self, now: float) -> dict[str, Any]:
        """Return counts for `GET /_stats`: files, batches by status, enqueued tokens by model, now and at the most."""
        # A request under way goes by the moment at which it began.
        if not self._lock.locked():
            self.queue.advance(now)
        return {
            "files": len(self.files),
            "batches": dict(Counter(job.batch.status for job in self.jobs.values())),
            "enqueued_tokens": dict(self.queue.enqueued),
            "enqueued_tokens_max": dict(self.queue.enqueued_max),
        }

    async def answer(
        self, request: Request, path: str, clock: Callable[[], float], stamp: Callable[[float], int]
    ) -> tuple[int, bytes, bytes]:
        """Return status, body and content type of the answer to a request at one of these paths.

        `clock` gives the provider's seconds, `stamp` turns them into the Unix time that the client is told.
        """
        try:
            sent = await self._sent(request, path)
            async with self._lock:
                now = clock()
                self.queue.advance(now)
                await self._write_files()
                found = await self._answer(request, path, sent, now, stamp)
        except ApiRefusal as refusal:
            return refusal.status, refusal.body, wire.JSON
        if isinstance(found, bytes):
            return 200, found, _BYTES
        return 200, json.dumps(found).encode(), wire.JSON

    async def _sent(self, request: Request, path: str) -> dict[str, Any]:
        """Return the fields of a POST, from its form or its JSON."""
        if request.method != "POST" or path not in PREFIXES:
            return {}
        if path == "/v1/batches":
            try:
                body = json.loads(await request.body())
            except (ValueError, RecursionError):
                raise ApiRefusal(400, "We could not parse the JSON body of your request.") from None
            if not isinstance(body, dict):
                raise ApiRefusal(400, "The JSON body of a request must be an object.")
            return body
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > FILE_BYTES + FORM_BYTES:
            raise ApiRefusal(400, "File is too large.")
        try:
            async with request.form() as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiRefusal(400, "Missing required parameter: 'file'.", "missing_required_parameter", "file")
                return {"purpose": form.get("purpose"), "name": file.filename or "upload", "content": await file.read()}
        except MultiPartException as error:
            raise ApiRefusal(400, f"We could not parse the form of your request: {error.message}") from None

    async def _answer(
        self, request: Request, path: str, sent: dict[str, Any], now: float, stamp: Callable[[float], int]
    ) -> dict[str, Any] | bytes:
        method, query = request.method, request.query_params
        if path == "/v1/files" and method == "POST":
            return _file_object(self._upload(sent, now), stamp)
        if path == "/v1/files" and method == "GET":
            kept = [file for file in self.files.values() if query.get("purpose", file.purpose) == file.purpose]
            if query.get("order", "desc") == "desc":
                kept.reverse()
            return _page(kept, lambda file: _file_object(file, stamp), query, 10_000, 10_000)
        if path == "/v1/batches" and method == "POST":
            return _batch_object(await self._create(sent, now), now, stamp)
        if path == "/v1/batches" and method == "GET":
            jobs = list(reversed(self.jobs.values()))
            return _page(jobs, lambda job: _batch_object(job, now, stamp), query, 20, 100)
        if (found := _FILE.fullmatch(path)) is not None and method in (("GET",) if found[2] else ("GET", "DELETE")):
            file = self.files.get(found[1])
            if file is None:
                raise ApiRefusal(404, f"No such File object: {found[1]}", param="id")
            if found[2]:
                return file.content
            if method == "GET":
                return _file_object(file, stamp)
            del self.files[file.id]
            return {"id": file.id, "object": "file", "deleted": True}
        if (found := _BATCH.fullmatch(path)) is not None and method == ("POST" if found[2] else "GET"):
            job = self.jobs.get(found[1])
            if job is None:
                raise ApiRefusal(404, f"No batch found with id '{found[1]}'.")
            if found[2] and not self.queue.cancel(job.batch, now):
                raise ApiRefusal(409, f"Cannot cancel a batch with status '{job.batch.status}'.")
            return _batch_object(job, now, stamp)
        raise ApiRefusal(404, f"Invalid URL ({method} {path})")

    # ------------------------------------------------------------ files

    def _upload(self, sent: dict[str, Any], now: float) -> File:
        purpose = sent["purpose"]
        if purpose not in _PURPOSES:
            message = f"'{purpose}' is not one of {list(_PURPOSES)} - 'purpose'"
            raise ApiRefusal(400, message, param="purpose")
        if len(sent["content"]) > FILE_BYTES:
            raise ApiRefusal(400, "File is too large.")
        return self._keep(sent["content"], sent["name"], purpose, now)

    def _keep(self, content: bytes, filename: str, purpose: str, now: float) -> File:
        self._made["files"] += 1
        file = File(f"file-{self._made['files']:024x}", content, filename, purpose, now)
        self.files[file.id] = file
        return file

    # ------------------------------------------------------------ batches

    async def _create(self, sent: dict[str, Any], now: float) -> BatchRecord:
        endpoint, file_id, metadata = sent.get("endpoint"), sent.get("input_file_id"), sent.get("metadata")
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(sent.get(name), str):
                raise ApiRefusal(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
        if endpoint not in URLS:
            supported = ", ".join(f"'{url}'" for url in URLS)
            message = f"Invalid value: '{endpoint}'. Supported values are: {supported}."
            raise ApiRefusal(400, message, "invalid_value", "endpoint")
        if sent["completion_window"] != WINDOW:
            message = f"Invalid value: '{sent['completion_window']}'. Value must be '{WINDOW}'."
            raise ApiRefusal(400, message, "invalid_value", "completion_window")
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise ApiRefusal(400, "Invalid type for 'metadata': expected strings by name.", "invalid_type", "metadata")
        file = self.files.get(file_id or "")
        if file is None:
            raise ApiRefusal(400, f"No such File object: {file_id}", param="input_file_id")
        if file.purpose != "batch":
            message = f"Invalid file purpose: '{file.purpose}'. The input file of a batch has the purpose 'batch'."
            raise ApiRefusal(400, message, param="input_file_id")
        lines, problems = check_file(file.content, endpoint)
        replies: list[Reply] = []
        tokens = 0
        for i, line in enumerate(lines if not problems else ()):
            reply, prompt_tokens = self.desk.batch_reply(endpoint_of(endpoint), line.body)
            replies.append(reply)
            tokens += prompt_tokens
            if i % LINES_AT_A_TIME == LINES_AT_A_TIME - 1:
                await asyncio.sleep(0)
        content = hashlib.blake2b(file.content, digest_size=8, key=endpoint.encode()).hexdigest()
        self._made[content] += 1
        key = hashlib.blake2b(f"{content}-{self._made[content]}".encode(), digest_size=8).digest()
        batch = self.queue.submit(
            int.from_bytes(key, "big") >> 1,
            model=lines[0].body["model"] if replies else "",
            tokens=tokens,
            lines=len(replies),
            problems=problems,
            now=now,
        )
        custom_ids = [line.custom_id for line in lines[: len(replies)]]
        job = BatchRecord(f"batch_{key.hex()}", batch, endpoint, file.id, metadata, custom_ids, replies)
        job.is_ok = bytes(reply.status == 200 for reply in replies)
        self.jobs[job.id] = job
        return job

    async def _write_files(self) -> None:
        """Write the output and error files of batches that have ended since."""
        for job in self.jobs.values():
            batch = job.batch
            if job.is_written or batch.status not in ENDED:
                continue
            if batch.status != FAILED:
                await self._write(job, batch.entered[batch.status])
            job.is_written = True
            job.replies, job.custom_ids = [], []

    async def _write(self, job: BatchRecord, ended_at: float) -> None:
        batch = job.batch
        answered = batch.answered(ended_at)
        output: list[bytes] = []
        errors: list[bytes] = []
        input_tokens = output_tokens = 0
        for place, i in enumerate(batch.order):
            head = f'{{"id":"batch_req_{job.id[6:]}{i:06d}","custom_id":{json.dumps(job.custom_ids[i])},"response":'
            if place < answered:
                reply = job.replies[i]
                response = f'{{"status_code":{reply.status},"request_id":"req_{job.id[6:]}{i:06d}","body":'.encode()
                line = b"".join([head.encode(), response, reply.whole_body(), b'},"error":null}\n'])
                (output if job.is_ok[i] else errors).append(line)
                if (written := reply.written) is not None:
                    input_tokens += written.prompt_tokens
                    self.desk.count.bill(written, "batch")
                    output_tokens += written.output_tokens
            elif batch.status in _UNFINISHED:
                code, message = _UNFINISHED[batch.status]
                errors.append(f'{head}null,"error":{json.dumps({"code": code, "message": message})}}}\n'.encode())
            if place % LINES_AT_A_TIME == LINES_AT_A_TIME - 1:
                await asyncio.sleep(0)
        if output:
            job.output_file_id = self._keep(b"".join(output), f"{job.id}_output.jsonl", "batch_output", ended_at).id
        if errors:
            job.error_file_id = self._keep(b"".join(errors), f"{job.id}_error.jsonl", "batch_output", ended_at).id
        job.usage = {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        }


# ---------------------------------------------------------------- forms


def _file_object(file: File, stamp: Callable[[float], int]) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": len(file.content),
        "created_at": stamp(file.created_at),
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _batch_object(job: BatchRecord, now: float, stamp: Callable[[float], int]) -> dict[str, Any]:
    batch = job.batch
    is_counted = batch.status not in (VALIDATING, FAILED)
    done = batch.order[: batch.answered(now)]
    completed = sum(job.is_ok[i] for i in done)
    # Until validation is over nothing that it finds is known.
    problems = [problem._asdict() for problem in batch.problems] if batch.status == FAILED else []
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.endpoint,
        "model": batch.model if is_counted else None,
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": job.input_file_id,
        "completion_window": WINDOW,
        "status": batch.status,
        "output_file_id": job.output_file_id,
        "error_file_id": job.error_file_id,
        "created_at": stamp(batch.created_at),
        "expires_at": stamp(batch.expires_at),
        **{f"{name}_at": stamp(batch.entered[name]) if name in batch.entered else None for name in times},
        "request_counts": {
            "total": len(job.is_ok) if is_counted else 0,
            "completed": completed,
            "failed": len(done) - completed,
        },
        "usage": job.usage,
        "metadata": job.metadata,
    }


def _page(
    listed: list[Listed], form: Callable[[Listed], dict[str, Any]], query: Mapping[str, str], default: int, most: int
) -> dict[str, Any]:
    """Return one page of a list: `limit` objects after the one that `after` names."""
    limit = query.get("limit", str(default))
    if not re.fullmatch("[0-9]{1,9}", limit) or not 1 <= int(limit) <= most:
        raise ApiRefusal(400, f"Invalid 'limit': {limit}. It must be from 1 to {most:,}.", "invalid_value", "limit")
    first = 0
    if "after" in query:
        places = [i for i, each in enumerate(listed) if each.id == query["after"]]
        if not places:
            raise ApiRefusal(400, f"Invalid 'after': {query['after']} is not in this list.", "invalid_value", "after")
        first = places[0] + 1
    data = [form(each) for each in listed[first : first + int(limit)]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": first + len(data) < len(listed),
    }
