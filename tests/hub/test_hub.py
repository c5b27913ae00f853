"""The test Hub, driven by the real client."""

import json
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session

from tests.hub.fixture import Hub, running_hub
from tests.hub.store import AddFile, AddLfsFile, Commit, DeleteFile, InvalidContent, StaleParent, Store, StoreError

CONFIG = b'{"hidden_size": 16}\n'
WEIGHTS = bytes(range(256)) * 40
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to PUT


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read from the environment at import, too late here
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A repository with config.json, model.safetensors (in LFS) and sub/notes.txt."""
    repo_id = "tester/" + re.sub(r"\W+", "-", request.node.name).strip("-")
    api.create_repo(repo_id)
    files = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "sub/notes.txt": b"notes"}
    api.create_commit(repo_id, [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="files")
    return repo_id


def status_of(call, *args, **kwargs) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value.response.status_code


def test_uploaded_folder_comes_back_equal(api: HfApi, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_bytes(CONFIG)
    (source / "model.safetensors").write_bytes(WEIGHTS)
    (source / "sub" / "ünï code.txt").write_bytes(b"text")
    (source / "README.md").write_text("---\nlibrary_name: transformers\ntags: [low-bit]\n---\n# Card\n")
    repo_id = api.create_repo("tester/folder").repo_id
    commit = api.upload_folder(repo_id=repo_id, folder_path=source, commit_message="all of it")

    info = api.model_info(repo_id, files_metadata=True)
    assert (info.sha, info.library_name, info.card_data.tags) == (commit.oid, "transformers", ["low-bit"])
    lfs = {sibling.rfilename: sibling.lfs.size for sibling in info.siblings if sibling.lfs}
    assert lfs == {"model.safetensors": len(WEIGHTS)}
    assert [made.title for made in api.list_repo_commits(repo_id)] == ["all of it", "initial commit"]
    assert api.list_repo_refs(repo_id).branches[0].target_commit == commit.oid

    one = api.hf_hub_download(repo_id, "model.safetensors", cache_dir=tmp_path / "one")
    assert Path(one).read_bytes() == WEIGHTS
    everything = Path(api.snapshot_download(repo_id, cache_dir=tmp_path / "all"))
    for file in filter(Path.is_file, source.rglob("*")):
        assert (everything / file.relative_to(source)).read_bytes() == file.read_bytes()


def test_tree_and_paths(api: HfApi, repo: str) -> None:
    top = {item.path: type(item).__name__ for item in api.list_repo_tree(repo)}
    assert top == {
        ".gitattributes": "RepoFile",
        "config.json": "RepoFile",
        "model.safetensors": "RepoFile",
        "sub": "RepoFolder",
    }
    assert "sub/notes.txt" in {item.path for item in api.list_repo_tree(repo, recursive=True)}
    assert [item.path for item in api.list_repo_tree(repo, "sub")] == ["sub/notes.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    found = api.get_paths_info(repo, ["model.safetensors", "config.json", "nowhere"])
    assert [item.path for item in found] == ["config.json", "model.safetensors"]
    assert found[0].lfs is None and found[1].lfs.sha256 == UploadInfo.from_bytes(WEIGHTS).sha256.hex()


def test_known_contents_are_not_sent_again(api: HfApi, hub: Hub, repo: str) -> None:
    def uploads() -> int:
        return sum(line.startswith(f"PUT /{repo}.git/lfs/") for line in hub.requests())

    assert uploads() == 1
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id=repo)
    assert uploads() == 1 and api.file_exists(repo, "copy.safetensors")
    head = api.model_info(repo).sha
    for name, data in (("model.safetensors", WEIGHTS), ("config.json", CONFIG)):
        assert api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo).oid == head
    api.upload_file(path_or_fileobj=WEIGHTS + b"!", path_in_repo="model.safetensors", repo_id=repo)
    assert uploads() == 2


def test_missing_things_are_told_apart(api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/nothing-here")
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("tester/nothing-here", "config.json", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(repo, "missing.json", cache_dir=tmp_path)
    for revision in ("v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            api.hf_hub_download(repo, "config.json", revision=revision, cache_dir=tmp_path)
        with pytest.raises(RevisionNotFoundError):
            api.model_info(repo, revision=revision)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="tester/nothing-here")


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_writing_needs_the_token(hub: Hub, api: HfApi, repo: str, token: str | bool) -> None:
    stranger = HfApi(endpoint=hub.url, token=token)
    add = CommitOperationAdd("x.txt", b"x")
    lfs = {"upload_infos": [add.upload_info], "token": token, "repo_type": "model", "repo_id": repo}
    assert status_of(stranger.create_repo, "tester/stranger") == 401
    assert status_of(stranger.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id=repo) == 401
    assert status_of(stranger.create_commit, repo, [CommitOperationDelete("config.json")], commit_message="x") == 401
    assert status_of(stranger.delete_repo, repo) == 401
    assert status_of(post_lfs_batch_info, **lfs, endpoint=hub.url) == 401
    unsigned = f"{hub.url}/{repo}.git/lfs/{add.upload_info.sha256.hex()}?size=1"
    assert get_session().put(unsigned, content=b"x").status_code == 403
    assert not api.repo_exists("tester/stranger")
    assert {"config.json", "model.safetensors"} <= set(api.list_repo_files(repo))
    assert api.whoami()["name"] == "tester"


def test_reading_needs_no_token(hub: Hub, repo: str, tmp_path: Path) -> None:
    path = HfApi(endpoint=hub.url, token=False).hf_hub_download(repo, "config.json", cache_dir=tmp_path)
    assert Path(path).read_bytes() == CONFIG


def test_repositories_are_created_once_and_deleted(api: HfApi, repo: str) -> None:
    assert status_of(api.create_repo, repo) == 409
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_deletion_by_commit_keeps_the_old_revision(api: HfApi, repo: str, tmp_path: Path) -> None:
    before = api.model_info(repo).sha
    api.delete_file("model.safetensors", repo_id=repo)
    api.delete_folder("sub", repo_id=repo)
    assert api.list_repo_files(repo) == [".gitattributes", "config.json"]
    old = api.hf_hub_download(repo, "model.safetensors", revision=before, cache_dir=tmp_path)
    assert Path(old).read_bytes() == WEIGHTS
    with pytest.raises(EntryNotFoundError):
        api.delete_file("model.safetensors", repo_id=repo)


def test_commit_on_a_stale_parent_is_refused(api: HfApi, repo: str) -> None:
    parent = api.model_info(repo).sha
    add = [CommitOperationAdd("a.txt", b"a")]
    head = api.create_commit(repo, add, commit_message="first", parent_commit=parent).oid
    add = [CommitOperationAdd("b.txt", b"b")]
    assert status_of(api.create_commit, repo, add, commit_message="second", parent_commit=parent) == 412
    assert api.model_info(repo).sha == head and not api.file_exists(repo, "b.txt")


def test_damaged_lfs_object_is_refused(api: HfApi, hub: Hub, repo: str) -> None:
    head = api.model_info(repo).sha
    info = UploadInfo.from_bytes(b"intact")
    batch = {"upload_infos": [info], "token": hub.token, "repo_type": "model", "repo_id": repo, "endpoint": hub.url}
    [action], errors, transfer = post_lfs_batch_info(**batch)
    assert (errors, transfer) == ([], "basic")
    href = action["actions"]["upload"]["href"]

    def commit(size: int) -> int:
        value = {"path": "x.safetensors", "algo": "sha256", "oid": info.sha256.hex(), "size": size}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
        headers = {"Authorization": f"Bearer {hub.token}"}
        data = "\n".join(map(json.dumps, lines)).encode()
        return get_session().post(f"{hub.url}/api/models/{repo}/commit/main", content=data, headers=headers).status_code

    for damaged in (b"intacT", b"intac", b""):
        assert get_session().put(href, content=damaged).status_code == 400
        assert commit(size=6) == 400
    assert get_session().put(href, content=iter([b"int", b"act"])).status_code == 200  # in chunks
    assert commit(size=5) == 400
    assert api.model_info(repo).sha == head
    assert commit(size=6) == 200


def test_ranges_and_resumed_downloads(hub: Hub, repo: str, tmp_path: Path) -> None:
    url = f"{hub.url}/{repo}/resolve/main/model.safetensors"
    size = len(WEIGHTS)
    asked = {
        "0-0": WEIGHTS[:1],
        "5-9": WEIGHTS[5:10],
        "100-": WEIGHTS[100:],
        "-7": WEIGHTS[-7:],
        f"5-{size * 2}": WEIGHTS[5:],
    }
    for bounds, expected in asked.items():
        answer = get_session().get(url, headers={"Range": f"bytes={bounds}"})
        assert (answer.status_code, answer.content) == (206, expected), bounds
    answer = get_session().get(url, headers={"Range": f"bytes={size}-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
    head = get_session().head(url)
    assert (head.headers["X-Linked-Size"], head.headers["Content-Length"], head.content) == (str(size), str(size), b"")
    with open(tmp_path / "partial", "wb") as file:
        file.write(WEIGHTS[:1000])
        http_get(url, file, resume_size=1000, expected_size=size)
    assert (tmp_path / "partial").read_bytes() == WEIGHTS


def test_card_with_invalid_metadata_is_refused(api: HfApi, repo: str) -> None:
    card = b"---\ntags: [unclosed\n---\n# Card\n"
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Card\n", path_in_repo="README.md", repo_id=repo)


def test_what_is_not_covered_says_so(api: HfApi, repo: str) -> None:
    add = [CommitOperationAdd("a.txt", b"a")]
    assert status_of(api.create_branch, repo, branch="dev") == 501
    assert status_of(api.create_commit, repo, add, commit_message="x", create_pr=True) == 501
    assert status_of(api.create_repo, "tester/data", repo_type="dataset") == 501


def test_repositories_survive_a_restart(tmp_path: Path) -> None:
    with running_hub(tmp_path) as first:
        HfApi(endpoint=first.url, token=first.token).create_repo("tester/kept")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(first.url).port))
    with running_hub(tmp_path) as second:
        assert HfApi(endpoint=second.url, token=False).list_repo_files("tester/kept") == [".gitattributes"]


class SlowStore(Store):
    """Leaves time for another thread between reading the newest commit and replacing it."""

    def read_commit(self, repo_id: str, revision: str = "main") -> Commit:
        commit = super().read_commit(repo_id, revision)
        time.sleep(0.01)
        return commit


def test_only_one_of_competing_commits_wins(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    store.create_repo("a/b")
    parent = store.read_commit("a/b").sha
    refused = []

    def commit(number: int) -> None:
        try:
            store.commit("a/b", [AddFile(f"{number}.txt", b"x")], "competing", parent=parent)
        except StaleParent:
            refused.append(number)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7 and len(store.history("a/b")) == 2


@pytest.mark.parametrize(
    "refused", [DeleteFile("missing"), AddLfsFile("w", "0" * 64), AddFile("../out", b""), AddFile("good/inside", b"")]
)
def test_refused_commit_changes_nothing(tmp_path: Path, refused) -> None:
    store = Store(tmp_path)
    store.create_repo("a/b")
    before = store.read_commit("a/b")
    with pytest.raises(StoreError):
        store.commit("a/b", [AddFile("good", b"x"), refused], "x")
    assert store.read_commit("a/b") == before
    with pytest.raises(InvalidContent):
        store.create_repo("../b")


PUSH = """
import hashlib, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
LlamaForCausalLM(LlamaConfig(**sizes)).push_to_hub(sys.argv[1])
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
expected = LlamaForCausalLM(loaded.config).state_dict()
assert loaded.state_dict().keys() == expected.keys()
print(sum(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items()), len(expected))
"""


def test_transformers_model_round_trips(hub: Hub, api: HfApi) -> None:
    hub.python(PUSH, "acme/tiny-llama")
    assert {"README.md", "config.json", "model.safetensors"} <= set(api.list_repo_files("acme/tiny-llama"))
    equal, total = map(int, hub.python(LOAD, "acme/tiny-llama").split())
    assert equal == total > 0
