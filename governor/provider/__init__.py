"""The meaning of HTTP answers, and calls to a provider: the OpenAI adapter, the probe, a client's own transport."""
