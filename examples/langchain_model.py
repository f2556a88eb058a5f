"""A LangChain chat model, governed: its chains, agents and batches wait instead of being refused."""

from langchain_openai import ChatOpenAI

from paceline import governed

model = governed(ChatOpenAI(model="gpt-4o-mini", max_completion_tokens=200))
for message in model.batch([f"Say the number {n} in French." for n in range(10)]):
    print(message.text)
