"""One quota over many processes, kept in Redis and decided by the same law."""
