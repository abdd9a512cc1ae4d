"""Models of the Hugging Face Hub: download, and upload of an export (`pip install huggingface_hub`)."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError, needs_package

PREFIX = "hf://"
_MODEL = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Files of a repository: those beside the weights, and the weights in the formats that transformers reads.
_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHTS = ("*.safetensors", "*.bin")
_FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".gguf", ".json")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_model_name(text: str) -> bool:
    """Return whether a text names a model of the Hub: `hf://owner/name[@revision]`, or the same without `hf://`.

    A path that exists is a path, as is one whose first folder exists, and the name of a file.
    """
    if text.startswith(PREFIX):
        return True
    match = _MODEL.fullmatch(text)
    if match is None or text.endswith(_FILE_SUFFIXES):
        return False
    return not Path(text).exists() and not Path(text).parent.exists()


@lru_cache
def model_snapshot(text: str) -> Path:
    """Download the files of a model of the Hub into its cache, and return their folder, named by the commit.

    Without a network, files that were downloaded before count.

    Raises:
        ConfigError: for a name that is not one or is not on the Hub, and where nothing can be downloaded.
    """
    match = _MODEL.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise ConfigError(
            f"{text} is not the name of a model; write hf://owner/name or hf://owner/name@revision."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{text} is no folder here, and a model of the Hub needs the package huggingface_hub, which is "
            "not installed; pip install huggingface_hub."
        ) from error

    def download(pattern: str, *, local: bool) -> Path:
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=[*_SETTINGS, pattern],
            ignore_patterns=["*/*"],
            local_files_only=local,
        )
        return Path(folder)

    try:
        # The files of a commit do not change.
        known = _COMMIT.fullmatch(match["revision"] or "") is not None
        for local in (True, False) if known else (False,):
            try:
                for pattern in _WEIGHTS:
                    folder = download(pattern, local=local)
                    if any(folder.glob(pattern)):
                        return folder
            except FileNotFoundError:  # LocalEntryNotFoundError
                if not local:
                    raise
    except Exception as error:  # of its HTTP library too, which depends on the version
        raise ConfigError(f"{text}: {_download_problem(match['name'], error)}") from error
    raise ConfigError(f"{text} has no weights in safetensors or .bin files; choose another model.")


def pinned_name(text: str) -> str:
    """Return the path, or the name of a model of the Hub with its commit, so that it stays the same.

    Raises:
        ConfigError: see `model_snapshot`.
    """
    if not is_model_name(text):
        return text
    name = text.removeprefix(PREFIX).partition("@")[0]
    return f"{PREFIX}{name}@{model_snapshot(text).name}"


def _download_problem(name: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return (
            f"the model is gated; accept its conditions on https://huggingface.co/{name} and run "
            "`hf auth login`."
        )
    if kind == "RepositoryNotFoundError":
        return (
            "there is no such folder here and no such model on the Hub; check the name, or `hf auth login`."
        )
    if kind == "RevisionNotFoundError":
        return "the model has no such revision; check what follows the @."
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return (
            "there is no such folder here, the Hub cannot be reached, and the model was not downloaded "
            "before; check the path, or the network and HF_HUB_OFFLINE."
        )
    described = " ".join(str(error).split())[:200] or kind
    return f"the model could not be downloaded ({described}); check the network and try again."


class HubRepository:
    """A model repository on the Hub, which need not exist yet."""

    def __init__(self, name: str) -> None:
        """Check name, package and token, before an export that may take long.

        Args:
            name: `owner/name`; without an owner, the repository belongs to the user of the token.

        Raises:
            ConfigError: for an invalid name, a missing package or token, or when the Hub does not answer.
        """
        if _NAME.fullmatch(name) is None or len(name) > 96:
            raise ConfigError(
                f"--push-to-hub {name} is not a repository name; write owner/name with letters, digits, '-', "
                "'_' and '.'."
            )
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ConfigError(needs_package("--push-to-hub", "huggingface_hub")) from error
        self._api: Any = HfApi()
        try:
            user = self._api.whoami()["name"]
        except Exception as error:  # of its HTTP library too, which depends on the version
            raise ConfigError(f"--push-to-hub: {_reason(error)}") from error
        self.name = name if "/" in name else f"{user}/{name}"

    def upload(self, folder: Path) -> str:
        """Upload all files of a folder in one commit, and return the address of the repository.

        A new repository is private, so that nothing is published by mistake.

        Raises:
            UserError: when the upload fails; the folder stays.
        """
        try:
            address = self._api.create_repo(self.name, private=True, exist_ok=True)
            self._api.upload_folder(
                repo_id=self.name, folder_path=str(folder), commit_message="Upload a model of minimind-train"
            )
        except Exception as error:
            raise UserError(
                f"--push-to-hub: {_reason(error)} The export is complete in {folder}; upload it later with "
                f"`hf upload {self.name} {folder}`."
            ) from error
        return str(address)


def _reason(error: Exception) -> str:
    """Return why a request failed and how to fix it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "LocalTokenNotFoundError" or status == 401:
        return (
            "there is no valid token of the Hub; run `hf auth login`, or set HF_TOKEN to one that may write."
        )
    if status == 403:
        return "the token may not write to this repository; use one with write access, or another name."
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set; unset it."
    described = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the Hub did not accept the request ({described}); check the network and try again."
