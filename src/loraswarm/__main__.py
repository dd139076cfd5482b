"""The command line: options, help, and errors as one line.

Each command imports what it needs when it runs, so that `--help` is instant. Exit code 0 on
success, 1 with one line on standard error for a user's mistake.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from loraswarm import __version__
from loraswarm.commands.bench_app import app as bench_app
from loraswarm.commands.cluster_options import (
    MaxReplicas,
    MinReplicas,
    RayAddress,
    ReplicaBackend,
    ReplicaCpus,
    ReplicaGpus,
    Replicas,
    RouterName,
)
from loraswarm.commands.options import parse_bytes
from loraswarm.commands.simulate_app import app as simulate_app
from loraswarm.config import EngineConfig, ServerConfig
from loraswarm.core.request import SamplingParams
from loraswarm.errors import LoRASwarmError

app = typer.Typer(
    name="loraswarm",
    help="Serve a swarm of LoRA adapters from one base model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
adapters_app = typer.Typer(
    help="Check adapters before they are served, or convert them.", rich_markup_mode=None
)
app.add_typer(adapters_app, name="adapters")
app.add_typer(bench_app, name="bench")
app.add_typer(simulate_app, name="simulate")

Model = Annotated[str, typer.Argument(help="A Hugging Face directory, or a hub id.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="A directory or URL (s3://, gs://, hf://, http(s)://) of adapters, or of one; may be"
        " repeated."
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")]
Device = Annotated[str, typer.Option(help="auto (the CPU), cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16 or float32.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and answer together [default: model's]")
]
MemoryUtilization = Annotated[
    float, typer.Option(help="Share of free memory for the page pool, if --pool-bytes is not set.")
]
PoolBytes = Annotated[
    str | None,
    typer.Option(help="Size of the pool of K/V and adapter pages, e.g. 4GiB [default: auto]"),
]
HostCacheBytes = Annotated[
    str | None,
    typer.Option(
        help="Host memory for adapters that are ready to be copied to the pool, e.g. 8GiB"
        " [default: a fifth of the free memory, at most 4GiB]"
    ),
]
HostCacheDir = Annotated[
    str | None,
    typer.Option(help="Keep them in files of this directory, for the next start."),
]
RefreshInterval = Annotated[
    float | None,
    typer.Option(help="Seconds between scans of --adapters [default: only when asked]"),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--prefix-caching/--no-prefix-caching", help="Share K/V of prompts that begin alike."
    ),
]
EvictionPolicy = Annotated[
    str,
    typer.Option(
        "--eviction",
        help="What leaves the pool first: cost (the cheapest to miss) or lru (the least recently"
        " used).",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Keep the base's matrices as integers: int8 or int4 [default: as floats]"),
]
Merge = Annotated[
    str,
    typer.Option(
        metavar="auto|off|NAME",
        help="NAME is merged into a copy of the base's weights at start, and others are served"
        " beside it.",
    ),
]
MergeBytes = Annotated[
    str | None,
    typer.Option(help="Memory for merged weights, e.g. 2GiB [default: what there is]"),
]
CostModelFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="What `loraswarm bench calibrate` wrote, to judge costs by at first."
    ),
]
MaxNumSequences = Annotated[int, typer.Option(help="Most requests in one step.")]
MaxStepTokens = Annotated[int, typer.Option(help="Most tokens in one step.")]
NumThreads = Annotated[int | None, typer.Option(help="CPU threads [default: physical cores]")]
Seed = Annotated[int | None, typer.Option(help="Makes requests without a seed repeatable.")]
ApiKey = Annotated[str | None, typer.Option(help="Key that clients must send.")]
ServedModelName = Annotated[
    str | None, typer.Option(help="Name of the base model [default: last part of MODEL]")
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"loraswarm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Serve a swarm of LoRA adapters from one base model."""


