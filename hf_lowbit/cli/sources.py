"""What the commands read: models, texts and recordings named on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from hf_lowbit.cli.errors import RequestError

AUDIO_SUFFIXES = (".wav",)
TEXT_SUFFIXES = (".txt", ".json", ".jsonl")


def check_model(model: str) -> None:
    """Raise RequestError for a model that is clearly a folder and not there, before a Hub is asked for it."""
    if Path(model).is_dir():
        return
    if Path(model).exists():
        raise RequestError(f"{model} is a file; a model is a folder, or a repository such as org/name")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or not model:
        raise RequestError(f"there is no folder {model!r}")


def check_data(data: str | None) -> None:
    """Raise RequestError for calibration data that is clearly a file and not there; anything else is for the engine."""
    if data is not None and Path(data).suffix in TEXT_SUFFIXES and not Path(data).is_file():
        raise RequestError(f"there is no file {data!r}")


def read_texts(path: Path) -> list[str]:
    """Texts of a file: paragraphs of a .txt, the "text" of each line of a .jsonl, items of a .json list."""
    if not path.is_file():
        raise RequestError(f"there is no file {str(path)!r}")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif path.suffix == ".json":
            records = json.loads(content)
        else:
            records = [paragraph.strip() for paragraph in content.split("\n\n")]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text: {error}") from None
    texts = [record["text"] if isinstance(record, dict) and "text" in record else record for record in records]
    if not isinstance(records, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{path} holds no texts: a list of strings, or of records with a field 'text', is needed")
    texts = [text for text in texts if text]
    if not texts:
        raise RequestError(f"{path} is empty")
    return texts


def recordings(path: Path) -> list[Path]:
    """The sound file at ``path``, or those in that folder, by name."""
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise RequestError(f"there is no sound file ({', '.join(AUDIO_SUFFIXES)}) at {str(path)!r}")
    return found


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError or NotADirectoryError unless ``folder`` is new or empty."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; the result needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new or empty folder")


def is_speech_model(model: str) -> bool:
    """True for a speech recognition model such as Whisper, by its config; nothing else is read."""
    from hf_lowbit.integrations.loading import read_json

    config = read_json(model, "config.json")
    if config is None:
        raise RequestError(f"{model} has no config.json: it is no transformers model")
    return config.get("model_type") == "whisper"
