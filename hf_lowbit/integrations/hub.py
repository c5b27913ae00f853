"""What stands beside the weights, in a folder and on the Hub: report and model card; and uploading all of it."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from torch import nn

from hf_lowbit.integrations.accounts import quantized_components, quantized_owner, report
from hf_lowbit.integrations.adapter_files import name_base
from hf_lowbit.integrations.card import CARD_FILE, is_ours, render_card
from hf_lowbit.integrations.card_facts import gather_facts
from hf_lowbit.integrations.origin import hub_origin
from hf_lowbit.reporting import REPORT_FILE
from hf_lowbit.state import state_of

__all__ = ["push_to_hub", "report", "write_extras"]

logger = logging.getLogger("hf_lowbit")

# Names under which the libraries look for weights: one left over from an earlier upload could be loaded instead.
_WEIGHTS = re.compile(
    r"(pytorch_model|model|diffusion_pytorch_model)(\.\w+)?(-\d+-of-\d+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
)
_PATH_KEYS = ("_name_or_path", "name_or_path")
_CONFIG_FILES = ("config.json", "model_index.json", "tokenizer_config.json")


def write_extras(model: Any, folder: Path, kept_card: Path) -> None:
    """Write report and card beside a model's weights.

    Args:
        model: a quantized transformers or diffusers model.
        folder: where its weights were just written.
        kept_card: the README.md that may be there from before: it stays, byte for byte, if somebody else wrote or
            edited it.
    """
    (folder / REPORT_FILE).write_text(report(model).to_json(), encoding="utf-8")
    kept = kept_card.read_bytes() if kept_card.is_file() else None
    if kept is None or is_ours(kept.decode("utf-8", "replace")):
        card = render_card(gather_facts(model, folder, location=None, download=False))
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    else:
        (folder / CARD_FILE).write_bytes(kept)
        logger.info("%s was not written by hf_lowbit, or was edited since: it is kept as it is", kept_card.name)


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
    tokenizer: Any = None,
    **save_arguments: Any,
) -> CommitInfo:
    """Upload what ``save_pretrained`` writes, report and card included, in one commit.

    Weight files of an earlier upload that the new one does not have are deleted in the same commit, and paths of this
    machine are left out of the configs. A README.md on the Hub that hf_lowbit did not write, or that was edited, stays.

    Args:
        model: a quantized transformers or diffusers model, or a diffusers pipeline with a quantized component.
        repo_id: "name" or "owner/name"; created if it is not there.
        private: for a new repository.
        token: of a user who may write; by default the one the client is logged in with.
        commit_message, commit_description: of the commit.
        revision: branch, created if it is not there.
        create_pr: commit to a pull request instead.
        tags: more tags for the card.
        tokenizer: tokenizer or processor to save with the model, or a list of such objects.
        save_arguments: for ``save_pretrained``, such as ``max_shard_size``.

    Returns:
        The commit.

    Raises:
        ValueError: before anything is written: a model that is not quantized, or is of neither library.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused; nothing is committed then.
    """
    components = quantized_components(model)
    target: Any = model if components or not isinstance(model, nn.Module) else quantized_owner(model)
    _refuse_unsuitable(target)
    import hf_lowbit

    api = HfApi(token=token, library_name="hf_lowbit", library_version=hf_lowbit.__version__)
    with tempfile.TemporaryDirectory(prefix="hf_lowbit_") as scratch:
        folder = Path(scratch) / "model"
        target.save_pretrained(folder, **save_arguments)
        for name in components:
            _remove_own_card(folder / name)
        for processing in tokenizer if isinstance(tokenizer, list | tuple) else [tokenizer]:
            if processing is not None:
                processing.save_pretrained(folder)
        forget_local_paths(folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        name_base(folder, repo_id)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        remote = set(api.list_repo_files(repo_id, revision=revision))
        if CARD_FILE in remote and not is_ours(_remote_card(api, repo_id, revision)):
            logger.warning("the README.md of %s was not written by hf_lowbit, or was edited since: it is kept", repo_id)
            (folder / CARD_FILE).unlink(missing_ok=True)
        else:
            facts = gather_facts(target, folder, location=repo_id, download=True, tags=tuple(tags or ()))
            (folder / CARD_FILE).write_text(render_card(facts), encoding="utf-8")
        added = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # Not upload_folder: with Xet it commits in several steps.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in sorted(_stale(remote, set(added)))),
                *(CommitOperationAdd(name, path) for name, path in added.items()),
            ],
            commit_message=commit_message or _message(target),
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def forget_local_paths(folder: Path) -> None:
    """Rewrite the configs in a folder so that they name repositories of the Hub, and no path of this machine."""
    for path in folder.rglob("*.json"):
        if path.name not in _CONFIG_FILES:
            continue
        values = json.loads(path.read_text(encoding="utf-8"))
        before = json.dumps(values)
        _rename_sources(values, _PATH_KEYS)
        _rename_sources((values.get("quantization_config") or {}).get("provenance") or {}, ("source",))
        if json.dumps(values) != before:
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename_sources(values: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if isinstance(values.get(key), str):
            origin = hub_origin(values.pop(key))
            if origin is not None:
                values[key] = origin.repo_id


def _refuse_unsuitable(model: Any) -> None:
    kind = type(model).__name__
    if state_of(model) is None and not quantized_components(model):
        raise ValueError(f"this {kind} was not quantized by hf_lowbit; its own push_to_hub uploads it as it is")
    if not callable(getattr(model, "save_pretrained", None)):
        raise ValueError(
            f"push_to_hub uploads transformers and diffusers models and pipelines, and a {kind} is neither: write it "
            "with hf_lowbit.save(module, folder) and upload the folder with the huggingface_hub client"
        )


def _remove_own_card(folder: Path) -> None:
    card = folder / CARD_FILE
    if card.is_file() and is_ours(card.read_text(encoding="utf-8")):
        card.unlink()


def _remote_card(api: HfApi, repo_id: str, revision: str | None) -> str:
    path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    return Path(path).read_bytes().decode("utf-8", "replace")


def _stale(remote: set[str], added: set[str]) -> set[str]:
    """Weight files on the Hub, in folders where weights are uploaded, that are not among them."""
    folders = {PurePosixPath(name).parent for name in added if _is_weights(name)}
    return {name for name in remote - added if _is_weights(name) and PurePosixPath(name).parent in folders}


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(PurePosixPath(name).name) is not None


def _message(model: Any) -> str:
    account = report(model)
    return f"Upload {type(model).__name__}, {account.method} at {account.bits_per_weight:.2f} bits per weight"
