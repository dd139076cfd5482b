"""The options of `loraswarm bench`: how they are written, what they mean, which go together.

One dataclass is the one list of them: the command line is made from its fields. Does nothing yet;
commands/bench runs what the options say.
"""

from __future__ import annotations

import dataclasses
import inspect
import json as jsonlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from loraswarm.errors import ConfigError

DEFAULT_CONCURRENCY = 32
MODELS_PATH = "/v1/models"
MAX_TIMEOUT_S = 1e6
FOR_URL = ("base_model", "api_key", "timeout", "adapters_from", "extra_body", "new_connections")
# What the workload decides, and what is measured depends on.
OWN_FIELDS = ("model", "prompt", "max_tokens", "stream")
FOR_OFFLINE = (
    "adapters_dir",
    "dtype",
    "pool_bytes",
    "max_model_len",
    "num_threads",
    "quantize",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """As on the command line; what is text is read by bench/workload and bench/goodput."""

    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, http://HOST:PORT.")
    ] = None
    offline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure an engine in this process instead.")
    ] = None
    base_model: Annotated[
        str | None,
        typer.Option(
            help="Name of the base; without --adapters-from the endpoint is then not asked"
            " which models it has"
            " [default: the one of /v1/models that has no parent]"
        ),
    ] = None
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C",
            help="Adapters to ask for, the most popular first"
            " [default: none with --url, all with --offline]",
        ),
    ] = None
    adapters_from: Annotated[
        str | None,
        typer.Option(metavar=MODELS_PATH, help="Ask for all adapters that the endpoint lists."),
    ] = None
    popularity: Annotated[
        str,
        typer.Option(
            help="uniform, round-robin, zipf:1.1, zipf:1.1:drift=0.05, skew:0.2:0.8 (20 % of the"
            " adapters get 80 %), distinct, identical or trace:FILE."
        ),
    ] = "uniform"
    base_share: Annotated[float, typer.Option(help="Share of requests without an adapter.")] = 0.0
    prompt_tokens: Annotated[
        str,
        typer.Option(
            help="128, uniform:64:256, normal:128:32, lognormal:128:0.5, quantiles:FILE,"
            " trace-prompt:FILE or azure-conv-prompt."
        ),
    ] = "128"
    output_tokens: Annotated[
        str, typer.Option(help="Likewise, with -output; no answer ends earlier.")
    ] = "64"
    shared_prefix: Annotated[
        float, typer.Option(help="Share of each prompt that is one of its adapter's prefixes.")
    ] = 0.0
    prefixes: Annotated[int, typer.Option(help="Number of such prefixes for each adapter.")] = 1
    vocab_size: Annotated[int, typer.Option(help="Prompts are random token ids below this.")] = 4000
    requests: Annotated[int, typer.Option(help="Requests in a run.")] = 96
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Requests in flight; several numbers are a run each. With arrivals a limit, and"
            " the wait for a place is in no figure [default: 32; no limit if there are arrivals]",
        ),
    ] = None
    arrivals: Annotated[
        str,
        typer.Option(
            help="closed (the next when one ends), poisson:4.0 (a second), gamma:4.0:2.0 (with this"
            " coefficient of variation) or trace:FILE."
        ),
    ] = "closed"
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Requests before each run that are not counted, of all models that it asks for in"
            " turn [default: one for each model, at least 8]"
        ),
    ] = None
    repeats: Annotated[int, typer.Option(help="Runs of each concurrency; medians are shown.")] = 1
    seed: Annotated[int, typer.Option(help="Makes the workload; each run has the next one.")] = 0
    goodput: Annotated[
        str | None,
        typer.Option(help='Limits of a good request in seconds: "ttft:0.5 itl:0.05 latency:5".'),
    ] = None
    api_key: Annotated[str | None, typer.Option(help="Key that the endpoint wants.")] = None
    timeout: Annotated[float, typer.Option(help="Seconds after which a request failed.")] = 600.0
    extra_body: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Fields to add to every request's JSON object."),
    ] = None
    new_connections: Annotated[
        bool,
        typer.Option("--new-connections", help="Send each request on a connection of its own."),
    ] = False
    adapters_dir: Annotated[
        list[str] | None,
        typer.Option(help="A directory of adapters, for --offline; may be repeated."),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="auto, bfloat16, float16 or float32, for --offline.")
    ] = "auto"
    pool_bytes: Annotated[
        str | None, typer.Option(help="Size of the pool, e.g. 4GiB, for --offline.")
    ] = None
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer, for --offline.")
    ] = None
    num_threads: Annotated[int | None, typer.Option(help="CPU threads, for --offline.")] = None
    quantize: Annotated[str | None, typer.Option(help="int8 or int4, for --offline.")] = None
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write the result here.")] = None
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Write the figures here.")] = None
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write pictures here: .png or .html.")
    ] = None
    records: Annotated[
        bool, typer.Option("--records", help="Keep each request's times in the JSON file.")
    ] = False
    allow_errors: Annotated[
        bool, typer.Option("--allow-errors", help="Exit code 0 although some requests failed.")
    ] = False

    def is_given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return bool(getattr(self, name) != defaults[name])

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """What --adapters lists."""
        return () if self.adapters is None else tuple(self.adapters.split(","))

    def concurrencies(self) -> tuple[int | None, ...]:
        """One for each run of a round; None: no limit. Raises ConfigError if it cannot be read."""
        if self.concurrency is None:
            return (DEFAULT_CONCURRENCY if self.arrivals == "closed" else None,)
        try:
            found = [int(text) for text in self.concurrency.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < 1 or len(set(found)) < len(found):
            raise ConfigError(
                f"--concurrency is {self.concurrency!r}; give different numbers >= 1, as in 1,8,32"
            )
        return tuple(found)

    def extra_fields(self) -> dict[str, Any]:
        """What --extra-body says. Raises ConfigError if it cannot be read or has OWN_FIELDS."""
        if self.extra_body is None:
            return {}
        try:
            found = jsonlib.loads(self.extra_body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--extra-body is {self.extra_body!r}; no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(
                f'--extra-body is {self.extra_body!r}; it must be an object, as in {{"top_k": 1}}'
            )
        for name in OWN_FIELDS:
            if name in found:
                raise ConfigError(f"--extra-body has {name!r}, which the workload decides")
        return found

    def check(self) -> None:
        """Refuse options that do not go together, and numbers out of range.

        Raises   ConfigError naming the option.
        """
        if (self.url is None) == (self.offline is None):
            raise ConfigError("give either --url of an endpoint or --offline MODEL")
        wrong, needed = (FOR_OFFLINE, "--offline") if self.url else (FOR_URL, "--url")
        for name in filter(self.is_given, wrong):
            raise ConfigError(f"{written(name)} needs {needed}")
        self._check_adapters()
        for name, number, least in (("warmup", self.warmup, 0), ("repeats", self.repeats, 1)):
            if number is not None and number < least:
                raise ConfigError(f"--{name} is {number}; it must be >= {least}")
        if not 0 < self.timeout <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout is {self.timeout}; it must be > 0 and at most {MAX_TIMEOUT_S:,.0f} s"
            )
        if self.api_key is not None and not self.api_key.isprintable():
            raise ConfigError("--api-key has a line break or another character that no header has")
        self.extra_fields()
        if self.records and self.json is None:
            raise ConfigError("--records needs --json FILE, which they are kept in")

    def _check_adapters(self) -> None:
        if "" in self.adapter_names:
            raise ConfigError(f"--adapters is {self.adapters!r}; give names, as in a,b,c")
        if self.adapters is not None and self.adapters_from is not None:
            raise ConfigError("give either --adapters or --adapters-from")
        if self.adapters_from not in (None, MODELS_PATH):
            raise ConfigError(
                f"--adapters-from is {self.adapters_from!r}; it must be {MODELS_PATH}"
            )


def command_of(run: Callable[[typer.Context, BenchOptions], None]) -> Callable[..., None]:
    """A function that Typer reads as having the fields of BenchOptions as its options."""

    def command(**values: Any) -> None:
        context = values.pop("context")
        run(context, BenchOptions(**values))

    hints = get_type_hints(BenchOptions, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for field in dataclasses.fields(BenchOptions):
        annotation = hints[field.name]
        parameters.append(
            inspect.Parameter(field.name, kind, default=field.default, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = run.__doc__
    return command


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}")


def written(name: str) -> str:
    """An option's name as people write it."""
    return "--" + name.replace("_", "-")
