"""Models from the Hugging Face hub. Called by source, for what is no local directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from loraswarm.errors import ConfigError


def download(model: str, files: Sequence[str]) -> Path:
    """The directory of the hub's cache that holds at least `files` (patterns) of a repository.

    Raises    ConfigError: one line on why the hub did not deliver.
    """
    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # whatever the hub client or its HTTP library raises
        raise ConfigError(f"model {model!r} is not a local directory and {_why(error)}") from error


def _why(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "the hub repository is gated: accept its terms there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such public repository (for a private one set HF_TOKEN)"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub cannot be reached, nor does the hub cache hold it whole"
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"the hub did not deliver it: {type(error).__name__}: {first_line}"
