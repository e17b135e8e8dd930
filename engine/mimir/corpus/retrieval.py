"""Finding one or several facts in a long context: needles in prose, key-value records, tables."""

from collections.abc import Callable
from random import Random

from engine.mimir.corpus import fillers as f
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import Chat, ask, dialogue, estimate_tokens, pick

ATTRIBUTES = (
    "access code",
    "secret number",
    "magic word",
    "password",
    "phone number",
    "room number",
    "key",
    "price",
    "special code",
    "ticket number",
    "secret word",
    "address",
    "serial number",
    "nickname",
    "pin",
    "delivery code",
    "size",
    "label",
    "batch number",
    "signal",
)
BARE = ("Answer with the value only.", "Reply with just the value.", "Only give the value.", "Value only, please.")
BARE_SHARE = 0.12
QUOTED_SHARE = 0.8
LONG_CONTEXT = 400  # tokens from which a talk asks more questions
QUESTION_TOKENS = 45  # room left for instructions, question and markup


def needle(rng: Random, size: int) -> Chat:
    """One asked fact, up to seven of the same form about others, in about `size` tokens of filler."""
    context, exchanges = _needles(rng, size, 1)
    return _conversation(rng, context, exchanges)


def needle_single(rng: Random, size: int) -> Chat:
    """The usual needle test: one fact in filler, and nothing like it anywhere near."""
    context, exchanges = _needles(rng, size, 1, num_owners=1)
    return _conversation(rng, context, exchanges)


def needle_talk(rng: Random, size: int) -> Chat:
    """Several needles, asked in turn: up to six, up to twelve in long contexts."""
    context, exchanges = _needles(rng, size, rng.randint(2, 6 if size < LONG_CONTEXT else 12), _ask_apart)
    return _conversation(rng, context, exchanges)


def needle_first(rng: Random, size: int) -> Chat:
    """One needle whose question stands before the context."""
    context, [(question, reply, value)] = _needles(rng, size, 1)
    text = pick(
        rng,
        f"{question}\n\n{context}",
        f"Question: {question}\n\nText: {context}",
        f"{question}\n\nContext:\n{context}",
        f"Answer this: {question}\nHere is the text.\n{context}",
    )
    return ask(text, reply, value)


Exchange = tuple[str, str, str]  # question, reply, essential part of the reply


def _needles(
    rng: Random,
    size: int,
    num_questions: int,
    ask_fact: Callable[[Random, str, str], str] | None = None,
    num_owners: int | None = None,
) -> tuple[str, list[Exchange]]:
    """Context and exchanges; `ask_fact` words the question from attribute and owner, `_ask_needle` by default."""
    ask_fact = ask_fact or _ask_needle
    attribute = rng.choice(ATTRIBUTES)
    owners = f.distinct(rng, num_owners or max(num_questions, rng.choice((1, 1, 2, 3, 4, 6, 8))), f.entity)
    facts = {owner: f.value(rng) for owner in owners}
    form = rng.randrange(4)
    lines = [_fact(form, attribute, owner, value) for owner, value in facts.items()]
    asked = rng.sample(owners, num_questions)
    exchanges = [
        (ask_fact(rng, attribute, owner), f"The {attribute} {_link(form)} {owner} is {facts[owner]}.", facts[owner])
        for owner in asked
    ]
    return _bury(rng, lines, size - 25 * (num_questions - 1)), exchanges


def _ask_needle(rng: Random, attribute: str, owner: str) -> str:
    return pick(
        rng,
        f"What is the {attribute} for {owner}?",
        f"What is the {attribute} of {owner}?",
        f"Tell me the {attribute} for {owner}.",
        f"Which {attribute} belongs to {owner}?",
        f"I need the {attribute} for {owner}.",
        f"Find the {attribute} of {owner} in the text.",
        f"What {attribute} does the text give for {owner}?",
        f"Which {attribute} does {owner} have?",
    )


def _ask_apart(rng: Random, attribute: str, owner: str) -> str:
    """Mostly a question in which the owner does not follow the attribute as in the fact: the ones most often missed.

    "belongs to" was missed most: no "for" or "of" before the owner tells it from the other owners in the context.
    """
    if rng.random() < 0.3:
        return _ask_needle(rng, attribute, owner)
    return pick(
        rng,
        f"Which {attribute} belongs to {owner}?",
        f"Which {attribute} belongs to {owner}?",
        f"Which {attribute} does {owner} have?",
        f"What {attribute} does the text give for {owner}?",
    )


def _link(form: int) -> str:
    return "of" if form == 1 else "for"


def _fact(form: int, attribute: str, owner: str, value: str) -> str:
    return (
        f"The {attribute} for {owner} is {value}.",
        f"The {attribute} of {owner} is {value}.",
        f"Remember: the {attribute} for {owner} is {value}.",
        f"One thing matters: the {attribute} for {owner} is {value}.",
    )[form]


def _bury(rng: Random, lines: list[str], size: int) -> str:
    room = size - QUESTION_TOKENS - sum(estimate_tokens(line) for line in lines)
    mixed = f.scatter(rng, lines, f.haystack(rng, room) if room > 0 else [])
    return pick(rng, " ", " ", "\n").join(mixed)


