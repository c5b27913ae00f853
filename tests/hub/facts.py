"""What the test Hub says of files and commits, and how it reads what a client sends, in the API's JSON."""

import base64
import hashlib
import re
from typing import Any

import yaml

from tests.hub import store
from tests.hub.store import AddFile, AddLfsFile, Change, Commit, DeleteFile, DeleteFolder, Entry


def parse_change(key: str, value: dict[str, Any]) -> Change:
    """One line of a commit."""
    path = value["path"]
    match key:
        case "file":
            is_base64 = value.get("encoding", "utf-8") == "base64"
            return AddFile(path, base64.b64decode(value["content"]) if is_base64 else value["content"].encode())
        case "lfsFile":
            return AddLfsFile(path, value["oid"], value.get("size"))
        case "deletedFile":
            return DeleteFile(path)
        case "deletedFolder":
            return DeleteFolder(path)
    raise ValueError(f"unknown kind of change: {key}")


def file_fields(entry: Entry, oid_name: str = "oid") -> dict[str, Any]:
    """Size and identity of a file as the API gives them; an LFS file has two ids, its own and its pointer's."""
    fields: dict[str, Any] = {"size": entry.size, oid_name: entry.oid}
    if entry.sha256:
        pointer_size = len(store.lfs_pointer(entry.sha256, entry.size))
        fields["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
    return fields


def path_entries(commit: Commit) -> list[dict[str, Any]]:
    """All folders and files of a commit, sorted; the id of a folder is unique but not the one git computes."""
    folders = {folder for path in commit.files for folder in store.parent_folders(path)}
    entries = [{"type": "file", "path": e.path, **file_fields(e)} for e in commit.files.values()]
    for folder in folders:
        oid = hashlib.sha1(f"{commit.sha} {folder}".encode()).hexdigest()
        entries.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
    return sorted(entries, key=lambda entry: entry["path"])


def card_metadata(text: str) -> dict[str, Any]:
    """The YAML block that a README.md begins with; empty if there is none, ValueError if it is not a mapping."""
    block = re.match(r"\s*---\s*?\n(.*?)^---\s*?$", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from error
    if not isinstance(metadata or {}, dict):
        raise ValueError("metadata must be a mapping")
    return metadata or {}
