"""Ray Data: workers that share one quota through PACELINE_REDIS_URL."""

import ray
from openai import OpenAI

from paceline import governed


class Ask:
    def __init__(self) -> None:
        self.client = governed(OpenAI())

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return {"answer": self.client.responses.create(model="gpt-4o-mini", input=row["text"]).output_text}


texts = ray.data.from_items([{"text": f"Say the number {n} in French."} for n in range(10)], override_num_blocks=4)
workers = ray.data.ActorPoolStrategy(size=2)
print(texts.map(Ask, compute=workers).to_pandas())  # type: ignore[arg-type]