def _conversation(rng: Random, context: str, exchanges: list[Exchange]) -> Chat:
    """Context and first question in one of several layouts, then the other questions.

    Some ask for the value only. The reply is a sentence all the same: spelling out the key is how a model of this size
    finds the value, and a bare value was wrong nearly always.
    """
    if rng.random() < BARE_SHARE:
        exchanges = [(f"{question} {rng.choice(BARE)}", reply, value) for question, reply, value in exchanges]
    question, reply, _ = exchanges[0]
    more = [text for question, reply, _ in exchanges[1:] for text in (question, reply)]
    layout = rng.randrange(5)
    text = (
        question,
        f"{context}\n\n{question}",
        f"Read the text and answer.\n\n{context}\n\nQuestion: {question}",
        f"Context:\n{context}\n\n{question}",
        f"Here is a text.\n{context}\nAccording to the text: {question}",
    )[layout]
    return dialogue(text, reply, *more, answer=exchanges[-1][2], system=None if layout else context)


KEY_MAKERS = (
    f.code,
    lambda r: f"{r.choice(w.ADJECTIVES)}-{r.choice(w.OBJECTS)}",
    f.person,
    f.place,
    f.invented,
    lambda r: f"{r.choice(w.NOUNS)}_{r.choice(w.NOUNS)}",
    lambda r: f.number(r, 3, 5),
)
VALUE_MAKERS = (f.value, f.number, f.word, f.code)
RECORD_FORMS = ('"{k}": "{v}"', "{k}: {v}", "{k} = {v}", "{k} is {v}", "{k} -> {v}")


def record_set(rng: Random, size: int) -> tuple[str, dict[str, str], str]:
    """Records of about `size` tokens: their text, their content, and the form of one record as a reply repeats it."""
    form = rng.choice(RECORD_FORMS)
    make_key, make_value = rng.choice(KEY_MAKERS), rng.choice(VALUE_MAKERS)
    found: dict[str, str] = {}
    total = 0
    while total < size or len(found) < 2:
        key, value = make_key(rng), make_value(rng)
        found.setdefault(key, value)
        total += int((estimate_tokens(form.format(k=key, v=value)) + 1) * 1.2)
    lines = [form.format(k=key, v=value) for key, value in found.items()]
    text = "{" + ", ".join(lines) + "}" if form == RECORD_FORMS[0] else "\n".join(lines)
    return text, found, form


def key_value(rng: Random, size: int) -> Chat:
    """One key asked from records that fill the context."""
    context, exchanges = _records(rng, size, 1)
    return _conversation(rng, context, exchanges)


def key_value_talk(rng: Random, size: int) -> Chat:
    """Several keys asked in turn: up to eight, up to sixteen in long contexts."""
    context, exchanges = _records(rng, size, rng.randint(2, 8 if size < LONG_CONTEXT else 16))
    return _conversation(rng, context, exchanges)


def _records(rng: Random, size: int, num_questions: int) -> tuple[str, list[Exchange]]:
    context, found, form = record_set(rng, max(20, size - QUESTION_TOKENS - 20 * (num_questions - 1)))
    keys = rng.sample(sorted(found), min(num_questions, len(found)))
    return context, [(_ask_record(rng, key), form.format(k=key, v=found[key]), found[key]) for key in keys]


def _ask_record(rng: Random, key: str) -> str:
    """A question that names `key`, in quotes mostly: then its tokens are those of the record."""
    named = f'"{key}"' if rng.random() < QUOTED_SHARE else key
    return pick(
        rng,
        f"What is the value of {named}?",
        f"Look up {named}.",
        f"What is {named}?",
        f"Give me the value for {named}.",
        f"Which value does {named} have?",
        f"Find the value of {named}.",
        f"What is stored under {named}?",
    )


def multi_key(rng: Random, size: int) -> Chat:
    """Two to four keys asked at once."""
    context, found, form = record_set(rng, max(60, size - QUESTION_TOKENS))
    keys = rng.sample(sorted(found), min(len(found), rng.choice((2, 2, 3, 4))))
    quoted = [f'"{key}"' for key in keys]
    named = ", ".join(quoted[:-1]) + f" and {quoted[-1]}"
    question = pick(
        rng,
        f"What are the values of {named}?",
        f"Look up {named}.",
        f"Give me the values for {named}.",
        f"Find {named}.",
    )
    reply = "\n".join(form.format(k=key, v=found[key]) for key in keys)
    return ask(f"{context}\n\n{question}", reply)


def table(rng: Random, size: int) -> Chat:
    """One cell of a table with a header, asked by row name and column."""
    columns = rng.sample(
        (
            ("city", f.place),
            ("job", lambda r: r.choice(w.JOBS)),
            ("age", lambda r: f.number(r, 2, 2)),
            ("pet", lambda r: r.choice(w.ANIMALS)),
            ("colour", lambda r: r.choice(w.COLOURS)),
        ),
        2,
    )
    rows: dict[str, list[str]] = {}
    total = 0
    while total < size - QUESTION_TOKENS or len(rows) < 2:
        name = f.person(rng)
        rows[name] = [make(rng) for _, make in columns]
        total += estimate_tokens(" ".join((name, *rows[name]))) + 6
    bar = pick(rng, " | ", ", ")
    lines = [
        bar.join(("name", *(title for title, _ in columns))),
        *(bar.join((name, *cells)) for name, cells in rows.items()),
    ]
    name, column = rng.choice(list(rows)), rng.randrange(2)
    title, cell = columns[column][0], rows[name][column]
    question = pick(
        rng,
        f"What is the {title} of {name}?",
        f"Which {title} does {name} have?",
        f"In the row of {name}, what is the {title}?",
        f"Tell me the {title} of {name}.",
    )
    return ask("\n".join(lines) + f"\n\n{question}", f"The {title} of {name} is {cell}.", cell)
