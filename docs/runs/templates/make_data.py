"""Writes conversations.jsonl: system and developer turns, reasoning, tools, several turns, an unlearned answer."""

import json
from pathlib import Path

WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ADD = {
    "name": "add",
    "description": "The sum of two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
}


def turn(role: str, content: str | None, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


CONVERSATIONS = {
    "one question": [turn("user", "Name a river in France."), turn("assistant", "The Loire.")],
    "three turns behind a system turn": [
        turn("system", "Answer in one sentence."),
        turn("user", "What is a mill?"),
        turn("assistant", "A mill grinds grain."),
        turn("user", "What drives it?"),
        turn("assistant", "Water or wind drives it."),
        turn("user", "And today?"),
        turn("assistant", "Today mostly electricity."),
    ],
    "reasoning in both turns": [
        turn("user", "Is 91 a prime number?"),
        turn("assistant", "No, it is 7 times 13.", reasoning_content="91 / 7 = 13, so it has divisors."),
        turn("user", "And 97?"),
        turn("assistant", "Yes.", reasoning_content="No prime up to 9 divides 97."),
    ],
    "reasoning, a tool, and its result": [
        turn("user", "Do I need an umbrella in Lyon?"),
        turn(
            "assistant", "", reasoning_content="I must look at the weather.", tool_calls=[call("weather", city="Lyon")]
        ),
        turn("tool", '{"sky": "rain"}', name="weather", tool_call_id="call00001"),
        turn("assistant", "Yes, it is raining in Lyon.", reasoning_content="Rain means an umbrella."),
    ],
    "a tool in an earlier turn": [
        turn("user", "How much is 19 and 23?"),
        turn("assistant", "", tool_calls=[call("add", a=19, b=23)]),
        turn("tool", "42", name="add", tool_call_id="call00001"),
        turn("assistant", "It is 42."),
        turn("user", "Thanks!"),
        turn("assistant", "You are welcome."),
    ],
    "an answer that is not learned": [
        turn("user", "Spell 'rhythm'."),
        turn("assistant", "rythm", weight=0),
        turn("user", "Look again."),
        turn("assistant", "rhythm"),
    ],
    "a developer's turn": [
        turn("developer", "Speak like a sailor."),
        turn("user", "How are you?"),
        turn("assistant", "Shipshape, matey."),
    ],
}
TOOLS = {"reasoning, a tool, and its result": [WEATHER], "a tool in an earlier turn": [ADD]}


def main() -> None:
    rows = [
        {"name": name, "messages": turns} | ({"tools": TOOLS[name]} if name in TOOLS else {})
        for name, turns in CONVERSATIONS.items()
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (Path(__file__).parent / "conversations.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
