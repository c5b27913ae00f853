"""Model repositories of the test Hub, kept on disk; no HTTP in here.

One repository is one self-contained folder:

    <root>/<user>/<name>/HEAD               sha of the newest commit of ``main``
    <root>/<user>/<name>/commits/<sha>.json one commit: parent, title, the complete list of files
    <root>/<user>/<name>/blobs/<sha1>       contents of regular files, by git blob id
    <root>/<user>/<name>/lfs/<sha256>       contents of LFS files

A commit first writes its blobs, then its JSON, then replaces HEAD: whoever reads sees either the old state or the
new one, and a commit that is refused changes nothing.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

LFS_SUFFIXES = ("safetensors", "bin", "gguf", "pt", "pth", "ckpt", "onnx", "npz", "npy", "msgpack", "h5", "zip")
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class StoreError(Exception):
    """Something the store refuses to do; the message is meant for the user."""


class RepoNotFound(StoreError):
    """There is no such repository."""


class RepoExists(StoreError):
    """The repository to create is already there."""


class RevisionNotFound(StoreError):
    """The repository has no such branch or commit."""


class EntryNotFound(StoreError):
    """The commit has no such file or folder."""


class StaleParent(StoreError):
    """The commit was prepared on top of a commit that is no longer the newest."""


class InvalidContent(StoreError):
    """Malformed names, or contents that are not what was announced."""


@dataclass(frozen=True)
class Entry:
    """One file of a commit. ``oid`` is the git blob id: of the contents, or of the pointer if the file is in LFS."""

    path: str
    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    date: str
    files: dict[str, Entry]

    def entry(self, path: str) -> Entry:
        if path not in self.files:
            raise EntryNotFound("Entry not found")
        return self.files[path]


@dataclass(frozen=True)
class AddFile:
    path: str
    content: bytes


@dataclass(frozen=True)
class AddLfsFile:
    """Adds an object that was uploaded before; a ``size`` of None accepts whatever size it has."""

    path: str
    sha256: str
    size: int | None = None


@dataclass(frozen=True)
class DeleteFile:
    path: str


@dataclass(frozen=True)
class DeleteFolder:
    path: str


Change = AddFile | AddLfsFile | DeleteFile | DeleteFolder


def git_blob_id(content: bytes) -> str:
    """The id that git gives a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Store:
    """All repositories under one folder. Safe to use from several threads of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.RLock()

    def create_repo(self, repo_id: str) -> None:
        """Creates a repository whose first commit holds a .gitattributes, as on the Hub."""
        with self._lock:
            folder = self._folder(repo_id)
            if folder.exists():
                raise RepoExists("You already created this model repo")
            for name in ("commits", "blobs", "lfs"):
                (folder / name).mkdir(parents=True)
            self._write_commit(folder, None, [AddFile(".gitattributes", GITATTRIBUTES)], "initial commit", "")

    def delete_repo(self, repo_id: str) -> None:
        with self._lock:
            shutil.rmtree(self._existing(repo_id))

    def read_commit(self, repo_id: str, revision: str = "main") -> Commit:
        """The commit that ``main`` points to, or the one with the given full sha."""
        with self._lock:
            folder = self._existing(repo_id)
            sha = (folder / "HEAD").read_text() if revision == "main" else revision
            file = folder / "commits" / f"{sha}.json"
            if not re.fullmatch(r"[0-9a-f]{40}", sha) or not file.exists():
                raise RevisionNotFound(f"Invalid rev id: {revision}")
            fields = json.loads(file.read_text())
        files = {entry["path"]: Entry(**entry) for entry in fields.pop("files")}
        return Commit(**fields, files=files)

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commit and its ancestors, newest first."""
        commits = [self.read_commit(repo_id, revision)]
        while commits[-1].parent is not None:
            commits.append(self.read_commit(repo_id, commits[-1].parent))
        return commits

    def content_path(self, repo_id: str, entry: Entry) -> Path:
        """Where the contents of a file lie on disk."""
        folder = self._existing(repo_id)
        return folder / "lfs" / entry.sha256 if entry.sha256 else folder / "blobs" / entry.oid

    def has_lfs_object(self, repo_id: str, sha256: str, size: int) -> bool:
        file = self._lfs_path(repo_id, sha256)
        return file.exists() and file.stat().st_size == size

    def put_lfs_object(self, repo_id: str, sha256: str, size: int, source: IO[bytes]) -> None:
        """Stores an LFS object, after checking that it is the one announced."""
        target = self._lfs_path(repo_id, sha256)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            received = Path(folder, sha256)
            with open(received, "wb+") as file:
                shutil.copyfileobj(source, file)
                size_received = file.tell()
                file.seek(0)
                sha256_received = hashlib.file_digest(file, "sha256").hexdigest()
            if (sha256_received, size_received) != (sha256, size):
                raise InvalidContent(
                    f"LFS object {sha256} of {size} bytes announced, got {sha256_received} of {size_received} bytes"
                )
            os.replace(received, target)

    def commit(
        self, repo_id: str, changes: Iterable[Change], title: str, description: str = "", parent: str | None = None
    ) -> Commit:
        """Applies all changes to ``main``, or none. ``parent``, if given, must be the newest commit."""
        with self._lock:
            head = self.read_commit(repo_id)
            if parent is not None and parent != head.sha:
                raise StaleParent("A commit has happened since. Please refresh and try again.")
            return self._write_commit(self._existing(repo_id), head, changes, title, description)

    def _write_commit(
        self, folder: Path, head: Commit | None, changes: Iterable[Change], title: str, description: str
    ) -> Commit:
        files = dict(head.files) if head else {}
        blobs: dict[str, bytes] = {}
        for change in changes:
            match change:
                case AddFile(path, content):
                    entry = Entry(_checked_path(path), git_blob_id(content), len(content))
                    blobs[entry.oid] = content
                    files[path] = entry
                case AddLfsFile(path, sha256, size):
                    files[_checked_path(path)] = _lfs_entry(folder, path, sha256, size)
                case DeleteFile(path):
                    if files.pop(path, None) is None:
                        raise EntryNotFound(f"A file with this name doesn't exist: {path}")
                case DeleteFolder(path):
                    inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                    if not inside:
                        raise EntryNotFound(f"A folder with this name doesn't exist: {path}")
                    for name in inside:
                        del files[name]
        for path in files:
            if any(parent in files for parent in parent_folders(path)):
                raise InvalidContent(f"{path} would lie inside a file")

        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {"parent": head.sha if head else None, "title": title, "description": description, "date": date}
        listing = [asdict(files[path]) for path in sorted(files)]
        sha = hashlib.sha1(json.dumps([str(folder), fields, listing]).encode()).hexdigest()
        for oid, content in blobs.items():
            _write_atomically(folder / "blobs" / oid, content)
        record = json.dumps(fields | {"sha": sha, "files": listing}).encode()
        _write_atomically(folder / "commits" / f"{sha}.json", record)
        _write_atomically(folder / "HEAD", sha.encode())
        return Commit(sha=sha, **fields, files=files)

    def _folder(self, repo_id: str) -> Path:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
            raise InvalidContent(f"Invalid repository name: {repo_id}")
        return self.root / repo_id

    def _existing(self, repo_id: str) -> Path:
        folder = self._folder(repo_id)
        if not (folder / "HEAD").exists():
            raise RepoNotFound("Repository not found")
        return folder

    def _lfs_path(self, repo_id: str, sha256: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise InvalidContent(f"Not a sha256: {sha256}")
        return self._existing(repo_id) / "lfs" / sha256


def parent_folders(path: str) -> list[str]:
    """``a/b/c`` -> ``["a", "a/b"]``."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _checked_path(path: str) -> str:
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise InvalidContent(f"Invalid path in repository: {path!r}")
    return path


def _lfs_entry(folder: Path, path: str, sha256: str, size: int | None) -> Entry:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InvalidContent(f"Not a sha256: {sha256}")
    file = folder / "lfs" / sha256
    if not file.exists():
        raise InvalidContent(f"{path}: LFS object {sha256} was not uploaded")
    actual = file.stat().st_size
    if size is not None and size != actual:
        raise InvalidContent(f"{path}: LFS object {sha256} has {actual} bytes, the commit says {size}")
    return Entry(path, git_blob_id(lfs_pointer(sha256, actual)), actual, sha256)


def _write_atomically(target: Path, content: bytes) -> None:
    temporary = target.with_name(f"{target.name}.{threading.get_ident()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, target)
