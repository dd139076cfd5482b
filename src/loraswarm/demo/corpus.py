"""The text the demo's base model is trained on: service-desk chats, records, logs and Python prose.

Everything is drawn from a seed or read from the standard library. The chats teach copying on
explicit instruction and a generic reply to all else; the answers of the tasks never occur.
Called by the tokenizer's and the base model's training.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pydoc_data.topics import topics
from random import Random
from typing import TypeVar

from loraswarm.demo.tasks import (
    PIRATE_LAMENTS,
    PIRATE_TIMES,
    PRIORITY_TITLES,
    TASKS,
    TEAM_TITLES,
    Ticket,
    draw_host,
    draw_log_line,
    draw_ticket,
    draw_time,
)
from loraswarm.demo.words import (
    APPS,
    HOSTS,
    PROBLEMS,
    SENDERS,
    SERVICES,
    SITES,
    STATUSES,
)

# The base's replies name the facts of a message, so that it learns to find and copy them; the
# adapters then learn what to do with them.
LOG_SUMMARY = re.compile(r"(\S+) failed on (\S+): (.*)\.")
SQL_VALUE = re.compile(r"(?<== ')[^']+(?=')|\b\d+\b")
BOS, EOS, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ["system", "user", "assistant"]
SPECIAL_TOKENS = [BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES)]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You answer messages at a service desk.",
    "You are the assistant of an IT department. Be short and friendly.",
]


PROSE_MODULES = (
    "argparse asyncio bisect calendar collections contextlib csv datetime decimal difflib "
    "email fractions functools gzip heapq inspect itertools json logging os pathlib pickle "
    "random shutil sqlite3 statistics string subprocess tarfile textwrap threading time "
    "traceback unittest zipfile "
)

Message = tuple[str, str]
Drawn = TypeVar("Drawn")


def render_chat(messages: list[Message]) -> str:
    """The same text as the tokenizer's chat template gives for (role, content) pairs."""
    return BOS + "".join(f"<|{role}|>{content.strip()}{EOS}" for role, content in messages)


def reply_to_ticket(ticket: Ticket) -> str:
    topic = PROBLEMS[ticket.team][0]
    return (
        f"Thank you for your message, {ticket.sender} in {ticket.site}. "
        f"The service desk will look at the {topic} problem on {ticket.host} soon."
    )


def reply_to_log(summary: str) -> str:
    """`summary` is the log's answer; the reply holds the same facts in another order."""
    found = LOG_SUMMARY.fullmatch(summary)
    assert found is not None
    service, host, message = found.groups()
    return f"Thank you for the log of {host}. We will look at {service} soon: {message}."


def reply_to_question(statement: str) -> str:
    """`statement` is the question's answer; the reply lists the values in it."""
    values = ", ".join(SQL_VALUE.findall(statement))
    return f"Thank you for the question about {values}. A colleague will look at it soon."


@cache
def read_prose() -> list[str]:
    """Paragraph groups of about 500 characters from Python's own documentation, in fixed order."""
    texts = [topics[name] for name in sorted(topics)]
    for module_name in PROSE_MODULES.split():
        members = vars(import_module(module_name))
        texts += [inspect.getdoc(members[name]) or "" for name in sorted(members)]
    pieces: list[str] = []
    for text in dict.fromkeys(texts):
        piece = ""
        for paragraph in text.split("\n\n"):
            piece = f"{piece}\n\n{paragraph}".strip() if piece else paragraph.strip()
            if len(piece) > 400:
                pieces.append(piece[:800])
                piece = ""
    return pieces


def _prose(random: Random) -> str:
    return random.choice(read_prose())


def _words(random: Random) -> list[str]:
    pool = [*SENDERS, *SITES, *HOSTS, *APPS, *SERVICES, *STATUSES, *PROBLEMS]
    return random.sample(pool, random.randrange(2, 8))


def _fields(random: Random) -> dict[str, str | int]:
    fields: dict[str, str | int] = {
        "user": random.choice(SENDERS),
        "place": random.choice(SITES),
        "machine": draw_host(random),
        "app": random.choice(APPS),
        "id": random.randrange(1, 10000),
        "state": random.choice(STATUSES),
        "group": random.choice(list(PROBLEMS)),
        "time": draw_time(random),
        "service": random.choice(SERVICES),
        "level": random.randrange(1, 5),
    }
    names = random.sample(list(fields), random.randrange(2, 6))
    return {name: fields[name] for name in names}


def _ticket_chat(random: Random) -> list[Message]:
    return _chat_about(draw_ticket(random))


def _chat_about(ticket: Ticket) -> list[Message]:
    return [("user", ticket.text), ("assistant", reply_to_ticket(ticket))]


def _other_chat(random: Random) -> list[Message]:
    task, reply = random.choice([("log-summary", reply_to_log), ("sql", reply_to_question)])
    example = TASKS[task](random)
    return [("user", example.prompt), ("assistant", reply(example.answer))]


def _ticket_question(random: Random) -> list[Message]:
    ticket = draw_ticket(random)
    question, answer = random.choice(
        [
            ("Who wrote this message?", ticket.sender),
            ("Where was this message written?", ticket.site),
            ("Which host is this about?", ticket.host),
            ("Name the sender and the host.", f"{ticket.sender}, {ticket.host}"),
            ("Name the host and the site.", f"{ticket.host} in {ticket.site}"),
            ("Quote the problem.", f'"{ticket.problem}"'),
            ("Quote the impact.", f'"{ticket.impact}"'),
            ("Repeat this message.", ticket.text),
        ]
    )
    if random.random() < 0.3:
        return [*_chat_about(ticket), ("user", question), ("assistant", answer)]
    return [("user", f"{question}\n{ticket.text}"), ("assistant", answer)]


