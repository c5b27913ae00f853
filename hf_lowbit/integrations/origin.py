"""Where a model came from: a repository of the Hub or a local folder, and the small text files beside its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SNAPSHOT = re.compile(
    r".*[/\\]models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[^/\\]+)"
    r"(?:[/\\](?P<subfolder>.+?))?[/\\]?"
)
_UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


@dataclass(frozen=True)
class HubOrigin:
    """A place on the Hub: repository, the commit it was loaded at if known, and the folder inside."""

    repo_id: str
    revision: str | None = None
    subfolder: str = ""


def hub_origin(source: str | None) -> HubOrigin | None:
    """The repository that a source names, itself or as a folder of the client's cache; None for local folders."""
    if not source:
        return None
    if found := _SNAPSHOT.fullmatch(source):
        subfolder = (found["subfolder"] or "").replace("\\", "/")
        return HubOrigin(f"{found['owner']}/{found['name']}", found["revision"], subfolder)
    if _REPO_ID.fullmatch(source) and not Path(source).exists():
        return HubOrigin(source)
    return None


def name_or_path(model: Any) -> str | None:
    """What ``from_pretrained`` was given for a transformers or diffusers model; None if it was not used."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name) if name else None


def base_model_record(model: Any) -> dict[str, str]:
    """``{"base_model": repository}`` for the provenance of a model loaded from the Hub, else nothing."""
    origin = hub_origin(name_or_path(model))
    return {"base_model": origin.repo_id} if origin is not None else {}


def read_beside(source: str | None, filename: str, *, revision: str | None = None, download: bool = True) -> str | None:
    """A small text file of the folder or repository that a model was loaded from.

    Args:
        source: folder or repository id.
        filename: its name there.
        revision: the commit the model was loaded at.
        download: ask the Hub when the file is not in the client's cache.

    Returns:
        Its text; None where there is none, or where it cannot be had (no network, no access).
    """
    if source is None:
        return None
    try:
        local = Path(source) / filename
        if local.is_file():
            return local.read_text(encoding="utf-8")
        origin = hub_origin(source)
        if origin is None:
            return None
        path = f"{origin.subfolder}/{filename}" if origin.subfolder else filename
        revision = origin.revision or revision
        cached = try_to_load_from_cache(origin.repo_id, path, revision=revision)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        if cached is not None or not download:  # known to be absent
            return None
        return Path(hf_hub_download(origin.repo_id, path, revision=revision)).read_text(encoding="utf-8")
    except (*_UNREACHABLE, UnicodeDecodeError):
        return None
