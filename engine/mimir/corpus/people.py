"""Questions over facts about people, and conversations that must remember what was said earlier."""

from random import Random

from engine.mimir.corpus import fillers as f
from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import Chat, a, dialogue, estimate_tokens, pick

# attribute: (values, statement, questions, reply), with {n} the name and {v} the value.
ATTRIBUTES = {
    "city": (
        f.place,
        "{n} lives in {v}.",
        ("Where does {n} live?", "In which city does {n} live?", "What city is {n} in?"),
        "{n} lives in {v}.",
    ),
    "job": (
        lambda r: a(r.choice(w.JOBS)),
        "{n} works as {v}.",
        ("What is {n}'s job?", "What does {n} do for work?", "What does {n} work as?"),
        "{n} works as {v}.",
    ),
    "pet": (
        lambda r: r.choice(w.ANIMALS),
        "{n} has a pet {v}.",
        ("What pet does {n} have?", "Which animal does {n} keep?", "What kind of pet does {n} have?"),
        "{n} has a pet {v}.",
    ),
    "colour": (
        lambda r: r.choice(w.COLOURS),
        "{n}'s favourite colour is {v}.",
        ("What is {n}'s favourite colour?", "Which colour does {n} like best?", "What's {n}'s favorite color?"),
        "{n}'s favourite colour is {v}.",
    ),
    "food": (
        lambda r: r.choice(w.FOODS),
        "{n} likes to eat {v}.",
        ("What does {n} like to eat?", "Which food does {n} like?"),
        "{n} likes to eat {v}.",
    ),
    "hobby": (
        lambda r: r.choice(w.HOBBIES),
        "{n} enjoys {v}.",
        ("What does {n} enjoy?", "What is {n}'s hobby?"),
        "{n} enjoys {v}.",
    ),
    "age": (
        lambda r: str(r.randint(5, 95)),
        "{n} is {v} years old.",
        ("How old is {n}?", "What is {n}'s age?"),
        "{n} is {v} years old.",
    ),
    "thing": (
        lambda r: f"{a(r.choice(w.ADJECTIVES))} {r.choice(w.OBJECTS)}",
        "{n} bought {v}.",
        ("What did {n} buy?", "Which thing did {n} buy?"),
        "{n} bought {v}.",
    ),
    "place": (
        lambda r: r.choice(w.PLACES),
        "{n} went to the {v}.",
        ("Where did {n} go?", "Where is {n} now?"),
        "{n} went to the {v}.",
    ),
}
UNKNOWN = "The text does not say."
LEAD = "The text says: "  # so that the name is spelled as in the text, after a space
UNKNOWN_SHARE = 0.1
LONG_CONTEXT = 400  # tokens from which a talk asks more questions


def facts(rng: Random, size: int) -> Chat:
    """One asked fact out of several about several people; one question in ten has no answer in the text."""
    return _facts(rng, size, 1)


def facts_talk(rng: Random, size: int) -> Chat:
    """The same with up to five questions in a row, up to nine in long contexts."""
    return _facts(rng, size, rng.randint(2, 5 if size < LONG_CONTEXT else 9))


def _facts(rng: Random, size: int, num_questions: int) -> Chat:
    people = f.distinct(rng, rng.randint(1, 5), f.person)
    known = {(p, a): ATTRIBUTES[a][0](rng) for p in people for a in rng.sample(sorted(ATTRIBUTES), rng.randint(1, 4))}
    lines = [ATTRIBUTES[a][1].format(n=p, v=v) for (p, a), v in known.items()]
    rng.shuffle(lines)
    room = size - sum(map(estimate_tokens, lines)) - 30 * num_questions
    if room > 20:
        lines = f.scatter(rng, lines, f.haystack(rng, room))
    exchanges = [_exchange(rng, known) for _ in range(num_questions)]
    question, reply, _ = exchanges[0]
    context = " ".join(lines)
    more = [text for question, reply, _ in exchanges[1:] for text in (question, reply)]
    if rng.random() < 0.15:
        return dialogue(question, reply, *more, answer=exchanges[-1][2], system=context)
    text = pick(
        rng,
        f"{context}\n\n{question}",
        f"{context} {question}",
        f"Context: {context}\nQuestion: {question}",
        f"Read this: {context}\nNow answer: {question}",
    )
    return dialogue(text, reply, *more, answer=exchanges[-1][2])


