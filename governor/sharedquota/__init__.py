"""One quota over many processes, kept in Redis and decided by the law in each of them."""
