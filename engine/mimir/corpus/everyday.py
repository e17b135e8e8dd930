"""Everyday chat: greetings, who the model is, simple facts of the world, and a polite no to everything else."""

from random import Random

from engine.mimir.corpus import fillers as f
from engine.mimir.corpus import knowledge as k
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import Chat, Turn, dialogue, pick, sentence

SYSTEMS = (
    "You are a helpful assistant.",
    "You are Mimir.",
    "You are a helpful assistant. Answer briefly.",
    "Answer the user's questions.",
    "You are Mimir, a small helpful model.",
    "Be brief.",
    "You are a friendly assistant.",
)
SYSTEM_SHARE = 0.25


def small_talk(rng: Random) -> list[str]:
    """One exchange, as user text and reply."""
    kind = rng.random()
    if kind < 0.45:
        questions, replies = rng.choice(k.SMALL_TALK)
        return [rng.choice(questions), rng.choice(replies)]
    if kind < 0.75:
        return identity(rng)
    return fact(rng)


def identity(rng: Random) -> list[str]:
    questions, reply = rng.choice(k.IDENTITY)
    return [rng.choice(questions), reply]


def fact(rng: Random) -> list[str]:
    """A question about the world, with its answer."""
    return rng.choice(
        (
            _capital,
            _capital,
            _language,
            _colour,
            _opposite,
            _definition,
            _definition,
            _next_day,
            _known,
            _known,
            _country,
        )
    )(rng)


def _capital(rng: Random) -> list[str]:
    country, city = rng.choice(list(k.CAPITALS.items()))
    return [
        pick(
            rng,
            f"What is the capital of {country}?",
            f"What's the capital of {country}?",
            f"Capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
            f"Name the capital of {country}.",
            f"Do you know the capital of {country}?",
        ),
        f"The capital of {country} is {city}.",
    ]


def _country(rng: Random) -> list[str]:
    country, city = rng.choice(list(k.CAPITALS.items()))
    return [
        pick(
            rng,
            f"In which country is {city}?",
            f"Which country is {city} in?",
            f"Where is {city}?",
            f"What country has {city} as its capital?",
        ),
        f"{city} is in {country}.",
    ]


def _language(rng: Random) -> list[str]:
    country, language = rng.choice(list(k.LANGUAGES.items()))
    return [
        pick(
            rng,
            f"Which language is spoken in {country}?",
            f"What language do people speak in {country}?",
            f"What do they speak in {country}?",
        ),
        f"People in {country} speak {language}.",
    ]


def _colour(rng: Random) -> list[str]:
    thing, colour = rng.choice(list(k.THING_COLOURS.items()))
    verb = "are" if thing.endswith("s") and thing != "grass" else "is"
    return [
        pick(
            rng,
            f"What colour {verb} {thing}?",
            f"Which colour {verb} {thing}?",
            f"What color {verb} {thing}?",
            f"Tell me the colour of {thing}.",
        ),
        f"{sentence(thing)} {verb} {colour}.",
    ]


def _opposite(rng: Random) -> list[str]:
    one, other = rng.choice(list(k.OPPOSITES.items()))
    return [
        pick(
            rng,
            f"What is the opposite of {one}?",
            f"Opposite of {one}?",
            f"Give me the opposite of {one}.",
            f'What is the opposite of "{one}"?',
        ),
        f"The opposite of {one} is {other}.",
    ]


def _definition(rng: Random) -> list[str]:
    thing, text = rng.choice(list(k.DEFINITIONS.items()))
    return [
        pick(
            rng,
            f"What is {thing}?",
            f"What's {thing}?",
            f"Define {thing}.",
            f"Explain what {thing} is.",
            f"What does {thing} mean?",
            f"Can you explain {thing}?",
            f"Do you know what {thing} is?",
        ),
        text,
    ]


def _next_day(rng: Random) -> list[str]:
    names, unit = rng.choice(((k.WEEKDAYS, "day"), (k.MONTHS, "month")))
    spot = rng.randrange(len(names))
    name, after, before = names[spot], names[(spot + 1) % len(names)], names[spot - 1]
    if rng.random() < 0.6:
        return [
            pick(rng, f"Which {unit} comes after {name}?", f"What {unit} follows {name}?", f"What comes after {name}?"),
            f"{after} comes after {name}.",
        ]
    return [
        pick(rng, f"Which {unit} comes before {name}?", f"What comes before {name}?"),
        f"{before} comes before {name}.",
    ]


def _known(rng: Random) -> list[str]:
    questions, reply = rng.choice(k.FACTS)
    return [rng.choice(questions), reply]


def _declined(rng: Random) -> list[str]:
    topic = pick(
        rng,
        f.invented(rng),
        f.word(rng),
        rng.choice(w.COMMON),
        f.person(rng),
        f.invented(rng).capitalize(),
        f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.NOUNS)}",
    )
    return [rng.choice(k.DECLINED).format(x=topic), k.DECLINE_MORE[rng.random() < 0.7]]


def chat(rng: Random, size: int) -> Chat:
    """One to three everyday exchanges; the last answer counts."""
    texts: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        made = small_talk(rng) if kind < 0.4 else fact(rng) if kind < 0.8 else _declined(rng)
        texts += [_vary(rng, made[0]), made[1]]
    return dialogue(*texts, system=rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE else None)


def _vary(rng: Random, question: str) -> str:
    """The question as typed by someone careless, now and then."""
    kind = rng.random()
    if kind < 0.08:
        return question.lower()
    if kind < 0.16:
        return question.rstrip("?.!")
    if kind < 0.2:
        return pick(rng, "Please: ", "Hi! ", "Hello, ", "One question: ") + question
    return question


def context_first(rng: Random, size: int) -> Chat:
    """A text in the system turn and an exchange about something else: context alone does not force a quotation."""
    text = " ".join(f.haystack(rng, max(20, min(size, 120))))
    question, reply = small_talk(rng)
    return Chat((Turn("system", text), Turn("user", question), Turn("assistant", reply)), reply)
