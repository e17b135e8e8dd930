"""Names, values and sentences that carry no information: the slots and the haystack of every task."""

from collections.abc import Callable
from random import Random

from engine.mimir.corpus import python_source
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import a, estimate_tokens, pick, sentence

INVENTED_SHARE = 0.3  # of names that are in no list, so that copying does not depend on known words
PROSE_SHARE = 0.25  # of haystacks taken from the Python reference instead of generated sentences


def invented(rng: Random) -> str:
    """A made-up word of two or three syllables."""
    return "".join(rng.choice(w.SYLLABLES) for _ in range(rng.choice((2, 2, 3))))


def person(rng: Random) -> str:
    return sentence(invented(rng)) if rng.random() < INVENTED_SHARE else rng.choice(w.FIRST_NAMES)


def place(rng: Random) -> str:
    return sentence(invented(rng)) if rng.random() < INVENTED_SHARE else rng.choice(w.CITIES)


def known_person(rng: Random) -> str:
    return rng.choice(w.FIRST_NAMES)


def known_place(rng: Random) -> str:
    return rng.choice(w.CITIES)


def distinct(rng: Random, count: int, make: Callable[[Random], str]) -> list[str]:
    """`count` different results of `make(rng)`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def number(rng: Random, low: int = 2, high: int = 6) -> str:
    """A number of `low` to `high` digits."""
    size = rng.randint(low, high)
    return str(rng.randint(10 ** (size - 1), 10**size - 1))


def code(rng: Random) -> str:
    """A short code such as K7-204 or xq81."""
    letters = "".join(rng.choice("abcdefghjkmnpqrstuvwxyz") for _ in range(rng.randint(1, 3)))
    digits = number(rng, 2, 4)
    return pick(
        rng,
        f"{letters.upper()}{digits}",
        f"{letters.upper()}-{digits}",
        f"{letters}{digits}",
        f"{digits}{letters}",
        f"{letters}_{digits}",
    )


def word(rng: Random) -> str:
    if rng.random() < INVENTED_SHARE:
        return invented(rng)
    return rng.choice(rng.choice((w.OBJECTS, w.ANIMALS, w.NOUNS, w.FOODS, w.PLACES, w.ADJECTIVES)))


def value(rng: Random) -> str:
    """Something to look up: a number most of the time, else a word, a code or an adjective with a noun."""
    kind = rng.random()
    if kind < 0.5:
        return number(rng)
    if kind < 0.7:
        return word(rng)
    return code(rng) if kind < 0.85 else f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.OBJECTS)}"


def entity(rng: Random) -> str:
    """Something that can own a value: a name, a place, a coloured object, a topic with a letter."""
    kind = rng.random()
    if kind < 0.3:
        return person(rng)
    if kind < 0.55:
        return place(rng)
    if kind < 0.75:
        return f"the {rng.choice(w.ADJECTIVES)} {rng.choice(w.OBJECTS + w.NOUNS)}"
    return f"{rng.choice(w.TOPICS)} {rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ')}"


def filler_sentence(rng: Random) -> str:
    """A plain sentence without names or numbers that a task could ask for."""
    adjective, noun, verb = rng.choice(w.ADJECTIVES), rng.choice(w.NOUNS), rng.choice(w.VERBS)
    other, thing, spot = rng.choice(w.NOUNS), rng.choice(w.OBJECTS), rng.choice(w.PLACES)
    animal, hobby, food = rng.choice(w.ANIMALS), rng.choice(w.HOBBIES), rng.choice(w.FOODS)
    return sentence(
        pick(
            rng,
            f"the {adjective} {noun} {verb} near the {spot}.",
            f"every {noun} {verb} when the {other} is {adjective}.",
            f"{a(animal)} {verb} behind the {spot} and nobody minds.",
            f"in the {spot} there is {a(adjective)} {thing}.",
            f"some people like {hobby}, others prefer {food}.",
            f"the {thing} stands beside the {other}.",
            f"it was {a(adjective)} {noun}, and the {animal} was gone.",
            f"she put the {thing} into the {spot}.",
            f"they talked about {hobby} and {food} for an hour.",
            f"the {other} and the {noun} are both {adjective}.",
            f"nobody saw the {animal} in the {adjective} {spot}.",
            f"we had {food} in the {spot} after {hobby}.",
            f"the {noun} {verb} slowly, then the {other} {verb} too.",
            f"he never found the {thing} near the {noun}.",
        )
    )


def haystack(rng: Random, num_tokens: int) -> list[str]:
    """Filler sentences of about `num_tokens` tokens in all."""
    if num_tokens > 60 and rng.random() < PROSE_SHARE:
        return _prose(rng, num_tokens)
    lines, total = [], 0
    while total < num_tokens:
        lines.append(filler_sentence(rng))
        total += estimate_tokens(lines[-1])
    return lines


def _prose(rng: Random, num_tokens: int) -> list[str]:
    """Consecutive lines of reference prose from a random place."""
    lines, total = [], 0
    while total < num_tokens:
        text = rng.choice(python_source.prose())
        start = rng.randrange(max(1, len(text) - num_tokens * 4))
        for line in text[start : start + num_tokens * 5].splitlines()[1:]:
            if line.strip():
                lines.append(line.strip())
                total += int(estimate_tokens(line) * 1.25)
            if total >= num_tokens:
                break
    return lines


def scatter(rng: Random, items: list[str], lines: list[str]) -> list[str]:
    """`items`, in order, at random places between `lines`."""
    places = sorted(rng.randint(0, len(lines)) for _ in items)
    mixed = list(lines)
    for offset, (spot, item) in enumerate(zip(places, items, strict=True)):
        mixed.insert(spot + offset, item)
    return mixed
