"""A model from the Hugging Face Hub, or a quick no."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hf_lowbit.testbed.cache import announce
from hf_lowbit.testbed.errors import FetchError

TIMEOUT_SECONDS = 5.0
MODEL_FILES = ["*.json", "*.safetensors", "*.txt"]


def download_from_hub(repo_id: str, folder: Path) -> dict[str, Any]:
    """Download a model repository's safetensors, configs and tokenizer into ``folder``.

    One request of at most a few seconds finds out whether the Hub answers at all. With ``HF_HUB_OFFLINE=1`` the Hub
    is not asked.

    Returns:
        ``source``, ``revision`` (the commit) and ``license`` of the repository.

    Raises:
        FetchError: offline mode, the Hub cannot be reached, or the download broke off. ``folder`` is empty then.
    """
    import huggingface_hub

    if huggingface_hub.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise FetchError(f"{repo_id}: the Hub is not asked while HF_HUB_OFFLINE is set")
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, timeout=TIMEOUT_SECONDS)
        announce(f"downloading {repo_id} from the Hub, revision {info.sha}")
        huggingface_hub.snapshot_download(
            repo_id,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=MODEL_FILES,
            etag_timeout=TIMEOUT_SECONDS,
        )
        if not list(folder.glob("*.safetensors")):
            raise FetchError(f"{repo_id} on the Hub has no safetensors file")
    except Exception as error:  # the HTTP library's own errors differ between versions of huggingface_hub
        _empty(folder)
        raise FetchError(f"{repo_id} could not be fetched from the Hub: {type(error).__name__}: {error}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's bookkeeping
    license_name = info.card_data.get("license") if info.card_data else None
    return {"source": f"Hugging Face Hub {repo_id}", "revision": info.sha, "license": license_name}


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
