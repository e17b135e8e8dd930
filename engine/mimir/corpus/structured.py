"""JSON objects from a description, tool calls from a question, answers from a tool's result, simple instructions."""

import json
from collections.abc import Callable
from random import Random

from engine.mimir.corpus import fillers as f
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import Chat, Turn, ask, pick, sentence

TOOLS_HEAD = "# Tools\nAnswer with a call when one of these functions helps:\n<tools>\n"
TOOLS_TAIL = '</tools>\nWrite a call as <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'

ValueMaker = Callable[[Random], object]
# description, {parameter: (type, maker)}, questions, reply to a result, makers of the result's fields
Tool = tuple[str, dict[str, tuple[str, ValueMaker]], tuple[str, ...], str, dict[str, ValueMaker]]

TOOLS: dict[str, Tool] = {
    "get_weather": (
        "Get the weather of a city",
        {"city": ("string", f.known_place)},
        (
            "What is the weather in {city}?",
            "How is the weather in {city}?",
            "Is it warm in {city}?",
            "Tell me the weather in {city}.",
            "What's the weather like in {city} today?",
        ),
        "It is {temperature} degrees and {sky} in {city}.",
        {"temperature": lambda r: r.randint(-9, 38), "sky": lambda r: pick(r, "sunny", "cloudy", "rainy", "windy")},
    ),
    "get_time": (
        "Get the current time in a city",
        {"city": ("string", f.known_place)},
        ("What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?"),
        "It is {time} in {city}.",
        {"time": lambda r: f"{r.randint(0, 23):02}:{r.randint(0, 59):02}"},
    ),
    "add": (
        "Add two numbers",
        {"a": ("integer", lambda r: r.randint(1, 9999)), "b": ("integer", lambda r: r.randint(1, 9999))},
        ("What is {a} plus {b}?", "Add {a} and {b}.", "Compute {a} + {b}."),
        "The result is {result}.",
        {"result": lambda r: r.randint(2, 19998)},
    ),
    "multiply": (
        "Multiply two numbers",
        {"a": ("integer", lambda r: r.randint(2, 999)), "b": ("integer", lambda r: r.randint(2, 999))},
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "Compute {a} * {b}."),
        "The result is {result}.",
        {"result": lambda r: r.randint(4, 998001)},
    ),
    "search": (
        "Search the web",
        {"query": ("string", lambda r: f"{r.choice(w.ADJECTIVES)} {r.choice(w.OBJECTS + w.NOUNS)}")},
        ("Search for {query}.", "Look up {query} on the web.", "Find pages about {query}."),
        "I found: {title}",
        {"title": lambda r: f"{sentence(r.choice(w.ADJECTIVES))} {r.choice(w.NOUNS)} {f.code(r)}"},
    ),
    "send_message": (
        "Send a message to a person",
        {"to": ("string", f.known_person), "text": ("string", f.filler_sentence)},
        ("Send {to} this message: {text}", "Tell {to}: {text}", "Write to {to}: {text}"),
        "The message to {to} was sent.",
        {"status": lambda r: "sent"},
    ),
    "get_price": (
        "Get the price of a product",
        {"product": ("string", lambda r: r.choice(w.OBJECTS + w.FOODS))},
        ("What does the {product} cost?", "How much is the {product}?", "Price of {product}?"),
        "The {product} costs {price} euros.",
        {"price": lambda r: r.randint(1, 999)},
    ),
    "find_user": (
        "Find a user by name",
        {"name": ("string", f.known_person)},
        ("Find the user {name}.", "Look up {name}.", "Which id does the user {name} have?"),
        "{name} has the id {id}.",
        {"id": f.code},
    ),
    "set_timer": (
        "Set a timer",
        {"minutes": ("integer", lambda r: r.randint(1, 90))},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Timer: {minutes} minutes."),
        "The timer is set to {minutes} minutes.",
        {"status": lambda r: "ok"},
    ),
}


