"""Uploads to the Hub, with a stand-in for its client: no test reaches a network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind.errors import ConfigError, UserError
from minimind.formats.hub import HubRepository


class LocalTokenNotFoundError(OSError):
    """As in huggingface_hub."""


class OfflineModeIsEnabled(ConnectionError):  # noqa: N818
    """As in huggingface_hub."""


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from\nthe server")
        self.response = SimpleNamespace(status_code=status)


class StandIn:
    """Records calls, and fails where told to."""

    calls: list[tuple[str, Any]]
    failures: dict[str, Exception]

    def whoami(self) -> dict[str, str]:
        self._fail("whoami")
        return {"name": "ann"}

    def create_repo(self, name: str, **options: Any) -> str:
        self._fail("create_repo")
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options: Any) -> None:
        self._fail("upload_folder")
        self.calls.append(("upload", options))

    def _fail(self, method: str) -> None:
        if method in self.failures:
            raise self.failures[method]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    api = StandIn()
    api.calls, api.failures = [], {}
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: api))
    return api


def test_the_folder_is_uploaded_to_a_private_repository(hub: StandIn, tmp_path: Path) -> None:
    assert HubRepository("tiny").upload(tmp_path) == "https://hub/ann/tiny"
    assert hub.calls[0] == ("ann/tiny", {"private": True, "exist_ok": True})
    assert hub.calls[1][1].items() >= {"repo_id": "ann/tiny", "folder_path": str(tmp_path)}.items()
    assert HubRepository("bob/tiny").name == "bob/tiny"


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "../x", "-x", "x" * 97])
def test_what_is_no_name_is_refused(name: str, hub: StandIn) -> None:
    with pytest.raises(ConfigError, match="is not a repository name; write owner/name"):
        HubRepository(name)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalTokenNotFoundError("no"), "there is no valid token of the Hub; run `hf auth login`"),
        (Refused(401), "there is no valid token of the Hub; run `hf auth login`"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it."),
        (OSError("no route\nto host"), r"did not accept the request \(no route to host\); check the network"),
    ],
)
def test_no_token_or_no_network_is_noticed_before_the_export(
    error: Exception, sentence: str, hub: StandIn
) -> None:
    hub.failures["whoami"] = error
    with pytest.raises(ConfigError, match=f"^--push-to-hub: .*{sentence}"):
        HubRepository("tiny")


@pytest.mark.parametrize("method", ["create_repo", "upload_folder"])
def test_an_upload_that_fails_says_how_to_repeat_it(method: str, hub: StandIn, tmp_path: Path) -> None:
    repository = HubRepository("tiny")
    hub.failures[method] = Refused(403)
    with pytest.raises(UserError, match=r"may not write .* The export is complete in .*`hf upload ann/tiny "):
        repository.upload(tmp_path)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs the package huggingface_hub.*pip install huggingface_hub"):
        HubRepository("tiny")
