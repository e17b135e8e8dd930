"""Requests for short Python functions, with the function as reply."""

from random import Random

from engine.mimir.corpus import words as w
from engine.mimir.corpus.base import Chat, ask, pick

# what the function does, its name, its parameters, its body
FUNCTIONS = (
    ("adds two numbers", "add", "a, b", "return a + b"),
    ("subtracts two numbers", "subtract", "a, b", "return a - b"),
    ("multiplies two numbers", "multiply", "a, b", "return a * b"),
    ("divides two numbers", "divide", "a, b", "return a / b"),
    ("returns the square of a number", "square", "x", "return x * x"),
    ("returns the larger of two numbers", "larger", "a, b", "return max(a, b)"),
    ("returns the smaller of two numbers", "smaller", "a, b", "return min(a, b)"),
    ("tells whether a number is even", "is_even", "n", "return n % 2 == 0"),
    ("tells whether a number is odd", "is_odd", "n", "return n % 2 == 1"),
    ("reverses a string", "reverse", "text", "return text[::-1]"),
    ("reverses a list", "reverse_list", "items", "return items[::-1]"),
    ("returns the length of a list", "length", "items", "return len(items)"),
    ("sums a list", "total", "items", "return sum(items)"),
    ("returns the average of a list", "average", "items", "return sum(items) / len(items)"),
    ("sorts a list", "sort_list", "items", "return sorted(items)"),
    ("returns the first item of a list", "first", "items", "return items[0]"),
    ("returns the last item of a list", "last", "items", "return items[-1]"),
    ("returns the largest item of a list", "largest", "items", "return max(items)"),
    ("converts a string to uppercase", "upper", "text", "return text.upper()"),
    ("counts the words of a text", "count_words", "text", "return len(text.split())"),
    ("says hello", "hello", "", 'print("Hello!")'),
    ("greets a person", "greet", "name", 'return f"Hello, {name}!"'),
    ("returns the factorial of a number", "factorial", "n", "return 1 if n < 2 else n * factorial(n - 1)"),
    ("reads a file", "read_file", "path", "with open(path) as file:\n        return file.read()"),
    ("removes duplicates from a list", "unique", "items", "return list(dict.fromkeys(items))"),
)


def code(rng: Random, size: int) -> Chat:
    """A function by description, by name, or a one-line program."""
    if rng.random() < 0.2:
        return _print(rng)
    does, name, parameters, body = rng.choice(FUNCTIONS)
    if rng.random() < 0.3:
        name = f"{rng.choice(w.VERBS)}_{rng.choice(w.NOUNS)}"
        if "factorial" in body:
            body = body.replace("factorial", name)
        request = pick(
            rng, f"Write a Python function {name} that {does}.", f"Write a function named {name} that {does}."
        )
    else:
        request = pick(
            rng,
            f"Write a Python function that {does}.",
            f"Write a function that {does} in Python.",
            f"Give me Python code that {does}.",
            f"Python: a function that {does}.",
            f"Can you write a Python function that {does}?",
        )
    return ask(request, f"def {name}({parameters}):\n    {body}")


def _print(rng: Random) -> Chat:
    thing, times = rng.choice(w.NOUNS + w.FIRST_NAMES), rng.randint(2, 20)
    request, reply = rng.choice(
        (
            (f"Write Python code that prints {thing}.", f'print("{thing}")'),
            (f"Print {thing} {times} times in Python.", f'for _ in range({times}):\n    print("{thing}")'),
            (f"Write a Python loop from 0 to {times}.", f"for i in range({times + 1}):\n    print(i)"),
            (f"Make a Python list with the numbers from 1 to {times}.", f"numbers = list(range(1, {times + 1}))"),
        )
    )
    return ask(request, reply)
