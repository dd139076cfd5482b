"""Word lists of the demo's service desk: people, sites, hosts, problems, impacts, log messages.

Plain data; the tasks and the training corpus combine it.
"""


def _split(text: str) -> list[str]:
    return text.split()


SENDERS = _split("""
    Maria Jonas Priya Kenji Amara Lucas Elena Omar Sofia Diego Hannah Ivan Leila Marco Nadia
    Oscar Paula Quentin Rosa Samuel Tara Umar Vera Walter Xenia Yusuf Zoe Anton Bianca Carlos
    Daria Emil Fatima George Hugo Ingrid Jacob Karin Louis Mina Nora Oliver Petra Rafael Sara
    Tobias Ursula Victor Wanda Yara Zachary Alice Bruno Clara David Esther Felix Greta Henry
    Irene Jasper Kamala Leon Monica Nils Olga Pablo Ruth Simon Teresa Uma Viktor Wendy Adam
    Berta Conrad Doris Edgar Frida Gustav Helga Isaac Julia Klaus Laura Martin Nina Otto Patrick
    Renata Stefan Thea Vincent Akira Bella Chiara Dennis Eva Farid Gloria Harald Isabel Jun Kofi
    Lena Milan Noah Olivia Pedro Rania Sven Tomas Valeria
""")

SITES = _split("""
    Lisbon Oslo Boston Madrid Vienna Dublin Prague Toronto Geneva Nairobi Seoul Mumbai Denver
    Zurich Milan Warsaw Athens Berlin Lyon Porto Turin Austin Chicago Tokyo Osaka Lagos Lima
    Quito Bogota Hamburg Munich Malmo Bergen Helsinki Tallinn Riga Krakow Seville Naples Dakar
""")

HOSTS = _split("""
    atlas orion comet vega lyra titan nova pulsar draco cygnus rigel hydra apollo zenith luna
    castor pollux sirius altair deneb phobos europa triton oberon ariel juno ceres vesta pallas
    electra kepler galileo halley tycho hubble cassini mercury saturn neptune pluto
""")

APPS = _split("""
    Ledger Payroll Compass Beacon Harbor Notebook Planner Atrium Mosaic Pinboard Tracker Courier
    Lantern Quarry Summit Rocket Cobalt Garnet Falcon Juniper Maple Willow Cedar Walnut
""")

# team -> (what the ticket is about, sentences about it); {host} and {app} are filled in.
PROBLEMS: dict[str, tuple[str, list[str]]] = {
    "network": (
        "connection",
        [
            "The VPN to {host} drops every few minutes.",
            "The wifi near {host} is very slow.",
            "I cannot ping {host} from my desk.",
            "The network cable of {host} has no link.",
            "The route to {host} is gone since the router was changed.",
            "DNS does not resolve the name {host} any more.",
            "Packets to {host} get lost at the switch.",
        ],
    ),
    "hardware": (
        "machine",
        [
            "The laptop {host} does not start.",
            "The fan of {host} makes a loud noise.",
            "The screen of {host} stays black.",
            "The battery of {host} is empty after ten minutes.",
            "The keyboard of {host} has a broken key.",
            "The disk in {host} clicks and the power light is red.",
            "The dock of {host} does not charge.",
        ],
    ),
    "email": (
        "mail",
        [
            "My mailbox on {host} is full.",
            "Mails sent through {host} come back to me.",
            "My calendar on {host} shows no meetings.",
            "The inbox on {host} has not updated today.",
            "Attachments sent through {host} never arrive.",
            "The mailing list on {host} rejects my messages.",
            "Outlook cannot reach the mail server {host}.",
        ],
    ),
    "database": (
        "database",
        [
            "The database on {host} refuses new rows.",
            "A query on {host} has been running for hours.",
            "The nightly dump of the tables on {host} is missing.",
            "The index on {host} seems to be corrupt.",
            "Postgres on {host} reports a deadlock.",
            "The replica of the database on {host} is far behind.",
            "The schema migration on {host} stopped half way.",
        ],
    ),
    "accounts": (
        "login",
        [
            "I forgot my password for {host}.",
            "My account on {host} is locked.",
            "A new colleague needs a login on {host}.",
            "The login page of {host} rejects my token.",
            "I have no permission to open the share on {host}.",
            "My user name on {host} is spelled wrong.",
            "Single sign-on does not let me into {host}.",
        ],
    ),
    "security": (
        "security",
        [
            "The virus scanner found a trojan on {host}.",
            "I clicked a phishing link while I was using {host}.",
            "Somebody unknown has copied files from {host}.",
            "The firewall of {host} was switched off by a stranger.",
            "There is ransomware on {host}.",
            "The certificate of {host} looks forged.",
            "I found a strange USB stick plugged into {host}.",
        ],
    ),
    "printing": (
        "printer",
        [
            "The printer {host} has a paper jam.",
            "The printer {host} is out of toner.",
            "Pages from {host} come out blank.",
            "The scanner part of {host} makes grey stripes.",
            "My print jobs stay in the queue of {host}.",
            "The copier {host} prints on one side only.",
            "The printer {host} wants the wrong paper size.",
        ],
    ),
    "software": (
        "application",
        [
            "{app} crashes on {host} after the update.",
            "I need {app} installed on {host}.",
            "The licence of {app} on {host} has expired.",
            "{app} on {host} freezes when I save.",
            "The menu of {app} on {host} is gone.",
            "{app} on {host} shows an old version.",
            "The export button of {app} does nothing on {host}.",
        ],
    ),
}

IMPACTS: dict[int, list[str]] = {
    1: [
        "The whole company has stopped.",
        "Nobody in the building can work.",
        "All customers are affected.",
        "This is an emergency.",
        "We lose money every minute.",
        "Everything is down.",
    ],
    2: [
        "My whole team is waiting.",
        "Our group cannot finish the report.",
        "Several colleagues have the same trouble.",
        "It must work before noon.",
        "The department is blocked.",
        "We have a deadline today.",
    ],
    3: [
        "It slows me down.",
        "I can use another way for a day.",
        "Only I have this trouble.",
        "It happens now and then.",
        "Please look at it tomorrow.",
        "It is annoying but I can work.",
    ],
    4: [
        "There is no hurry.",
        "Whenever you have time.",
        "It is only a wish.",
        "This can wait until next week.",
        "It is not important.",
        "I just wanted to let you know.",
    ],
}

SERVICES = _split("""
    nginx redis postgres kafka cron sshd docker vault haproxy rabbit celery squid samba bind
    postfix grafana consul etcd jenkins gitea
""")

LOG_MESSAGES: dict[str, list[str]] = {
    "ERROR": [
        "upstream timed out",
        "disk is full",
        "connection refused",
        "out of memory",
        "file not found",
        "permission denied",
        "checksum mismatch",
        "certificate expired",
        "too many open files",
        "broken pipe",
        "lock not released",
        "address already in use",
        "no route to host",
        "invalid config value",
        "worker killed",
        "backup incomplete",
    ],
    "WARN": [
        "slow response",
        "retry in five seconds",
        "cache nearly full",
        "clock drift seen",
        "old protocol used",
        "queue is growing",
        "high load",
        "missing header",
    ],
    "INFO": [
        "worker started",
        "request done",
        "config loaded",
        "health check passed",
        "job finished",
        "user logged in",
        "cache cleared",
        "listening on port 80",
        "backup complete",
        "session closed",
    ],
}

STATUSES = ["open", "closed", "pending", "new"]
