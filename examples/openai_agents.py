"""The OpenAI Agents SDK over a governed client."""

from agents import Agent, Runner, set_default_openai_client
from openai import AsyncOpenAI

from paceline import governed

set_default_openai_client(governed(AsyncOpenAI()), use_for_tracing=False)
agent = Agent(name="translator", model="gpt-4o-mini")
for n in range(10):
    print(Runner.run_sync(agent, f"Say the number {n} in French.").final_output)
