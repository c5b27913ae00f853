"""Tasks of lm-eval on a model in memory; with the harness itself where it is installed, else its refusals only."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.evaluation import load_tasks, run_tasks
from hf_lowbit.evaluation.tasks import TaskError
from tests.evaluation.tiny import tiny_llama, tiny_tokenizer

NOUNS = ("fox", "dog", "cat", "cow", "hen", "pig", "owl", "bee", "ant", "elk")


def write_task(folder: Path, rows: bool = True) -> Path:
    """A multiple-choice task of ten questions whose data lie beside it."""
    data = folder / "questions.jsonl"
    questions = [
        {"question": f"the {noun} is", "choices": ["red", "blue", "a dog"], "answer": i % 3}
        for i, noun in enumerate(NOUNS)
    ]
    if rows:
        data.write_text("\n".join(map(json.dumps, questions)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def accuracy(model: Any, tokenizer: Any) -> float:
    """What the task's "acc" is, counted by hand: the choice with the largest log-likelihood."""
    right = 0
    for i, noun in enumerate(NOUNS):
        scores = []
        for choice in ("red", "blue", "a dog"):
            context, whole = (tokenizer(text)["input_ids"] for text in (f"the {noun} is", f"the {noun} is {choice}"))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(context), len(whole))
            scores.append(sum(logits[place - 1, whole[place]].item() for place in places))
        right += max(range(3), key=scores.__getitem__) == i % 3
    return right / len(NOUNS)


def test_results_are_those_counted_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = load_tasks(["tiny_choice", "tiny_choice"], write_task(tmp_path))
    reference, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    model = hf_lowbit.quantize(
        copy.deepcopy(reference), hf_lowbit.RTNConfig(bits=2, group_size=8, quantize_lm_head=True)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for source in (reference, model):
        result = run_tasks(source, tokenizer, tasks)
        assert list(result) == ["tiny_choice"]
        values = result["tiny_choice"]
        assert (values["samples"], values["shots"], values["version"]) == (10, 0, 1.0)
        assert values["metrics"]["acc"]["value"] == pytest.approx(accuracy(source, tokenizer))
        assert 0 < values["metrics"]["acc"]["standard_error"] < 0.2
        assert json.loads(json.dumps(result)) == result
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token is None

    assert run_tasks(model, tokenizer, tasks, shots=2)["tiny_choice"]["shots"] == 2
    assert run_tasks(model, tokenizer, tasks)["tiny_choice"]["shots"] == 0
    limited = run_tasks(model.train(), tokenizer, tasks, limit=4, shots=1, batch_size=2)["tiny_choice"]
    assert (limited["samples"], limited["shots"]) == (4, 1) and model.training


def test_data_that_cannot_be_had(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(TaskError, match=r"the data of the task 'tiny_choice' cannot be loaded: .*questions\.jsonl"):
        load_tasks(["tiny_choice"], write_task(tmp_path, rows=False))


@pytest.mark.slow
def test_an_unknown_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(TaskError, match="no task tiny_chioce"):
        load_tasks(["tiny_chioce"], write_task(tmp_path))


def test_refusals_before_the_harness_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no task is named"):
        load_tasks([])
    with pytest.raises(TaskError, match="no folder"):
        load_tasks(["x"], tmp_path / "none")
    for options in ({"limit": 0}, {"shots": -1}, {"batch_size": 0}, {"limit": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number of at least"):
            run_tasks(tiny_llama(), tiny_tokenizer(), {}, **options)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"hf_lowbit\[lm-eval\]"):
        load_tasks(["arc_easy"])
    with pytest.raises(ImportError, match=r"hf_lowbit\[lm-eval\]"):
        run_tasks(tiny_llama(), tiny_tokenizer(), {})


def test_no_network_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the harness, whose manager fails as the real one does without a network."""

    class Manager:
        all_tasks = ("arc_easy",)

        def __init__(self, include_path: str | None = None) -> None:
            pass

        def load(self, names: list[str]) -> None:
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nmore lines")

    modules = {"lm_eval": types.ModuleType("lm_eval"), "lm_eval.tasks": types.ModuleType("lm_eval.tasks")}
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(
        TaskError, match=r"Couldn't reach .* on the Hub \(ConnectionError\). Without a network"
    ) as caught:
        load_tasks(["arc_easy"])
    assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match="no task arc_eazy"):
        load_tasks(["arc_easy", "arc_eazy"])
