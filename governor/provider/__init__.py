"""What an HTTP answer means, and the calls to a provider: the OpenAI adapter, the probe, a client's own transport."""
