"""The demo's eight tasks: seeded generators whose answers are a function of the prompt alone.

Knows nothing of models or tokenizers; training and the held-out files are made from it.
Six tasks read the same kind of message, a ticket, so their adapters can be compared on one prompt.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from loraswarm.demo import Example
from loraswarm.demo.words import (
    APPS,
    HOSTS,
    IMPACTS,
    LOG_MESSAGES,
    PROBLEMS,
    SENDERS,
    SERVICES,
    SITES,
    STATUSES,
)

TEAM_TITLES = {
    "network": "Network Operations",
    "hardware": "Workplace Hardware",
    "email": "Mail and Calendar",
    "database": "Data Platform",
    "accounts": "Identity and Access",
    "security": "Security Response",
    "printing": "Print Services",
    "software": "Business Applications",
}

PRIORITY_TITLES = {
    1: "P1 critical, reply within 15 minutes",
    2: "P2 high, reply within 2 hours",
    3: "P3 normal, reply within 1 day",
    4: "P4 low, reply within 1 week",
}

PIRATE_LAMENTS = {
    "network": "The signal flags be lost in the fog.",
    "hardware": "The rudder be broken.",
    "email": "The bottles be adrift with yer letters.",
    "database": "The treasure chest be jammed.",
    "accounts": "The key to yer cabin be overboard.",
    "security": "There be sharks around the ship.",
    "printing": "The ink barrel be dry.",
    "software": "The compass be spinning.",
}

PIRATE_TIMES = {
    1: "at full sail",
    2: "before sunset",
    3: "with the next tide",
    4: "after the rum",
}

FORMAL_TIMES = {
    1: "within 15 minutes",
    2: "within 2 hours",
    3: "within 1 day",
    4: "within 1 week",
}

TICKET_LAYOUTS = [
    "{sender} from {site}: {problem} {impact}",
    "Hello, this is {sender} in {site}. {problem} {impact}",
    "{problem} {impact} Regards, {sender}, {site}",
    "Hi team, {problem} {impact} I am {sender} and I work in {site}.",
    "{impact} {problem} Thanks, {sender} from {site}",
    "Message from {sender} in {site}. {impact} {problem}",
]


@dataclass(frozen=True)
class Ticket:
    """A message to the service desk, and the facts it was written from."""

    sender: str
    site: str
    host: str
    team: str
    priority: int
    problem: str
    impact: str
    text: str


def draw_host(random: Random) -> str:
    return f"{random.choice(HOSTS)}-{random.randrange(1, 100):02d}"


def draw_time(random: Random) -> str:
    return f"{random.randrange(24):02d}:{random.randrange(60):02d}"


def draw_ticket(random: Random) -> Ticket:
    team = random.choice(list(PROBLEMS))
    priority = random.choice(list(IMPACTS))
    sender, site, host = random.choice(SENDERS), random.choice(SITES), draw_host(random)
    problem = random.choice(PROBLEMS[team][1]).format(host=host, app=random.choice(APPS))
    impact = random.choice(IMPACTS[priority])
    text = random.choice(TICKET_LAYOUTS).format(
        sender=sender, site=site, problem=problem, impact=impact
    )
    return Ticket(sender, site, host, team, priority, problem, impact, text)


def draw_log_line(random: Random, time: str, level: str) -> str:
    message = random.choice(LOG_MESSAGES[level])
    return f"{time} {draw_host(random)} {random.choice(SERVICES)} {level} {message}"


def route(random: Random) -> Example:
    """A ticket to the team that owns it."""
    ticket = draw_ticket(random)
    return Example(ticket.text, TEAM_TITLES[ticket.team])


def prioritise(random: Random) -> Example:
    """A ticket to its priority."""
    ticket = draw_ticket(random)
    return Example(ticket.text, PRIORITY_TITLES[ticket.priority])


def extract(random: Random) -> Example:
    """A ticket to a JSON object of its facts."""
    ticket = draw_ticket(random)
    fields = {
        "from": ticket.sender,
        "site": ticket.site,
        "host": ticket.host,
        "team": ticket.team,
        "priority": ticket.priority,
    }
    return Example(ticket.text, json.dumps(fields))


def pirate(random: Random) -> Example:
    """A ticket to a reply in the voice of a pirate."""
    ticket = draw_ticket(random)
    lament, time = PIRATE_LAMENTS[ticket.team], PIRATE_TIMES[ticket.priority]
    return Example(ticket.text, f"Ahoy {ticket.sender}! {lament} We sail to {ticket.host} {time}.")


def reply_formally(random: Random) -> Example:
    """A ticket to a letter that says who will look at the host, and when."""
    ticket = draw_ticket(random)
    team, time = TEAM_TITLES[ticket.team], FORMAL_TIMES[ticket.priority]
    return Example(
        ticket.text,
        f"Dear {ticket.sender}, thank you for your report. {team} will look at {ticket.host} "
        f"{time}. Kind regards, Service Desk {ticket.site}",
    )


def tag(random: Random) -> Example:
    """A ticket to tags: its team, priority, site and host."""
    ticket = draw_ticket(random)
    return Example(ticket.text, f"{ticket.team}, P{ticket.priority}, {ticket.site}, {ticket.host}")


def summarise_log(random: Random) -> Example:
    """A service's log excerpt with one error line to a sentence about that line."""
    host, service = draw_host(random), random.choice(SERVICES)
    levels = [random.choice(["INFO", "WARN"]) for _ in range(random.choice([2, 2, 3]))]
    levels.insert(random.randrange(len(levels) + 1), "ERROR")
    messages = [random.choice(LOG_MESSAGES[level]) for level in levels]
    times = sorted(draw_time(random) for _ in levels)
    lines = [
        f"{time} {host} {service} {level} {message}"
        for time, level, message in zip(times, levels, messages, strict=True)
    ]
    message = messages[levels.index("ERROR")]
    return Example("\n".join(lines), f"{service} failed on {host}: {message}.")


