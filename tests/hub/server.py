"""The test Hub: the routes that huggingface_hub, transformers and diffusers use for models.

    python -m tests.hub.server --root DIR --port 0

prints one JSON line with its address and logs every request to DIR/requests.log. Anyone may read. Writing needs the
bearer token, and works in every namespace. What is not covered (datasets, branches, pull requests, Xet, multipart
uploads, redirects to a CDN, ...) is answered with status 501 or 400 and a message, never ignored.
"""

import argparse
import base64
import fnmatch
import hashlib
import hmac
import json
import secrets
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.hub import store
from tests.hub.facts import card_metadata, file_fields, parse_change, path_entries
from tests.hub.handling import HttpError, LoggingServer, RoutedHandler, route
from tests.hub.store import Commit, Store

USER = "tester"
REGULAR_LIMIT = 10 << 20
SINGLE_PART_LIMIT = 5 << 30
REPO, REV, REST = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)", r"(?P<path>.+)"


class HubServer(LoggingServer):
    """What the requests share."""

    def __init__(self, root: Path, port: int, token: str) -> None:
        super().__init__(port, Handler, token, root / "requests.log")
        self.store = Store(root / "repos")
        self.upload_key = secrets.token_bytes(16)

    def signature(self, *parts: str) -> str:
        """Makes an upload address usable by whoever was given it: the client sends no token there."""
        return hmac.new(self.upload_key, "/".join(parts).encode(), hashlib.sha256).hexdigest()


