"""The calls of the Batch API that a wave needs, and the values that they return; `sdk_client` makes them.

Objects are read tolerantly: a field that is missing or of another kind counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

from governor.batchapi.limits import ENDED
from governor.model.requests import Answer


class CallFailed(Exception):  # noqa: N818  (an answer of the provider, not a fault of this program)
    """A call did not succeed; `answer` says what came instead."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.message)
        self.answer = answer


class RemoteFile(NamedTuple):
    """A file in the account."""

    id: str
    name: str


class Complaint(NamedTuple):
    """One thing that is wrong with a batch. `line`: of its input file, counted from 1; 0 = not a line's fault."""

    code: str
    message: str
    line: int


@dataclass(frozen=True, slots=True)
class RemoteBatch:
    """A batch in the account. Ids: "" = none. Stamps: seconds since 1970, -1 = absent. `input_tokens`: -1 = absent."""

    id: str
    status: str
    input_file_id: str = ""
    output_file_id: str = ""
    error_file_id: str = ""
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = -1
    created_epoch_s: float = -1.0
    ended_epoch_s: float = -1.0
    complaints: tuple[Complaint, ...] = ()
    metadata: Mapping[str, str] | None = None

    @property
    def has_ended(self) -> bool:
        """Return whether it does not change any more."""
        return self.status in ENDED


class BatchClient(Protocol):
    """Calls one account. Every method may raise `CallFailed`."""

    async def upload(self, name: str, content: BinaryIO) -> RemoteFile:
        """Store an input file under that name."""

    async def create(self, file_id: str, endpoint: str, metadata: Mapping[str, str]) -> RemoteBatch:
        """Create a batch of an uploaded file."""

    async def retrieve(self, batch_id: str) -> RemoteBatch:
        """Return a batch as it is now."""

    async def cancel(self, batch_id: str) -> RemoteBatch:
        """Have a batch cancelled."""

    async def batches(self, since_epoch_s: float) -> list[RemoteBatch]:
        """Return the account's batches that were created since then, newest first."""

    async def files(self) -> list[RemoteFile]:
        """Return the account's input files of batches."""

    async def download(self, file_id: str, into: BinaryIO) -> None:
        """Write a file's content."""

    async def delete(self, file_id: str) -> None:
        """Delete a file; one that is gone already counts as deleted."""

    async def aclose(self) -> None:
        """Close all connections."""


# ---------------------------------------------------------------- reading objects


def file_in(data: Mapping[str, Any]) -> RemoteFile:
    """Return a file object."""
    return RemoteFile(_text(data.get("id")), _text(data.get("filename")))


def batch_in(data: Mapping[str, Any]) -> RemoteBatch:
    """Return a batch object."""
    counts, usage, errors = (_object(data.get(name)) for name in ("request_counts", "usage", "errors"))
    ends = [_number(data.get(f"{name}_at")) for name in ENDED]
    metadata = data.get("metadata")
    return RemoteBatch(
        id=_text(data.get("id")),
        status=_text(data.get("status")),
        input_file_id=_text(data.get("input_file_id")),
        output_file_id=_text(data.get("output_file_id")),
        error_file_id=_text(data.get("error_file_id")),
        total=_count(counts.get("total")),
        completed=_count(counts.get("completed")),
        failed=_count(counts.get("failed")),
        input_tokens=_count(usage.get("input_tokens")) if usage else -1,
        created_epoch_s=_number(data.get("created_at")),
        ended_epoch_s=max(ends),
        complaints=tuple(_complaints(errors.get("data"))),
        metadata={str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else None,
    )


def _complaints(data: object) -> Iterator[Complaint]:
    for each in data if isinstance(data, list) else ():
        if isinstance(each, dict):
            yield Complaint(_text(each.get("code")), _text(each.get("message")), _count(each.get("line")))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 2**53 else 0


def _number(value: object) -> float:
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            return float(value)
    return -1.0
