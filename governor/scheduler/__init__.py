"""The queue in front of the law: launch order and times, retries, deadlines, finalize passes; the asyncio driver."""
