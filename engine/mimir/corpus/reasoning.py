"""Aggregation over the context, variable tracking, copying, small arithmetic, and short written-out thinking."""

from collections import Counter
from random import Random

from engine.mimir.corpus import fillers as f
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import THINK, Chat, Turn, ask, estimate_tokens, pick

WORD_LISTS = (w.ANIMALS, w.COLOURS, w.FOODS, w.OBJECTS, w.NOUNS)
MAX_COUNT = 6


def count_word(rng: Random, size: int) -> Chat:
    """How often one word occurs in a list."""
    listed = rng.choice(WORD_LISTS)
    target, times = rng.choice(listed), rng.randint(0, MAX_COUNT)
    others = [rng.choice(listed) for _ in range(rng.randint(2, max(5, min(size // 3, 20))))]
    items = [item for item in others if item != target] + [target] * times
    rng.shuffle(items)
    question = pick(
        rng,
        f'How many times does "{target}" appear?',
        f"Count the word {target}.",
        f"How often is {target} in the list?",
        f"How many times is {target} listed?",
    )
    return ask(f"{', '.join(items)}\n\n{question}", f'"{target}" appears {_times(times)}.', _times(times))


def _times(count: int) -> str:
    return "1 time" if count == 1 else f"{count} times"


def most_frequent(rng: Random, size: int) -> Chat:
    """The most frequent word of a list, ahead of the second by at least two."""
    kinds = rng.sample(rng.choice(WORD_LISTS), rng.randint(2, 5))
    top = rng.randint(4, 8 if size < 200 else 12)
    items = [kinds[0]] * top + [kind for kind in kinds[1:] for _ in range(rng.randint(1, top - 2))]
    rng.shuffle(items)
    question = pick(
        rng,
        "Which word is the most frequent?",
        "Which word appears most often?",
        "What is the most common word in the list?",
        "Find the most frequent word.",
    )
    return ask(f"{', '.join(items)}\n\n{question}", f"The most frequent word is {kinds[0]}.", kinds[0])


def total(rng: Random, size: int) -> Chat:
    """Sum of two to four small numbers given as a list or as prices."""
    numbers = [rng.randint(1, 9) for _ in range(rng.choice((2, 2, 3, 3, 4)))]
    things = rng.sample(w.FOODS + w.OBJECTS, len(numbers))
    priced = ", ".join(f"{thing} {number}" for thing, number in zip(things, numbers, strict=True))
    listed = ", ".join(map(str, numbers))
    question = pick(
        rng,
        f"What is the sum of {listed}?",
        f"Add the numbers {listed}.",
        f"Prices: {priced}. What is the total?",
        f"Sum these numbers: {listed}",
        f"What do these cost together? {priced}",
    )
    return ask(question, f"The total is {sum(numbers)}.", str(sum(numbers)))


def largest(rng: Random, size: int) -> Chat:
    """The largest or smallest of some two-digit numbers."""
    numbers = rng.sample(range(10, 100), rng.randint(2, 5))
    largest_wanted = rng.random() < 0.5
    chosen = max(numbers) if largest_wanted else min(numbers)
    kind = pick(rng, "largest", "biggest", "highest") if largest_wanted else pick(rng, "smallest", "lowest")
    listed = ", ".join(map(str, numbers))
    question = pick(
        rng,
        f"Which is the {kind} number: {listed}?",
        f"What is the {kind} of {listed}?",
        f"Find the {kind} number in this list: {listed}",
    )
    return ask(question, f"The {kind} number is {chosen}.", str(chosen))


def variables(rng: Random, size: int) -> Chat:
    """Chains of assignments in filler; the value of one variable is asked (at most three hops)."""
    names = f.distinct(rng, rng.choice((3, 4, 6, 8)), _variable)
    content: dict[str, str] = {}
    lines = []
    for name in names:
        if content and rng.random() < 0.5:
            source = rng.choice(list(content))
            content[name] = content[source]
            lines.append(pick(rng, f"{name} = {source}", f"{name} = {source}", f"let {name} = {source}"))
        else:
            content[name] = f.number(rng, 1, 4)
            lines.append(f"{name} = {content[name]}")
    room = size - sum(map(estimate_tokens, lines)) - 30
    mixed = f.scatter(rng, lines, f.haystack(rng, room) if room > 20 else [])
    name = rng.choice(names)
    question = pick(
        rng,
        f"What is the value of {name}?",
        f"What is {name}?",
        f"Which value does {name} have?",
        f"What number does {name} hold at the end?",
    )
    text = "\n".join(mixed)
    return ask(f"{text}\n\n{question}", f"{name} = {content[name]}", content[name])


def _variable(rng: Random) -> str:
    letter = rng.choice("abcdefghijklmnpqrstuvwxyz")
    return pick(
        rng, letter, f"{letter}{rng.randint(1, 9)}", f"{letter.upper()}{rng.randint(1, 9)}", rng.choice(w.OBJECTS)
    )


def copy(rng: Random, size: int) -> Chat:
    """Repeat a given text exactly."""
    kind = rng.randrange(4)
    if kind == 0:
        text = " ".join(f.word(rng) for _ in range(rng.randint(2, 10)))
    elif kind == 1:
        text = " ".join(f.filler_sentence(rng) for _ in range(rng.randint(1, max(1, min(size // 20, 4)))))
    elif kind == 2:
        text = " ".join(f.code(rng) for _ in range(rng.randint(1, 6)))
    else:
        text = " ".join(f.number(rng) for _ in range(rng.randint(1, 5)))
    question = pick(
        rng,
        f"Repeat this: {text}",
        f"Say exactly: {text}",
        f"Copy the following text.\n{text}",
        f"Repeat after me: {text}",
        f'Write "{text}" again, nothing else.',
        f"Echo: {text}",
        f"Say: {text}",
        f"{text}\n\nRepeat the text above word for word.",
    )
    return ask(question, text)


def arithmetic(rng: Random, size: int) -> Chat:
    """One operation on numbers up to 99 (factors up to 10)."""
    return _operation(rng, (9, 20, 20, 50, 99))


def small_arithmetic(rng: Random, size: int) -> Chat:
    """One operation on numbers up to ten."""
    return _operation(rng, (5, 10))


def _operation(rng: Random, limits: tuple[int, ...]) -> Chat:
    sign = rng.choice("++--*")
    high = min(10, max(limits)) if sign == "*" else rng.choice(limits)
    left, right = rng.randint(0, high), rng.randint(0, high)
    if sign == "-":
        left, right = max(left, right), min(left, right)
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    spoken = {"+": "plus", "-": "minus", "*": "times"}[sign]
    question = pick(
        rng,
        f"What is {left} {sign} {right}?",
        f"{left} {sign} {right} = ?",
        f"What is {left} {spoken} {right}?",
        f"Compute {left} {sign} {right}.",
        f"How much is {left} {spoken} {right}?",
        f"{left}{sign}{right}",
        f"What's {left}{sign}{right}?",
        f"Calculate {left} {spoken} {right}.",
    )
    return ask(question, f"{left} {sign} {right} = {result}", str(result))


def thinking(rng: Random, size: int) -> Chat:
    """A task answered after a short thought that names the needed facts."""
    maker = rng.choice((_think_arithmetic, _think_lookup, _think_variables))
    return maker(rng, size)


def _thought(question: str, thought: str, reply: str, answer: str) -> Chat:
    return Chat((Turn("user", question), Turn("assistant", f"{THINK}{thought}\n</think>\n{reply}")), answer)


def _think_arithmetic(rng: Random, size: int) -> Chat:
    numbers = [rng.randint(1, 9) for _ in range(rng.choice((2, 3, 3)))]
    steps, running = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{running} + {number} = {running + number}.")
        running += number
    question = pick(rng, "What is the sum of ", "Add ", "Sum ") + ", ".join(map(str, numbers)) + "."
    return _thought(question, " ".join(steps), f"The total is {running}.", str(running))


def _think_lookup(rng: Random, size: int) -> Chat:
    owners = f.distinct(rng, rng.randint(2, 6), f.person)
    facts = {owner: f.place(rng) for owner in owners}
    owner = rng.choice(owners)
    lines = f.scatter(rng, [f"{o} lives in {c}." for o, c in facts.items()], f.haystack(rng, min(size // 2, 100)))
    question = f"{' '.join(lines)}\n\nWhere does {owner} live?"
    return _thought(
        question, f"The text says: {owner} lives in {facts[owner]}.", f"{owner} lives in {facts[owner]}.", facts[owner]
    )


def _think_variables(rng: Random, size: int) -> Chat:
    first, second, third = f.distinct(rng, 3, _variable)
    number = f.number(rng, 1, 3)
    lines = [f"{first} = {number}", f"{second} = {first}", f"{third} = {second}"]
    question = "\n".join(lines) + f"\n\nWhat is {third}?"
    return _thought(
        question, f"{third} = {second}, {second} = {first}, {first} = {number}.", f"{third} = {number}", number
    )


def positions(rng: Random, size: int) -> Chat:
    """First, last, next or previous item of a list."""
    items = rng.sample(rng.choice(WORD_LISTS), rng.randint(3, 7))
    spot = rng.randrange(len(items) - 1)
    kind = rng.randrange(4)
    listed = ", ".join(items)
    asked, answer = (("first", items[0]), ("last", items[-1]), ("next", items[spot + 1]), ("previous", items[spot]))[
        kind
    ]
    question = (
        f"What is the first word in the list: {listed}?",
        f"What is the last word of {listed}?",
        f"In the list {listed}, which word comes after {items[spot]}?",
        f"In the list {listed}, which word comes before {items[spot + 1]}?",
    )[kind]
    reply = (
        f"The {asked} word is {answer}."
        if kind < 2
        else f"{answer} comes {'after' if kind == 2 else 'before'} {items[spot] if kind == 2 else items[spot + 1]}."
    )
    return ask(question, reply, answer)


def frequencies(chat: Chat) -> Counter[str]:
    """Words of the list that opens a question, for tests."""
    return Counter(chat.turns[0].text.split("\n\n")[0].split(", "))
