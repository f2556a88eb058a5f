"""The SDK's client of the Batch API: an answer that does not hold what was asked for is a failed call."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from governor.batchapi.client import CallFailed
from governor.batchapi.sdk_client import SdkBatchClient


@pytest.mark.parametrize(
    ("content", "holds"), [("{}", "id"), ('{"id": ""}', "id"), ('{"data": 7}', "data"), ("[1]", "id")]
)
def test_an_object_without_what_it_should_hold_is_a_failed_call(content: str, holds: str) -> None:
    client: Any = object.__new__(SdkBatchClient)
    client._adapter = SimpleNamespace(address="http://127.0.0.1")

    async def call() -> Any:
        return SimpleNamespace(http_response=SimpleNamespace(content=content, status_code=200))

    with pytest.raises(CallFailed):
        asyncio.run(client._object(call(), holds))
