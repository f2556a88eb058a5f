"""The virtual loop: time jumps exactly, one timer at a time, and nothing goes unheard."""

from __future__ import annotations

import asyncio

import pytest

from tests.virtual_loop import Deadlock, run_virtual


def test_the_virtual_loop_jumps_exactly_and_reports_a_deadlock() -> None:
    async def sleepers() -> list[float]:
        loop = asyncio.get_running_loop()
        times = []
        for delay in (0.1, 0.2, 86_400.0, 1e-12):
            expected = loop.time() + delay
            await asyncio.sleep(delay)
            assert loop.time() == expected
            times.append(loop.time())
        return times

    assert len(run_virtual(sleepers())) == 4

    async def stuck() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_virtual(stuck())


def test_the_virtual_loop_raises_what_nobody_took() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1.0, lambda: 1 / 0)
        await asyncio.sleep(2.0)

    with pytest.raises(ZeroDivisionError):
        run_virtual(main())
