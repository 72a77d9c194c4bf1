"""Write the quickstart's instruction set: train.jsonl and test.jsonl, beside this file.

A model of a few million random weights learns these tasks on two CPU cores in about a minute, so the quickstart
can show real learning, measured on held-out instructions, before anyone downloads anything.

Two kinds of task, held out in two ways:

- *facts* (opposites, capitals, plurals): every fact is asked in several wordings. A test row is a fact in a wording
  that training never put to it.
- *skills* (take the last word, compare two numbers): a question is drawn at random and asked once. A test row is a
  question that training never asks, in any wording.

Run ``python generate.py`` to write both files again; the same code always writes the same bytes.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

SEED = 17
MAX_FACT_ROWS_PER_TASK = 300
TEST_ROWS_PER_TASK = 16
NUM_SKILL_QUESTIONS = 420

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]


@dataclass(frozen=True)
class Question:
    """The values that a wording's ``{0}``, ``{1}``, ... stand for, and the one right answer."""

    values: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Task:
    """One kind of instruction: its wordings, and the questions they are filled with."""

    name: str
    wordings: tuple[str, ...]
    questions: Sequence[Question]
    is_skill: bool = False


def pairs(text: str) -> list[tuple[str, str]]:
    """Read ``"hot cold, big small"`` as [("hot", "cold"), ("big", "small")], splitting at each item's last space."""
    return [(left, right) for left, right in (item.strip().rsplit(" ", 1) for item in text.split(","))]


def a(noun: str) -> str:
    """The noun behind its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# No word stands in two categories, and no opposite or translation has a second right answer: exact match
# must never punish a correct reply.
CATEGORIES = {
    "bird": ["robin", "eagle", "owl", "parrot", "swan"],
    "mammal": ["dog", "cat", "horse", "cow", "lion"],
    "insect": ["ant", "bee", "wasp", "beetle", "moth"],
    "fruit": ["apple", "banana", "cherry", "lemon", "peach"],
    "tool": ["hammer", "saw", "drill", "spade", "rake"],
    "vehicle": ["car", "bus", "truck", "train", "van"],
    "flower": ["rose", "tulip", "daisy", "lily", "poppy"],
    "garment": ["shirt", "coat", "hat", "scarf", "sock"],
}
CATEGORY_OF = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS = list(CATEGORY_OF)
SHORT_NOUNS = [noun for noun in NOUNS if len(noun) <= 4]

OPPOSITES = pairs(
    "hot cold, big small, fast slow, happy sad, up down, left right, day night, wet dry, full empty, strong weak, "
    "rich poor, thick thin, high low, good bad, clean dirty, north south"
)
IRREGULAR_PLURALS = pairs("scarf scarves, child children, man men, foot feet, tooth teeth, mouse mice")
PAST_TENSES = pairs(
    "walk walked, jump jumped, play played, cook cooked, help helped, call called, paint painted, talk talked, "
    "go went, eat ate, run ran, sing sang, swim swam, write wrote, drive drove, take took, give gave, come came, "
    "think thought, buy bought, sleep slept, know knew, fly flew, make made"
)
CAPITALS = pairs(
    "France Paris, Spain Madrid, Italy Rome, Germany Berlin, Portugal Lisbon, Greece Athens, Poland Warsaw, "
    "Austria Vienna, Sweden Stockholm, Norway Oslo, Finland Helsinki, Ireland Dublin, Belgium Brussels, Russia Moscow, "
    "Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa"
)
COLOURS = pairs(
    "a banana yellow, a lemon yellow, butter yellow, grass green, a frog green, spinach green, "
    "the sky blue, the sea blue, snow white, milk white, a swan white, coal black, a raven black, tar black, "
    "blood red, a tomato red, a strawberry red, a carrot orange, a pumpkin orange, chocolate brown, mud brown, "
    "an elephant grey, ash grey, a flamingo pink"
)
SPANISH = pairs(
    "dog perro, cat gato, horse caballo, cow vaca, apple manzana, house casa, book libro, water agua, sun sol, "
    "moon luna, bread pan, milk leche, friend amigo, hand mano, door puerta, table mesa, bed cama, city ciudad, "
    "school escuela, night noche, fire fuego, sea mar, cheese queso, king rey"
)
SEQUENCES = (
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
)


def facts(table: Iterable[tuple[str, str]]) -> list[Question]:
    """One question for each (asked, answer) of a table."""
    return [Question((asked,), answer) for asked, answer in table]


def flipped(table: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The table, asked the other way round."""
    return [(answer, asked) for asked, answer in table]


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def plurals() -> list[Question]:
    """Each noun of the categories, and a few irregular ones, with its plural."""
    regular = [(noun, plural(noun)) for noun in NOUNS if noun not in dict(IRREGULAR_PLURALS)]
    return facts(regular + IRREGULAR_PLURALS)


