"""What an HTTP answer means, and the calls to a provider: the OpenAI adapter and the probe."""