def _exchange(rng: Random, known: dict[tuple[str, str], str]) -> tuple[str, str, str]:
    """A question, its reply and the essential part of the reply."""
    (person, attribute), value = rng.choice(list(known.items()))
    if rng.random() < UNKNOWN_SHARE:
        attribute = rng.choice([name for name in ATTRIBUTES if (person, name) not in known])
        return rng.choice(ATTRIBUTES[attribute][2]).format(n=person), UNKNOWN, UNKNOWN
    reply = LEAD + ATTRIBUTES[attribute][3].format(n=person, v=value)
    return rng.choice(ATTRIBUTES[attribute][2]).format(n=person), reply, value


# what the user says about themselves, how the model takes note, how the user asks, how the model answers
SELF = {
    "name": (
        f.person,
        ("My name is {v}.", "I am {v}.", "Hi, my name is {v}.", "Call me {v}.", "Hello, I'm {v}."),
        ("Nice to meet you, {v}!", "Hello {v}, nice to meet you!"),
        ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"),
        "Your name is {v}.",
    ),
    "city": (
        f.place,
        ("I live in {v}.", "I am from {v}.", "My home is in {v}."),
        ("Thank you, I will remember that you live in {v}.", "{v} is a nice place."),
        ("Where do I live?", "Which city do I live in?", "Where am I from?"),
        "You live in {v}.",
    ),
    "colour": (
        lambda r: r.choice(w.COLOURS),
        ("My favourite colour is {v}.", "I like the colour {v} best.", "My favorite color is {v}."),
        ("{V} is a lovely colour.", "Good choice, {v} is a fine colour."),
        ("What is my favourite colour?", "Which colour do I like best?", "What's my favorite color?"),
        "Your favourite colour is {v}.",
    ),
    "pet": (
        lambda r: a(r.choice(w.ANIMALS)),
        ("I have {v}.", "My pet is {v}.", "I own {v}."),
        ("{V} is good company.", "How nice, {v}!"),
        ("What pet do I have?", "Which animal do I have?", "What is my pet?"),
        "You have {v}.",
    ),
    "food": (
        lambda r: r.choice(w.FOODS),
        ("I like {v}.", "My favourite food is {v}.", "I love to eat {v}."),
        ("{V} sounds good.", "I cannot eat, but {v} sounds good."),
        ("What food do I like?", "What is my favourite food?", "What do I like to eat?"),
        "You like {v}.",
    ),
    "job": (
        lambda r: a(r.choice(w.JOBS)),
        ("I work as {v}.", "I am {v}.", "My job: I am {v}."),
        ("Working as {v} sounds interesting.",),
        ("What is my job?", "What do I do for work?", "What do I work as?"),
        "You work as {v}.",
    ),
    "code": (
        f.value,
        ("Remember this: {v}", "Please remember the code {v}.", "Keep in mind: {v}", "Remember {v} for me."),
        ("I will remember {v}.", "Noted: {v}"),
        ("What did I ask you to remember?", "What was it I told you to remember?", "What should you remember?"),
        "You asked me to remember {v}.",
    ),
    "age": (
        lambda r: str(r.randint(5, 95)),
        ("I am {v} years old.", "My age is {v}."),
        ("Thank you, you are {v} years old.",),
        ("How old am I?", "What is my age?"),
        "You are {v} years old.",
    ),
}


def memory(rng: Random, size: int) -> Chat:
    """The user tells one to three things about themselves, perhaps chats about another thing, then asks for one."""
    from engine.mimir.corpus.everyday import small_talk

    told = rng.sample(sorted(SELF), rng.choice((1, 1, 2, 3)))
    values = {kind: SELF[kind][0](rng) for kind in told}
    texts: list[str] = []
    for kind in told:
        form = {"v": values[kind], "V": values[kind].capitalize()}
        texts += [rng.choice(SELF[kind][1]).format(**form), rng.choice(SELF[kind][2]).format(**form)]
        if rng.random() < 0.3:
            texts += small_talk(rng)
    kind = rng.choice(told)
    texts += [rng.choice(SELF[kind][3]), SELF[kind][4].format(v=values[kind])]
    return dialogue(*texts, answer=values[kind])