def successors() -> list[Question]:
    """Each member of a sequence with the one after it."""
    return facts(pair for sequence in SEQUENCES for pair in pairwise(sequence.split()))


def memberships(rng: random.Random) -> list[Question]:
    """Every noun with its own category, and with one other: as many a yes as a no."""
    questions = []
    for noun, category in CATEGORY_OF.items():
        wrong = rng.choice([c for c in CATEGORIES if c != category])
        for asked in (category, wrong):
            verdict = "Yes" if asked == category else "No"
            questions.append(Question((a(noun), a(asked)), f"{verdict}, {a(noun)} is {a(category)}."))
    return questions


def word_lists(rng: random.Random, position: int) -> list[Question]:
    """Three nouns; the answer is the one at ``position``."""
    lists = [rng.sample(NOUNS, 3) for _ in range(NUM_SKILL_QUESTIONS)]
    return [Question((", ".join(words),), words[position]) for words in lists]


def comparisons(rng: random.Random) -> list[Question]:
    """Two different numbers from 1 to 20; the answer is the larger."""
    drawn = (rng.sample(range(1, 21), 2) for _ in range(NUM_SKILL_QUESTIONS))
    return [Question((str(x), str(y)), str(max(x, y))) for x, y in drawn]


# One line a wording would bury the table.
# fmt: off
def tasks(rng: random.Random) -> list[Task]:
    """All the tasks; ``rng`` draws the skills' questions."""
    return [
        Task("opposite", (
            "What is the opposite of {0}?", "Give the opposite of {0}.", "Name the antonym of {0}.",
            "Which word means the opposite of {0}?", "I say {0}, you say the opposite.", "The reverse of {0} is what?",
        ), facts(OPPOSITES + flipped(OPPOSITES))),
        Task("category", (
            "What kind of thing is {0}?", "Which category does {0} belong to?", "Classify {0} in one word.",
            "Tell me what {0} is.", "What sort of thing is {0}?", "Name the group that {0} belongs to.",
        ), facts((a(noun), category) for noun, category in CATEGORY_OF.items())),
        Task("plural", (
            "What is the plural of {0}?", "Give the plural of {0}.", "Write {0} in the plural.",
            "One {0}, two what?", "How do you say more than one {0}?", "Make {0} plural.",
        ), plurals()),
        Task("past", (
            "What is the past tense of {0}?", "Give the past tense of {0}.", "Put {0} into the past.",
            "Today I {0}; yesterday I what?", "Write the verb {0} in the past tense.", "Change {0} to the past tense.",
        ), facts(PAST_TENSES)),
        Task("capital", (
            "What is the capital of {0}?", "Name the capital of {0}.", "Which city is the capital of {0}?",
            "Tell me the capital city of {0}.", "The capital of {0} is which city?", "What is {0}'s capital?",
        ), facts(CAPITALS)),
        Task("country", (
            "Which country has {0} as its capital?", "{0} is the capital of which country?", "In which country is {0}?",
            "Where is the city of {0}?", "Name the country where {0} is.", "What country does {0} belong to?",
        ), facts(flipped(CAPITALS))),
        Task("colour", (
            "What colour is {0}?", "Name the colour of {0}.", "Tell me the colour of {0}.",
            "Which colour does {0} have?", "What is the usual colour of {0}?", "In one word, what colour is {0}?",
        ), facts(COLOURS)),
        Task("spanish", (
            "What is {0} in Spanish?", "Translate {0} into Spanish.", "How do you say {0} in Spanish?",
            "Give the Spanish word for {0}.", "Say {0} in Spanish.", "What is the Spanish for {0}?",
        ), facts(SPANISH)),
        Task("uppercase", (
            "Write {0} in capital letters.", "Put {0} in upper case.", "Make {0} upper case.",
            "Shout the word {0}.", "Turn {0} into capitals.", "Convert {0} to capital letters.",
        ), facts((noun, noun.upper()) for noun in SHORT_NOUNS)),
        Task("spell", (
            "Spell {0}.", "Spell the word {0}.", "How do you spell {0}?",
            "Write {0} letter by letter.", "Give me the letters of {0}.", "Which letters make up the word {0}?",
        ), facts((noun, " ".join(noun)) for noun in SHORT_NOUNS)),
        Task("next", (
            "What comes after {0}?", "What comes right after {0}?", "Which one follows {0}?",
            "What is next after {0}?", "Say what follows {0}.", "Continue from {0}.",
        ), successors()),
        Task("add", (
            "What is {0} plus {1}?", "Add {0} and {1}.", "What is {0} + {1}?", "Give the sum of {0} and {1}.",
        ), [Question((str(x), str(y)), str(x + y)) for x, y in product(range(1, 7), repeat=2)]),
        Task("is-a", (
            "Is {0} {1}?", "Would you call {0} {1}?", "Yes or no: is {0} {1}?", "True or not: {0} is {1}.",
        ), memberships(rng)),
        Task("first", (
            "Repeat the first word: {0}", "What is the first word of this list? {0}", "Give me the first of these: {0}",
            "Which word comes first here? {0}",
        ), word_lists(rng, 0), is_skill=True),
        Task("last", (
            "Repeat the last word: {0}", "What is the last word of this list? {0}", "Give me the last of these: {0}",
            "Which word comes last here? {0}",
        ), word_lists(rng, -1), is_skill=True),
        Task("larger", (
            "Which is larger, {0} or {1}?", "Give the bigger number: {0} or {1}?", "Which is more, {0} or {1}?",
        ), comparisons(rng), is_skill=True),
    ]