def schema(name: str) -> dict[str, object]:
    """The OpenAI form of a tool."""
    description, parameters, *_ = TOOLS[name]
    properties = {key: {"type": kind} for key, (kind, _) in parameters.items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


def tool_system(names: list[str], system: str = "") -> str:
    """The system turn that offers tools, as the chat template writes it."""
    listed = "".join(json.dumps(schema(name)) + "\n" for name in names)
    return (f"{system}\n\n" if system else "") + TOOLS_HEAD + listed + TOOLS_TAIL


def tool_call(name: str, arguments: dict[str, object]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def tool_use(rng: Random, size: int) -> Chat:
    """One to three tools on offer: a call, or (four in ten) the sentence made of the call's result."""
    names = rng.sample(sorted(TOOLS), rng.randint(1, 3))
    name = rng.choice(names)
    _, parameters, questions, reply, makers = TOOLS[name]
    arguments = {key: make(rng) for key, (_, make) in parameters.items()}
    system = pick(rng, "", "", "You are a helpful assistant.")
    turns = [
        Turn("system", tool_system(names, system)),
        Turn("user", rng.choice(questions).format(**arguments)),
        Turn("assistant", tool_call(name, arguments)),
    ]
    if rng.random() < 0.6:
        return Chat(tuple(turns), turns[-1].text)
    result = {key: make(rng) for key, make in makers.items()}
    text = reply.format(**arguments, **result)
    return Chat((*turns, Turn("tool", json.dumps(result)), Turn("assistant", text)), text)


def json_object(rng: Random, size: int) -> Chat:
    """A flat object described in words or pairs, to be written as JSON."""
    makers = {
        "name": f.known_person,
        "city": f.known_place,
        "age": lambda r: r.randint(5, 95),
        "colour": lambda r: r.choice(w.COLOURS),
        "job": lambda r: r.choice(w.JOBS),
        "id": f.code,
        "count": lambda r: r.randint(0, 99),
        "active": lambda r: r.random() < 0.5,
        "item": lambda r: r.choice(w.OBJECTS),
        "price": lambda r: r.randint(1, 999),
    }
    content = {key: makers[key](rng) for key in rng.sample(sorted(makers), rng.randint(1, 5))}
    pairs = ", ".join(f"{key} {json.dumps(value)}" for key, value in content.items())
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in content.items())
    question = pick(
        rng,
        f"Write as JSON: {pairs}",
        f"Make a JSON object with {pairs}.",
        f"Convert to JSON.\n{lines}",
        f"{lines}\n\nGive me this as JSON.",
        f"Return a JSON object: {pairs}",
        f"JSON please: {pairs}",
    )
    return ask(question, json.dumps(content))


def json_list(rng: Random, size: int) -> Chat:
    """A JSON array of given words, quoted in half of the questions."""
    items = [rng.choice(w.ANIMALS + w.COLOURS + w.FOODS + w.OBJECTS) for _ in range(rng.randint(2, 6))]
    listed = ", ".join(json.dumps(item) for item in items) if rng.random() < 0.5 else ", ".join(items)
    question = pick(
        rng, f"Write these words as a JSON list: {listed}", f"Make a JSON array of {listed}.", f"JSON list of: {listed}"
    )
    return ask(question, json.dumps(items))


def instruction(rng: Random, size: int) -> Chat:
    """One simple operation on given words: case, order, first and last, number of words."""
    items = [rng.choice(w.ANIMALS + w.COLOURS + w.FOODS) for _ in range(rng.randint(2, 6))]
    listed, spaced, name = ", ".join(items), " ".join(items), f.word(rng)
    ordered = sorted(set(items[:4]))
    options = (
        ((f"Write {name} in uppercase.", f'Convert "{name}" to uppercase.', f"Uppercase: {name}"), name.upper()),
        ((f"Write {name.upper()} in lowercase.", f"Lowercase: {name.upper()}"), name),
        (
            (f"Reverse this list: {listed}", f"Write {listed} in reverse order.", f"Reverse the list {listed}."),
            ", ".join(reversed(items)),
        ),
        (
            (
                f"Sort these words: {', '.join(dict.fromkeys(items[:4]))}",
                f"Sort alphabetically: {', '.join(dict.fromkeys(items[:4]))}",
            ),
            ", ".join(ordered),
        ),
        ((f"What is the first word of: {spaced}?", f"First word: {spaced}"), items[0]),
        ((f"What is the last word of: {spaced}?", f"Last word: {spaced}"), items[-1]),
        ((f"How many words are there: {spaced}?", f"Count the words: {spaced}"), str(len(items))),
        ((f"Write {name} three times.", f"Repeat {name} three times."), " ".join([name] * 3)),
        (("Name an animal.", "Give me an animal."), "dog"),
        ((f"List three {pick(rng, 'animals')}.", "Name three animals."), "dog, cat, horse"),
        (("List three colours.", "Name three colors."), "red, blue, green"),
        (("List three fruits.", "Name three fruits."), "apples, bananas, oranges"),
        (("Count to five.", "Count from one to five."), "1, 2, 3, 4, 5"),
        (
            (f"Write a list with one line per item: {listed}", f"Make a bullet list: {listed}"),
            "\n".join(f"- {item}" for item in items),
        ),
    )
    questions, reply = rng.choice(options)
    return ask(rng.choice(questions), reply)
