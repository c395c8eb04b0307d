"""One session of a Python client at the door: several turns, with tools that run, one of which returns a picture.

python_clients.py CLIENT URL PROMPT... prints the text of each turn as a JSON line. It knows nothing about Antefix.
"""

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path

MODEL = "antefix-tiny"
RUN = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}


def run(command: str) -> str:
    """Runs a command."""
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout


def picture(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def tell(text: str) -> None:
    print(json.dumps({"text": text}), flush=True)


def openai_chat(url: str, prompts: list[str], *, stream: bool = False) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    tools = [{"type": "function", "function": {"name": "run", "description": "Runs a command.", "parameters": RUN}}]
    messages: list = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        while True:
            if stream:
                with client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as events:
                    message = events.get_final_completion().choices[0].message
            else:
                answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
                message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                result = run(json.loads(call.function.arguments)["command"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        tell(message.content)


def openai_chat_streamed(url: str, prompts: list[str]) -> None:
    openai_chat(url, prompts, stream=True)


def openai_responses(url: str, prompts: list[str]) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    tools = [
        {"type": "function", "name": "run", "description": "Runs a command.", "parameters": RUN, "strict": False},
        {"type": "function", "name": "look", "description": "Looks.", "parameters": LOOK, "strict": False},
    ]
    items: list = []
    for prompt in prompts:
        items.append({"role": "user", "content": prompt})
        while True:
            with client.responses.stream(model=MODEL, input=items, tools=tools, store=False) as events:
                answer = events.get_final_response()
            items += answer.output
            calls = [item for item in answer.output if item.type == "function_call"]
            if not calls:
                break
            for call in calls:
                arguments = json.loads(call.arguments)
                result: object
                if call.name == "look":
                    link = f"data:image/png;base64,{picture(arguments['path'])}"
                    result = [{"type": "input_image", "image_url": link}]
                else:
                    result = run(arguments["command"])
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})
        tell(answer.output_text)


LOOK = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


def anthropic(url: str, prompts: list[str]) -> None:
    import anthropic as sdk

    client = sdk.Anthropic(base_url=url, api_key="k", max_retries=0)
    tools = [
        {"name": "run", "description": "Runs a command.", "input_schema": RUN},
        {"name": "look", "description": "Looks.", "input_schema": LOOK, "cache_control": {"type": "ephemeral"}},
    ]
    messages: list = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        while True:
            with client.messages.stream(
                model=MODEL,
                max_tokens=4096,
                messages=messages,
                tools=tools,
                thinking={"type": "enabled", "budget_tokens": 2000},
            ) as events:
                answer = events.get_final_message()
            messages.append({"role": "assistant", "content": answer.content})
            calls = [block for block in answer.content if block.type == "tool_use"]
            if not calls:
                break
            messages.append({"role": "user", "content": [_anthropic_result(call) for call in calls]})
        tell("".join(block.text for block in answer.content if block.type == "text"))


def _anthropic_result(call) -> dict:
    result: object
    if call.name == "look":
        source = {"type": "base64", "media_type": "image/png", "data": picture(call.input["path"])}
        result = [{"type": "image", "source": source}]
    else:
        result = run(call.input["command"])
    return {"type": "tool_result", "tool_use_id": call.id, "content": result}


def litellm(url: str, prompts: list[str], name: str = f"openai/{MODEL}") -> None:
    import litellm as sdk

    sdk.telemetry = False
    tools = [{"type": "function", "function": {"name": "run", "description": "Runs a command.", "parameters": RUN}}]
    base = {"openai": f"{url}/v1", "deepseek": f"{url}/v1", "anthropic": url}[name.split("/")[0]]
    more = {"max_tokens": 4096, "reasoning_effort": "high"} if name.startswith("anthropic") else {}
    messages: list = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        while True:
            answer = sdk.completion(
                model=name, messages=messages, tools=tools, api_base=base, api_key="k", num_retries=0, **more
            )
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                result = run(json.loads(call.function.arguments)["command"])
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        tell(message.content)


def litellm_deepseek(url: str, prompts: list[str]) -> None:
    litellm(url, prompts, f"deepseek/{MODEL}")


def litellm_anthropic(url: str, prompts: list[str]) -> None:
    litellm(url, prompts, "anthropic/claude-sonnet-4-5")


def openai_agents(url: str, prompts: list[str], *, use_responses: bool = True) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    kind = agents.OpenAIResponsesModel if use_responses else agents.OpenAIChatCompletionsModel

    def look(path: str) -> agents.ToolOutputImage:
        """Looks at a picture."""
        return agents.ToolOutputImage(image_url=f"data:image/png;base64,{picture(path)}")

    agent = agents.Agent(
        name="A",
        instructions="You are an agent.",
        model=kind(model=MODEL, openai_client=client),
        tools=[agents.function_tool(run), agents.function_tool(look)] if use_responses else [agents.function_tool(run)],
    )

    async def session() -> None:
        items: list = []
        for prompt in prompts:
            items.append({"role": "user", "content": prompt})
            result = agents.Runner.run_streamed(agent, items)
            async for _ in result.stream_events():
                pass
            items = result.to_input_list()
            tell(result.final_output)

    asyncio.run(session())


def openai_agents_chat(url: str, prompts: list[str]) -> None:
    openai_agents(url, prompts, use_responses=False)


def pydantic_ai(url: str, prompts: list[str], kind: str = "chat") -> None:
    from pydantic_ai import Agent, BinaryContent
    from pydantic_ai.models.anthropic import AnthropicModel, AnthropicModelSettings
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    settings: dict = {}
    if kind == "anthropic":
        model = AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="k"))
        thinking = {"type": "enabled", "budget_tokens": 2000}
        settings = AnthropicModelSettings(anthropic_thinking=thinking, max_tokens=4096, anthropic_cache=True)
    else:
        of_kind = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
        model = of_kind(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="k"))

    def look(path: str) -> BinaryContent:
        """Looks at a picture."""
        return BinaryContent(data=Path(path).read_bytes(), media_type="image/png")

    agent = Agent(model, tools=[run, look], model_settings=settings, instructions="You are an agent.")

    async def session() -> None:
        history: list = []
        for prompt in prompts:
            async with agent.iter(prompt, message_history=history) as running:
                async for _ in running:
                    pass
            history = running.result.all_messages()
            tell(running.result.output)

    asyncio.run(session())