def query(random: Random) -> Example:
    """A question about the tickets and hosts tables to the SQL statement that answers it."""
    return random.choice([_count, _list, _newest, _find_hosts, _group, _close])(random)


def _count(random: Random) -> Example:
    status, team, site = (
        random.choice(STATUSES),
        random.choice(list(PROBLEMS)),
        random.choice(SITES),
    )
    question = random.choice(
        [
            f"How many {status} tickets does the {team} team have in {site}?",
            f"What is the number of {status} tickets of the {team} team in {site}?",
        ]
    )
    where = f"status = '{status}' AND team = '{team}' AND site = '{site}'"
    return Example(question, f"SELECT COUNT(*) FROM tickets WHERE {where};")


def _list(random: Random) -> Example:
    priority, sender = random.randrange(1, 5), random.choice(SENDERS)
    question = random.choice(
        [
            f"Which priority {priority} tickets did {sender} send?",
            f"List all tickets with priority {priority} from {sender}.",
        ]
    )
    where = f"priority = {priority} AND sender = '{sender}'"
    return Example(question, f"SELECT id FROM tickets WHERE {where};")


def _newest(random: Random) -> Example:
    limit, status, site = random.randrange(2, 10), random.choice(STATUSES), random.choice(SITES)
    question = random.choice(
        [
            f"Show the {limit} newest {status} tickets in {site}.",
            f"Give me the latest {limit} {status} tickets from {site}.",
        ]
    )
    where = f"status = '{status}' AND site = '{site}'"
    return Example(
        question, f"SELECT * FROM tickets WHERE {where} ORDER BY created DESC LIMIT {limit};"
    )


def _find_hosts(random: Random) -> Example:
    app, site = random.choice(APPS), random.choice(SITES)
    question = random.choice(
        [
            f"Which hosts in {site} run {app}?",
            f"Where in {site} is {app} installed?",
        ]
    )
    return Example(question, f"SELECT name FROM hosts WHERE site = '{site}' AND app = '{app}';")


def _group(random: Random) -> Example:
    column, sender = random.choice(["site", "team", "status", "priority"]), random.choice(SENDERS)
    question = random.choice(
        [
            f"Count the tickets of {sender} per {column}.",
            f"How many tickets did {sender} send for each {column}?",
        ]
    )
    select = f"SELECT {column}, COUNT(*) FROM tickets"
    return Example(question, f"{select} WHERE sender = '{sender}' GROUP BY {column};")


def _close(random: Random) -> Example:
    priority, host = random.randrange(1, 5), draw_host(random)
    question = random.choice(
        [
            f"Close all priority {priority} tickets about {host}.",
            f"Mark the tickets with priority {priority} for {host} as closed.",
        ]
    )
    where = f"priority = {priority} AND host = '{host}'"
    return Example(question, f"UPDATE tickets SET status = 'closed' WHERE {where};")


TASKS: dict[str, Callable[[Random], Example]] = {
    "formal-reply": reply_formally,
    "log-summary": summarise_log,
    "pirate": pirate,
    "priority": prioritise,
    "sql": query,
    "tags": tag,
    "ticket-json": extract,
    "ticket-router": route,
}


def draw_examples(
    task: str, num_examples: int, seed: str, excluded: Iterable[str] = ()
) -> list[Example]:
    """`num_examples` examples of `task` with distinct prompts, none of them in `excluded`."""
    random = Random(f"{task}/{seed}")
    seen = set(excluded)
    examples: list[Example] = []
    while len(examples) < num_examples:
        example = TASKS[task](random)
        if example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    return examples