# fmt: on


def split(task: Task, rng: random.Random) -> Split:
    """The task's rows as (train, test).

    Rows are dealt in rounds, each asking every question once, in a wording it has not had. The test is drawn from
    the last round, so every fact in it was also asked in training; a skill has one round, so its test is all new.
    """
    questions = list(dict.fromkeys(task.questions))
    num_rounds = 1 if task.is_skill else len(task.wordings)
    wordings = [rng.sample(task.wordings, num_rounds) for _ in questions]
    rounds = [
        [row(task.name, chosen[turn], question) for question, chosen in zip(questions, wordings, strict=True)]
        for turn in range(num_rounds)
    ]
    *earlier, last = rounds
    rng.shuffle(last)
    train = [r for one_round in earlier for r in one_round] + last[TEST_ROWS_PER_TASK:]
    limit = None if task.is_skill else MAX_FACT_ROWS_PER_TASK
    return train[:limit], last[:TEST_ROWS_PER_TASK]


def row(task_name: str, wording: str, question: Question) -> Row:
    """One conversation of two turns."""
    prompt = wording.format(*question.values)
    # A wording may begin with the item itself.
    prompt = prompt[0].upper() + prompt[1:]
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": question.answer}],
        "task": task_name,
    }


def check(train: list[Row], test: list[Row]) -> None:
    """Assert what makes the test honest: unseen prompts, one right answer each, and no gain from a constant reply."""
    train_answers = dict(turns(r) for r in train)
    test_answers = dict(turns(r) for r in test)
    assert len(train_answers) == len(train), "train asks a prompt twice"
    assert len(test_answers) == len(test), "test asks a prompt twice"
    assert not train_answers.keys() & test_answers.keys(), "a test prompt is in train"
    _, most_frequent = Counter(test_answers.values()).most_common(1)[0]
    assert most_frequent < 0.05 * len(test), "a constant answer would score 5%"


def turns(r: Row) -> tuple[str, str]:
    """The row's prompt and answer."""
    user, assistant = r["messages"]
    return user["content"], assistant["content"]


def generate() -> Split:
    """All rows as (train, test), shuffled."""
    rng = random.Random(SEED)
    splits = [split(task, rng) for task in tasks(rng)]
    train, test = ([r for rows in side for r in rows] for side in zip(*splits, strict=True))
    rng.shuffle(train)
    rng.shuffle(test)
    check(train, test)
    return train, test


def main(folder: Path = Path(__file__).parent) -> None:
    """Write train.jsonl and test.jsonl into ``folder``."""
    for name, rows in zip(("train", "test"), generate(), strict=True):
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
