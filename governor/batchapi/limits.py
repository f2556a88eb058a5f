"""What the Batch API allows, and what is assumed of it. Sources: docs/explanation/provider.md#batch-files."""

from __future__ import annotations

# Of one input file. Embedding inputs are counted over all of its lines.
FILE_LINES, FILE_BYTES, EMBEDDING_INPUTS = 50_000, 200_000_000, 50_000
# A batch that has not ended by then expires, and keeps the answers that it has.
EXPIRES_S = 86_400.0
# P50 and P95 assumed if none have been measured: no provider publishes its turnaround.
TURNAROUND_S = (4 * 3_600.0, 20 * 3_600.0)
# Left free of the queue: estimates of English text are off by some 10 % (docs/explanation/provider.md#sizes).
QUEUE_HEADROOM = 0.15

# The states of a batch object. A batch in one of the last four does not change any more.
VALIDATING, IN_PROGRESS, FINALIZING, CANCELLING = "validating", "in_progress", "finalizing", "cancelling"
FAILED, COMPLETED, EXPIRED, CANCELLED = "failed", "completed", "expired", "cancelled"
ENDED = (FAILED, COMPLETED, EXPIRED, CANCELLED)

# Codes of a batch's errors, and of the lines that it has not executed.
TOKEN_LIMIT_EXCEEDED = "token_limit_exceeded"
BATCH_EXPIRED, BATCH_CANCELLED = "batch_expired", "batch_cancelled"


def usable_tokens(queue_tokens: int) -> float:
    """Return how many estimated input tokens may be in a queue of that limit; 0 = no limit, hence inf."""
    return queue_tokens * (1.0 - QUEUE_HEADROOM) if queue_tokens else float("inf")
