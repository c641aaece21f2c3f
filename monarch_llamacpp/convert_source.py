"""Where a checkpoint comes from: a local folder, or a Hugging Face repository in its own cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import MonarchError, UsageError

DEFAULT_REPO = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

WANTED = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]

MAX_JSON_BYTES = 256 * 2**20


def find_source(source: str) -> tuple[Path, str]:
    """The checkpoint's folder and the model's name."""
    folder = Path(source)
    if folder.is_dir():
        return folder, folder.resolve().name
    if folder.exists():
        raise UsageError(f"{source} is a file; name the folder that holds config.json and the safetensors")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UsageError(f"{source} is neither a folder nor a repo id such as {DEFAULT_REPO}")
    return download(source), source.rsplit("/", 1)[1]


def download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, allow_patterns=WANTED))
    except HFValidationError as error:
        raise UsageError(f"{repo} is not a valid repo id: {first_line(error)}") from error
    except RepositoryNotFoundError as error:
        raise MonarchError(f"Hugging Face has no model {repo}, or it needs a login (hf auth login)") from error
    except LocalEntryNotFoundError as error:
        raise MonarchError(
            f"{repo} is not in the cache and Hugging Face cannot be reached; check the network, or name a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MonarchError(f"{repo} could not be fetched: {first_line(error)}; run again to resume") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise MonarchError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; it is damaged")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise MonarchError(f"{path} is not valid JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise MonarchError(f"{path} holds no JSON object; fetch it again")
    return value