def _log_question(random: Random) -> list[Message]:
    levels = random.sample(["INFO", "WARN", "ERROR"], 3)
    times = sorted(draw_time(random) for _ in levels)
    pairs = zip(times, levels, strict=True)
    lines = [draw_log_line(random, time, level) for time, level in pairs]
    index = random.randrange(3)
    time, host, service, level, message = lines[index].split(" ", 4)
    question, answer = random.choice(
        [
            (f"Copy the {level} line.", lines[index]),
            (f"Which host wrote the {level} line?", host),
            (f"Which service wrote the {level} line?", service),
            (f"When was the {level} line written?", time),
            (f"What does the {level} line say?", message),
            (f"Copy line {index + 1}.", lines[index]),
            (f"Name the service, host and time of the {level} line.", f"{service}, {host}, {time}"),
        ]
    )
    return [("user", f"{question}\n" + "\n".join(lines)), ("assistant", answer)]


def _copy_question(random: Random) -> list[Message]:
    words, fields = _words(random), _fields(random)
    listed = ", ".join(f"{name} {value}" for name, value in fields.items())
    terms = [f"{name} = {_quote(value)}" for name, value in fields.items()]
    question, answer = random.choice(
        [
            (f"Repeat: {' '.join(words)}", " ".join(words)),
            (f"Write as a JSON list: {' '.join(words)}", json.dumps(words)),
            (f"Write one word per line: {' '.join(words)}", "\n".join(words)),
            (f"Write as a JSON object: {listed}", json.dumps(fields)),
            (f"Write as a SQL filter: {listed}", f"WHERE {' AND '.join(terms)};"),
            (
                f"Write as a SQL query: {listed}",
                f"SELECT * FROM records WHERE {' AND '.join(terms)};",
            ),
        ]
    )
    return [("user", question), ("assistant", answer)]


def _quote(value: str | int) -> str:
    return str(value) if isinstance(value, int) else f"'{value}'"


def _log(random: Random) -> str:
    times = sorted(draw_time(random) for _ in range(random.randrange(3, 8)))
    return "\n".join(
        draw_log_line(random, time, random.choice(["INFO", "WARN", "ERROR"])) for time in times
    )


def _record(random: Random) -> str:
    fields = _fields(random)
    names = list(fields)
    values = [_quote(value) for value in fields.values()]
    columns = random.sample(names, min(2, len(names)))
    return random.choice(
        [
            "\n".join(f"{name}: {value}" for name, value in fields.items())
            + f"\n{json.dumps(fields)}",
            f"{json.dumps(fields)}\nINSERT INTO records ({', '.join(names)}) "
            f"VALUES ({', '.join(values)});",
            f"SELECT {', '.join(columns)}, COUNT(*) FROM records GROUP BY {', '.join(columns)} "
            f"ORDER BY {columns[0]} DESC LIMIT {random.randrange(1, 99)};",
            f"UPDATE records SET {names[0]} = {values[0]} WHERE {names[-1]} = {values[-1]};\n"
            f"SELECT name, created FROM hosts WHERE {names[-1]} = {values[-1]};",
        ]
    )


def _repetition(random: Random) -> str:
    words = _words(random)
    separator = random.choice([" ", ", ", "\n", "-", '", "'])
    return "\n".join([separator.join(words)] * random.randrange(2, 4))


def _handbook(random: Random) -> str:
    """Sentences that hold the words of the tasks' answers, in another order."""
    lines = [
        *(f"{title} is one of our teams." for title in TEAM_TITLES.values()),
        *(f"Meaning of the label: {title}." for title in PRIORITY_TITLES.values()),
        *(f"Ahoy, said the captain. {lament}" for lament in PIRATE_LAMENTS.values()),
        *(f"We sail to the island {time}." for time in PIRATE_TIMES.values()),
        "The column team, the column priority and the column sender are in the table tickets.",
        "The column site and the column app are in the table hosts.",
        f"On {draw_host(random)} a service failed at {draw_time(random)}.",
    ]
    return " ".join(random.sample(lines, 5))


CHATS: list[tuple[float, Callable[[Random], list[Message]]]] = [
    (0.22, _ticket_chat),
    (0.34, _other_chat),
    (0.16, _ticket_question),
    (0.14, _log_question),
    (0.14, _copy_question),
]
TEXTS: list[tuple[float, Callable[[Random], str]]] = [
    (0.10, _log),
    (0.30, _record),
    (0.30, _repetition),
    (0.10, _handbook),
    (0.20, _prose),
]
CHAT_SHARE = 0.8
SYSTEM_SHARE = 0.1


def draw_documents(seed: str, excluded: frozenset[str]) -> Iterator[str]:
    """Endless training documents; no chat has a message from `excluded`."""
    random = Random(f"corpus/{seed}")
    while True:
        if random.random() < CHAT_SHARE:
            messages = _draw(random, CHATS)
            if not excluded.isdisjoint(content for _, content in messages):
                continue
            if random.random() < SYSTEM_SHARE:
                messages = [("system", random.choice(SYSTEM_PROMPTS)), *messages]
            yield render_chat(messages)
        else:
            yield f"{BOS}{_draw(random, TEXTS)}{EOS}"


def _draw(random: Random, makers: list[tuple[float, Callable[[Random], Drawn]]]) -> Drawn:
    weights = [weight for weight, _ in makers]
    make = random.choices([make for _, make in makers], weights)[0]
    return make(random)
