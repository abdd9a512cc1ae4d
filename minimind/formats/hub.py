"""Upload of an exported model to the Hugging Face Hub (`pip install huggingface_hub`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError, needs_package

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
