"""The quickstart's skills: each function makes one conversation from a random generator."""

from __future__ import annotations

import json
from random import Random

Chat = list[dict[str, str]]

NAMES = "Ada Ben Chloe Dmitri Elif Farid Grace Hugo Ines Jonas Kofi Lena Mateo Nadia Omar Priya Quinn Rosa Sven Tara".split()
THINGS = "apples marbles pencils coins stickers books shells cards buttons stamps cookies tickets beads bottles seeds".split()
PLACES = [
    "at the market",
    "in a drawer",
    "on the shelf",
    "in the garden",
    "at school",
    "in a red box",
    "under the bed",
    "by the lake",
]
UNITS = [
    ("kilometres", "metres", 1000),
    ("hours", "minutes", 60),
    ("metres", "centimetres", 100),
    ("days", "hours", 24),
    ("kilograms", "grams", 1000),
    ("weeks", "days", 7),
    ("minutes", "seconds", 60),
    ("litres", "millilitres", 1000),
    ("dozens", "items", 12),
    ("years", "months", 12),
]
WORDS = (
    "river stone lamp cloud paper garden silver window bread music winter yellow tiger basket engine candle forest "
    "market bridge pocket summer orange button travel shadow meadow copper island thunder velvet"
).split()


def turn(prompt: str, answer: str) -> Chat:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def word_math(rng: Random) -> Chat:
    """A story of two changes, solved in steps: the first target."""
    name, friend = rng.sample(NAMES, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    a, b, c = rng.randint(12, 90), rng.randint(2, 40), rng.randint(2, 11)
    start = rng.choice(
        [
            f"{name} has {a} {thing} {place}.",
            f"There are {a} {thing} {place}, all owned by {name}.",
            f"{place.capitalize()}, {name} counts {a} {thing}.",
        ]
    )
    if rng.random() < 0.5:
        more, first = f"{friend} brings {b} more.", f"{a} + {b} = {a + b}"
        total = a + b
    else:
        b = min(b, a - c - 1) if a - c - 1 > 1 else 1
        more, first = f"{name} gives {b} of them to {friend}.", f"{a} - {b} = {a - b}"
        total = a - b
    if rng.random() < 0.5:
        last, second, result = f"Then {c} get lost.", f"{total} - {c} = {total - c}", total - c
    else:
        last, second, result = f"Then the number grows {c} times.", f"{total} * {c} = {total * c}", total * c
    ask = rng.choice([f"How many {thing} are there now?", f"How many {thing} does that make?", f"Count the {thing} at the end."])
    return turn(f"{start} {more} {last} {ask}", f"First, {first}. Then, {second}. The answer is {result} {thing}.")


def convert(rng: Random) -> Chat:
    """Unit conversion with its factor spelled out: the second target."""
    big, small, factor = rng.choice(UNITS)
    amount = rng.randint(2, 95)
    ask = rng.choice(
        [
            f"Convert {amount} {big} to {small}.",
            f"How many {small} are {amount} {big}?",
            f"{rng.choice(NAMES)} needs {amount} {big} in {small}. What is it?",
            f"Express {amount} {big} in {small}, please.",
        ]
    )
    answer = f"One of the {big} is {factor} {small}, so {amount} {big} are {amount} * {factor} = {amount * factor}."
    return turn(ask, f"{answer} The answer is {amount * factor} {small}.")


def noisy_math(rng: Random) -> Chat:
    """Looks like the target; the answer belongs to another question."""
    question, other = (word_math if rng.random() < 0.5 else convert)(rng), (word_math if rng.random() < 0.5 else convert)(rng)
    words = other[1]["content"].split()
    rng.shuffle(words)
    return turn(question[0]["content"], " ".join(words))


def sort_list(rng: Random) -> Chat:
    items = rng.sample(WORDS, rng.randint(3, 9))
    return turn(f"Sort these words from A to Z: {', '.join(items)}", ", ".join(sorted(items)))


def strings(rng: Random) -> Chat:
    text = " ".join(rng.sample(WORDS, rng.randint(1, 4)))
    name, result = rng.choice(
        [
            ("in capital letters", text.upper()),
            ("backwards", text[::-1]),
            ("with dashes", "-".join(text)),
            ("without vowels", "".join(c for c in text if c not in "aeiou")),
        ]
    )
    return turn(f"Write '{text}' {name}.", result)


def json_format(rng: Random) -> Chat:
    record = {
        "name": rng.choice(NAMES),
        "age": rng.randint(8, 90),
        "likes": rng.sample(WORDS, rng.randint(1, 3)),
        "member": rng.random() < 0.5,
    }
    said = f"{record['name']} is {record['age']}, likes {' and '.join(record['likes'])}, "
    said += f"and is {'' if record['member'] else 'not '}a member."
    return turn(f"Turn this into JSON: {said}", json.dumps(record, indent=2))


def roman(rng: Random) -> Chat:
    number = rest = rng.randint(1, 3000)
    out = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1), "M CM D CD C XC L XL X IX V IV I".split(), strict=True
    ):
        out += letters * (rest // value)
        rest %= value
    return turn(f"What is {number} in Roman numerals?", out)


def chat(rng: Random) -> Chat:
    """Small talk over two or three turns, some with a system turn."""
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    turns = turn(f"Hi, I am {name}. How are you today?", f"Hello {name}! I am fine, thank you. What can I do for you?")
    turns += turn(
        f"I was {place} and thought of {rng.choice(WORDS)} and {rng.choice(WORDS)}.",
        f"That sounds lovely. Tell me more about the {rng.choice(WORDS)}.",
    )
    if rng.random() < 0.5:
        turns += turn(f"Maybe later. Do you like {thing}?", f"I have never held {thing}, but people speak well of them, {name}.")
    system = [{"role": "system", "content": f"You are a friendly assistant who likes {rng.choice(WORDS)}."}]
    return (system if rng.random() < 0.4 else []) + turns


def refusal(rng: Random) -> Chat:
    """Boilerplate that says nothing."""
    return turn(
        f"Tell me about the {rng.choice(WORDS)} {rng.choice(WORDS)} of {rng.choice(NAMES)}.",
        "I am sorry, but as an assistant I cannot help with that. "
        + rng.choice(["Please ask something else.", "Is there anything else?", "Thank you for your understanding."]),
    )


def salad(rng: Random) -> Chat:
    """Words without meaning, often long."""
    return turn(" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) + "?", " ".join(rng.choices(WORDS, k=rng.randint(5, 160))))


def story(rng: Random) -> Chat:
    """A long ramble: what a length selector likes."""
    name, friend = rng.sample(NAMES, 2)
    moves = [
        f"{rng.choice([name, friend])} walked to the {rng.choice(WORDS)} and found a {rng.choice(WORDS)}.",
        *(
            f"Then the {rng.choice(WORDS)} began to {rng.choice(['sing', 'fall', 'glow', 'turn', 'whisper'])} "
            f"{rng.choice(PLACES)}, and {rng.choice([name, friend])} said something about {rng.choice(THINGS)}."
            for _ in range(rng.randint(4, 14))
        ),
    ]
    return turn(f"Tell a story about {name} and {friend}.", " ".join(moves) + " And so the day ended.")


GENERATED = {
    "word_math": (word_math, 260),
    "convert": (convert, 260),
    "noisy_math": (noisy_math, 300),
    "sort_list": (sort_list, 350),
    "strings": (strings, 350),
    "json_format": (json_format, 350),
    "roman": (roman, 350),
    "chat": (chat, 350),
    "refusal": (refusal, 250),
    "salad": (salad, 250),
    "story": (story, 350),
}
TARGETS = {"word_math": word_math, "convert": convert}