class Handler(RoutedHandler):
    """The routes."""

    server: HubServer

    @route("GET", "/")
    def alive(self) -> None:
        """Something to ask for in order to see that the server is up."""
        self.send_json({"hub": "test"})

    @route("GET", "/api/whoami-v2", write=True)
    def whoami(self) -> None:
        """Whose token this is."""
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send_json({"type": "user", "name": USER, "orgs": [], "auth": auth})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        """Checks the metadata block of a README.md; only that it is a YAML mapping, not the names in it."""
        try:
            metadata = card_metadata(self.json_body()["content"])
        except ValueError as error:
            return self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send_json({"errors": [], "warnings": warnings})

    @route("POST", "/api/repos/create", write=True)
    def create_repo(self) -> None:
        """Makes a repository; 409 with its address if it is there already, which ``exist_ok`` relies on."""
        repo, url = self.named_repo()
        try:
            self.server.store.create_repo(repo)
        except store.RepoExists as error:
            return self.send_json({"url": url, "error": str(error)}, 409)
        self.send_json({"url": url, "name": repo, "id": repo})

    @route("DELETE", "/api/repos/delete", write=True)
    def delete_repo(self) -> None:
        """Removes a repository and all its objects."""
        self.server.store.delete_repo(self.named_repo()[0])
        self.send_json({})

    def named_repo(self) -> tuple[str, str]:
        """The repository that the body of create and delete names, and its address."""
        body = self.json_body()
        if body.get("type", "model") != "model":
            raise HttpError(501, None, "the test Hub only has models")
        repo = f"{body.get('organization') or USER}/{body['name']}"
        return repo, f"{self.server.url}/{repo}"

    @route("POST", f"/api/models/{REPO}/preupload/{REV}", write=True)
    def preupload(self, repo: str, rev: str) -> None:
        """Says for each file to upload whether it goes to LFS, and which contents the path has now."""
        commit = self.server.store.read_commit(repo, rev)
        patterns = self.lfs_patterns(repo, commit)
        answers = []
        for file in self.json_body()["files"]:
            binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > REGULAR_LIMIT
            tracked = any(fnmatch.fnmatch(file["path"].rsplit("/")[-1], pattern) for pattern in patterns)
            answer = {"path": file["path"], "uploadMode": "lfs" if binary or tracked else "regular"}
            known = commit.files.get(file["path"])
            answers.append(answer | {"shouldIgnore": False} | ({"oid": known.etag} if known else {}))
        self.send_json({"files": answers})

    def lfs_patterns(self, repo: str, commit: Commit) -> list[str]:
        if ".gitattributes" not in commit.files:
            return []
        text = self.server.store.content_path(repo, commit.entry(".gitattributes")).read_text()
        return [line.split()[0] for line in text.splitlines() if "filter=lfs" in line]

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, repo: str) -> None:
        """Says where to upload LFS objects; those that the repository has need no upload."""
        body = self.json_body()
        if body["operation"] != "upload" or "basic" not in body.get("transfers", ["basic"]):
            raise HttpError(400, None, "the test Hub only takes LFS uploads, with the transfer 'basic'")
        self.send_json({"transfer": "basic", "objects": [self.lfs_answer(repo, item) for item in body["objects"]]})

    def lfs_answer(self, repo: str, item: dict[str, Any]) -> dict[str, Any]:
        oid, size = item["oid"], item["size"]
        if size > SINGLE_PART_LIMIT:
            return item | {"error": {"code": 422, "message": "the test Hub has no multipart uploads"}}
        if self.server.store.has_lfs_object(repo, oid, size):
            return {"oid": oid, "size": size}
        signature = self.server.signature(repo, oid, str(size))
        href = f"{self.server.url}/{repo}.git/lfs/{oid}?size={size}&signature={signature}"
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href}}}

    @route("PUT", rf"/{REPO}\.git/lfs/(?P<oid>[0-9a-f]+)")
    def lfs_upload(self, repo: str, oid: str) -> None:
        """Takes one LFS object whole, at an address that ``lfs_batch`` handed out; stores it only if it is intact."""
        size = self.query.get("size", "")
        expected = self.server.signature(repo, oid, size)
        if not hmac.compare_digest(expected, self.query.get("signature", "")):
            raise HttpError(403, None, "Invalid signature of an upload address")
        self.server.store.put_lfs_object(repo, oid, int(size), self.body)
        self.send_json({})

    @route("POST", f"/api/models/{REPO}/commit/{REV}", write=True)
    def commit(self, repo: str, rev: str) -> None:
        """Makes a commit out of newline-delimited JSON: a header, then one line for each change."""
        if rev != "main" or "create_pr" in self.query:
            raise HttpError(501, None, "the test Hub only takes commits to main")
        header, *lines = [json.loads(line) for line in self.body if line.strip()]
        if header["key"] != "header":
            raise ValueError("the first line must be the header")
        about = header["value"]
        made = self.server.store.commit(
            repo,
            [parse_change(line["key"], line["value"]) for line in lines],
            title=about["summary"],
            description=about.get("description", ""),
            parent=about.get("parentCommit"),
        )
        url = f"{self.server.url}/{repo}/commit/{made.sha}"
        self.send_json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})

    @route("GET", f"/api/models/{REPO}(?:/revision/{REV})?")
    def model_info(self, repo: str, rev: str) -> None:
        """What is known about a model: commit, files, and the metadata of its README.md."""
        commit = self.server.store.read_commit(repo, rev or "main")
        metadata = self.readme_metadata(repo, commit)
        blobs = "blobs" in self.query
        siblings = [{"rfilename": e.path, **(file_fields(e, "blobId") if blobs else {})} for e in commit.files.values()]
        info: dict[str, Any] = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": commit.sha,
        }
        info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"lastModified": commit.date, "tags": metadata.get("tags") or [], "siblings": siblings}
        info |= {name: metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata}
        self.send_json(info | ({"cardData": metadata} if metadata else {}))

    def readme_metadata(self, repo: str, commit: Commit) -> dict[str, Any]:
        if "README.md" not in commit.files:
            return {}
        try:
            return card_metadata(self.server.store.content_path(repo, commit.entry("README.md")).read_text("utf-8"))
        except ValueError:
            return {}

    @route("GET", f"/api/models/{REPO}/tree/{REV}(?:/{REST})?")
    def tree(self, repo: str, rev: str, path: str) -> None:
        """Lists a folder, with everything below it if ``recursive``; all on one page."""
        commit = self.server.store.read_commit(repo, rev)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        inside = [e for e in path_entries(commit) if not path or e["path"].startswith(path.rstrip("/") + "/")]
        if path and not inside:
            raise store.EntryNotFound(f"{path} does not exist on {rev!r}")
        depth = path.count("/") + 1 if path else 0
        self.send_json([e for e in inside if recursive or e["path"].count("/") == depth])

    @route("POST", f"/api/models/{REPO}/paths-info/{REV}")
    def paths_info(self, repo: str, rev: str) -> None:
        """Describes the files and folders that a form or JSON names; unknown ones are left out."""
        commit = self.server.store.read_commit(repo, rev)
        raw = self.body.read()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if is_json else parse_qs(raw.decode()).get("paths", [])
        self.send_json([e for e in path_entries(commit) if e["path"] in paths])

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo: str) -> None:
        """The branches and tags: there is ``main`` and nothing else."""
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.server.store.read_commit(repo).sha}
        self.send_json({"branches": [main], "tags": [], "converts": [], "pullRequests": []})

    @route("GET", f"/api/models/{REPO}/commits/{REV}")
    def commits(self, repo: str, rev: str) -> None:
        """The history, newest first; all on one page."""
        history = self.server.store.history(repo, rev)
        texts = [{"id": c.sha, "title": c.title, "message": c.description, "date": c.date} for c in history]
        self.send_json([text | {"authors": [{"user": USER}]} for text in texts])

    @route("GET HEAD", f"/{REPO}/resolve/{REV}/{REST}")
    def resolve(self, repo: str, rev: str, path: str) -> None:
        """The contents of a file, whole or a range of it, with the headers that the client builds its cache from."""
        commit = self.server.store.read_commit(repo, rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        try:
            entry = commit.entry(path)
        except store.EntryNotFound as error:
            raise HttpError(404, "EntryNotFound", str(error), headers) from error
        headers |= {"ETag": f'"{entry.etag}"', "Content-Type": "application/octet-stream"}
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        self.send_file(self.server.store.content_path(repo, entry), entry.size, headers)


def stop_at_eof(server: HubServer) -> None:
    sys.stdin.read()
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description="A local Hugging Face Hub for tests.")
    parser.add_argument("--root", type=Path, required=True, help="folder for repositories and the request log")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--token", default="hf_test", help="bearer token that may write")
    parser.add_argument("--until-eof", action="store_true", help="stop when standard input is closed")
    options = parser.parse_args()
    (options.root / "repos").mkdir(parents=True, exist_ok=True)
    server = HubServer(options.root, options.port, options.token)
    print(json.dumps({"url": server.url}), flush=True)
    if options.until_eof:
        threading.Thread(target=stop_at_eof, args=(server,), daemon=True).start()
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
