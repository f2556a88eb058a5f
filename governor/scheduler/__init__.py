"""The queue in front of the law: who launches next and when, retries, deadlines, finalize passes; the asyncio
driver."""
