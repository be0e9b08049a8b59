"""The folder of a saved value model: config.json, model.safetensors and README.md (the model card).

It holds the stitch and the reward's suffix. The backbone comes from the pipeline that it is loaded onto.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..tensor_files import write_partial
from .model_card import model_card

FORMAT_VERSION = 1
FILES = ("model.safetensors", "README.md", "config.json")


def write_folder(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write all files under temporary names, then rename them, the configuration last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_partial(folder / "model.safetensors", state)
    _write_texts(folder, config)
    for name in FILES:
        (folder / f"{name}.partial").replace(folder / name)


def _write_texts(folder: Path, config: dict[str, Any]) -> None:
    """Configuration and model card, under temporary names."""
    (folder / "config.json.partial").write_text(json.dumps(config, indent=1))
    (folder / "README.md.partial").write_text(model_card(config))


def add_details(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Add entries to a dict among the ``details`` of a saved value model, and write its model card anew.

    Raises:
        OSError: no saved value model.
    """
    config = _read_config(folder)
    config["details"].setdefault(name, {}).update(found)
    _write_texts(folder, config)
    for file in ("README.md", "config.json"):
        (folder / f"{file}.partial").replace(folder / file)


def find_folder(name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """A local folder as it is; any other name as a repository of the Hugging Face Hub, downloaded into its cache.

    Raises:
        OSError: neither, or the Hub cannot be reached.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(name_or_path).is_absolute():
        raise OSError(f"folder: expected a saved value model, got {name_or_path}, which is not there")
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, token=token, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise OSError(f"folder: expected an existing folder or owner/name on the Hub, got {name_or_path}") from error
    except Exception as error:  # no such repository, no network, no rights
        raise OSError(
            f"folder: {name_or_path} is not a folder here, and the Hub gave: {type(error).__name__}: {error}"
        ) from error


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights. Raises OSError where a file is missing, unreadable or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _read_config(folder)
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_value_model(folder, error) from error
    reference = config["reward"].get("reference") or {}
    if reference.get("name", "").startswith("."):  # relative to the value model's own folder
        reference["name"] = str((folder / reference["name"]).resolve())
    return config, state


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise _no_value_model(folder, error) from error
    if config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version")
        raise OSError(f"folder: expected format_version {FORMAT_VERSION} in {folder / 'config.json'}, got {found}")
    return config


def _no_value_model(folder: Path, error: Exception) -> OSError:
    return OSError(f"folder: expected a saved value model (config.json, model.safetensors) in {folder}, got: {error}")


def upload_folder(folder: Path, repo_id: str, *, private: bool, token: str | None, commit_message: str) -> str:
    """Create the repository if needed and upload a saved folder; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message=commit_message, allow_patterns=list(FILES)
    )
    return str(commit)