@app.command()
def serve(
    model: Model,
    adapters: Adapters = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    memory_utilization: MemoryUtilization = 0.9,
    pool_bytes: PoolBytes = None,
    host_cache_bytes: HostCacheBytes = None,
    host_cache_dir: HostCacheDir = None,
    refresh_interval: RefreshInterval = None,
    prefix_caching: PrefixCaching = True,
    eviction: EvictionPolicy = "cost",
    quantize: Quantize = None,
    cost_model: CostModelFile = None,
    merge: Merge = "off",
    merge_bytes: MergeBytes = None,
    max_num_sequences: MaxNumSequences = 128,
    max_step_tokens: MaxStepTokens = 512,
    num_threads: NumThreads = None,
    seed: Seed = None,
    api_key: ApiKey = None,
    served_model_name: ServedModelName = None,
    replicas: Replicas = None,
    min_replicas: MinReplicas = None,
    max_replicas: MaxReplicas = None,
    ray_address: RayAddress = None,
    replica_backend: ReplicaBackend = "ray",
    replica_cpus: ReplicaCpus = None,
    replica_gpus: ReplicaGpus = 0.0,
    router: RouterName = "marginal",
) -> None:
    """Serve MODEL and its adapters through an OpenAI-compatible API."""
    options = dict(locals())
    from loraswarm.commands.serve_options import run

    raise typer.Exit(run(options))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue, or the message with --chat.")],
    adapter: Annotated[
        str | None, typer.Option(help="An adapter's directory, or its name within --adapters.")
    ] = None,
    adapters: Adapters = None,
    chat: Annotated[bool, typer.Option(help="Ask through the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens only.")] = 1.0,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    pool_bytes: PoolBytes = None,
    quantize: Quantize = None,
    num_threads: NumThreads = None,
) -> None:
    """Answer one prompt, streamed to the terminal."""
    config = _engine_config(
        model=model,
        adapters=tuple(adapters or ()),
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        pool_bytes=parse_bytes("--pool-bytes", pool_bytes),
        quantize=quantize,
        num_threads=num_threads,
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    from loraswarm.commands.generate import generate as run

    run(config, adapter, prompt, params, chat)


@app.command()
def demo(
    serve: Annotated[
        bool, typer.Option("--serve", help="Keep serving after the mixed batch.")
    ] = False,
    host: Host = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port [default: 8000 with --serve, else a free one]")
    ] = None,
    dtype: Dtype = "float32",
    num_threads: NumThreads = None,
) -> None:
    """Serve the bundled swarm, send one mixed batch, print each model's answers."""
    free_or_usual = 8000 if serve else 0
    server = ServerConfig(host=host, port=free_or_usual if port is None else port)
    from loraswarm.commands.demo import demo as run

    raise typer.Exit(run(server, serve, dtype, num_threads))


@app.command()
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="An adapter's directory, or a .nemo file.")],
    out: Annotated[
        str, typer.Option("--out", "-o", help="A directory for the result, new or empty.")
    ],
    dtype: Annotated[
        str, typer.Option(help="auto (each weight's own), bfloat16, float16 or float32.")
    ] = "auto",
) -> None:
    """Write MODEL with ADAPTER in its weights, as a checkpoint that transformers loads."""
    from loraswarm.commands.merge import merge as run

    run(model, adapter, out, dtype)


@adapters_app.command("check")
def check_adapters(
    paths: Annotated[
        list[str],
        typer.Argument(help="Adapters, directories of adapters or .nemo files.", metavar="PATH"),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The base: a directory or a hub id [default: what the adapter names]"),
    ] = None,
    dtype: Dtype = "auto",
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Do not read the weights: faster.")
    ] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Say what adapters are, what they take, and which would be refused, and why.

    Exit code 1 if any is refused.
    """
    from loraswarm.commands.adapters import CheckOptions, check

    options = CheckOptions(model=model, dtype=dtype, reads_weights=not headers_only)
    raise typer.Exit(check(paths, options, is_json))


@adapters_app.command("convert")
def convert_adapter(
    source: Annotated[str, typer.Argument(help="An adapter's directory, or a .nemo file.")],
    out: Annotated[
        str, typer.Option("--out", "-o", help="A directory for the result, new or empty.")
    ],
) -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    from loraswarm.commands.adapters import convert

    convert(source, out)


def _engine_config(**fields: Any) -> EngineConfig:
    return EngineConfig.from_options(fields)


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for chatty in ("httpx", "httpx2", "matplotlib", "openai", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except LoRASwarmError as error:
        sys.exit(_fail(str(error)))
    except TyperException as error:
        sys.exit(_fail(_describe(error)))
    except OSError as error:
        sys.exit(_fail(_describe_system(error)))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code or 0)


def _describe(error: TyperException) -> str:
    format_message = getattr(error, "format_message", None)
    text = format_message() if format_message else str(error)
    return f"{text.rstrip('.')}. Try 'loraswarm --help'."


def _describe_system(error: OSError) -> str:
    """What no command foresaw: a disk that is full, a directory that may not be entered."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"cannot access {error.filename!r}: {reason}"


def _fail(message: str) -> int:
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    print(f"loraswarm: error: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
