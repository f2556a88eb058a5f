"""A Pydantic AI agent over a governed client."""

from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from paceline import governed

agent = Agent(OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=governed(AsyncOpenAI()))))
for n in range(10):
    print(agent.run_sync(f"Say the number {n} in French.").output)