def pydantic_ai_responses(url: str, prompts: list[str]) -> None:
    pydantic_ai(url, prompts, "responses")


def pydantic_ai_anthropic(url: str, prompts: list[str]) -> None:
    pydantic_ai(url, prompts, "anthropic")


def langchain(url: str, prompts: list[str], kind: str = "chat") -> None:
    from langchain.agents import create_agent
    from langchain_anthropic import ChatAnthropic
    from langchain_openai import ChatOpenAI

    if kind == "anthropic":
        thinking = {"type": "enabled", "budget_tokens": 2000}
        model = ChatAnthropic(model=MODEL, base_url=url, api_key="k", max_tokens=4096, thinking=thinking, max_retries=0)
    else:
        model = ChatOpenAI(
            model=MODEL,
            base_url=f"{url}/v1",
            api_key="k",
            max_retries=0,
            use_responses_api=kind == "responses",
            **({"output_version": "responses/v1", "store": False} if kind == "responses" else {}),
        )

    def look(path: str) -> list:
        """Looks at a picture."""
        return [{"type": "image", "base64": picture(path), "mime_type": "image/png"}]

    agent = create_agent(model, tools=[run, look] if kind != "chat" else [run], system_prompt="You are an agent.")
    messages: list = []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        messages = agent.invoke({"messages": messages})["messages"]
        tell(messages[-1].text if isinstance(messages[-1].text, str) else messages[-1].text())


def langchain_responses(url: str, prompts: list[str]) -> None:
    langchain(url, prompts, "responses")


def langchain_anthropic(url: str, prompts: list[str]) -> None:
    langchain(url, prompts, "anthropic")


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], sys.argv[3:])
