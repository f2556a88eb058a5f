"""The Batch API through the official SDK: its own calls for files and batches, read tolerantly.

An answer that is no success becomes `CallFailed` with an `Answer`, as for attempts. The SDK's own retries are off: a
creation that is repeated blindly would be a second batch.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping
from typing import Any, BinaryIO

from governor.batchapi.client import CallFailed, RemoteBatch, RemoteFile, batch_in, file_in
from governor.model.errors import BadSetting
from governor.model.pools import Pool
from governor.provider.answers import malformed
from governor.provider.openai_adapter import Adapter

_WINDOW = "24h"
# A file of 200 MB takes minutes; everything else is answered at once.
_TRANSFER_S, _CALL_S = 3_600.0, 60.0
_PAGE_BATCHES, _PAGE_FILES = 100, 10_000
# More pages than an account has: a server that repeats its list must not keep us for ever.
_PAGES_MAX = 1_000


def check_has_batches(pool: Pool) -> None:
    """Raise BadSetting if a pool's account has no Batch API that we know."""
    if pool.azure is not None:
        raise BadSetting(f"pool {pool.name} is an Azure deployment, whose Batch API is not supported: run it live")


class SdkBatchClient:
    """A `BatchClient` of one pool's account. `environment`: where the pool's variables are looked up.

    Raise BadSetting if the pool has no such API, or its key or address is unusable.
    """

    def __init__(self, pool: Pool, environment: Mapping[str, str]) -> None:
        check_has_batches(pool)
        self._adapter = Adapter(pool, environment)
        self._client = self._adapter.client

    async def aclose(self) -> None:
        """Close all connections."""
        await self._adapter.aclose()

    async def upload(self, name: str, content: BinaryIO) -> RemoteFile:
        """Store an input file under that name."""
        files = self._client.files.with_raw_response
        sent = files.create(file=(name, content, "application/jsonl"), purpose="batch", timeout=_TRANSFER_S)
        return file_in(await self._object(sent))

    async def create(self, file_id: str, endpoint: str, metadata: Mapping[str, str]) -> RemoteBatch:
        """Create a batch of an uploaded file."""
        made: Any = self._client.batches.with_raw_response.create
        values = {"input_file_id": file_id, "endpoint": endpoint, "metadata": dict(metadata)}
        return batch_in(await self._object(made(**values, completion_window=_WINDOW, timeout=_CALL_S)))

    async def retrieve(self, batch_id: str) -> RemoteBatch:
        """Return a batch as it is now."""
        return batch_in(await self._object(self._client.batches.with_raw_response.retrieve(batch_id, timeout=_CALL_S)))

    async def cancel(self, batch_id: str) -> RemoteBatch:
        """Have a batch cancelled."""
        return batch_in(await self._object(self._client.batches.with_raw_response.cancel(batch_id, timeout=_CALL_S)))

    async def batches(self, since_epoch_s: float) -> list[RemoteBatch]:
        """Return the account's batches that were created since then, newest first."""
        found: list[RemoteBatch] = []
        listed = self._client.batches.with_raw_response.list
        for _ in range(_PAGES_MAX):
            after: Any = {"after": found[-1].id} if found else {}
            page = await self._object(listed(limit=_PAGE_BATCHES, timeout=_CALL_S, **after), "data")
            found += [batch_in(each) for each in _data(page)]
            if not page.get("has_more") or not _data(page) or 0.0 <= found[-1].created_epoch_s < since_epoch_s:
                break
        return [batch for batch in found if batch.created_epoch_s < 0.0 or batch.created_epoch_s >= since_epoch_s]

    async def files(self) -> list[RemoteFile]:
        """Return the account's input files of batches."""
        found: list[RemoteFile] = []
        listed = self._client.files.with_raw_response.list
        for _ in range(_PAGES_MAX):
            after: Any = {"after": found[-1].id} if found else {}
            page = await self._object(listed(purpose="batch", limit=_PAGE_FILES, timeout=_CALL_S, **after), "data")
            found += [file_in(each) for each in _data(page)]
            if not page.get("has_more") or not _data(page):
                break
        return found

    async def download(self, file_id: str, into: BinaryIO) -> None:
        """Write a file's content, piece by piece."""
        try:
            streamed = self._client.files.with_streaming_response.content(file_id, timeout=_TRANSFER_S)
            async with streamed as response:
                async for part in response.iter_bytes():
                    into.write(part)
        except OSError:
            raise  # the disk's, not the provider's
        except Exception as error:
            raise CallFailed(self._adapter.failure(error)) from None

    async def delete(self, file_id: str) -> None:
        """Delete a file; one that is gone already counts as deleted."""
        try:
            await self._object(self._client.files.with_raw_response.delete(file_id, timeout=_CALL_S))
        except CallFailed as failed:
            if failed.answer.status != 404:
                raise

    async def _object(self, call: Awaitable[Any], holds: str = "id") -> dict[str, Any]:
        """Return the JSON object that a call returns: without what it holds, it would pass for "there is none"."""
        try:
            response = (await call).http_response
        except Exception as error:
            raise CallFailed(self._adapter.failure(error)) from None
        try:
            data = json.loads(response.content)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise CallFailed(malformed(f"{self._adapter.address} sent no JSON object", response.status_code))
        if not (isinstance(data.get("data"), list) if holds == "data" else data.get("id")):
            raise CallFailed(malformed(f"{self._adapter.address} sent an object without {holds}", response.status_code))
        return data


def _data(page: Mapping[str, Any]) -> list[dict[str, Any]]:
    data = page.get("data")
    return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
