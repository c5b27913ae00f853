"""Quantized models on the Hub: pushed and loaded again by separate processes, against the local Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit.integrations.hub import forget_local_paths
from hf_lowbit.reporting import REPORT_FILE
from tests.hub.fixture import Hub
from tests.integrations import hub_scripts
from tests.integrations.hub_scripts import TINY_LLAMA

BASE = "acme/tiny-llama-base"
BASE_CARD = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org/tiny\n---\n# Base\n"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to PUT


@pytest.fixture(scope="module")
def base(hub: Hub) -> str:
    """A float model on the Hub, whose card names a license."""
    hub.python(hub_scripts.MAKE_BASE, BASE)
    add = [CommitOperationAdd("README.md", BASE_CARD)]
    HfApi(endpoint=hub.url, token=hub.token).create_commit(BASE, add, commit_message="license")
    return BASE


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.url, token=hub.token)


def quantized() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    return hf_lowbit.quantize(model, hf_lowbit.RTNConfig(bits=4, group_size=32))


def last_json(output: str) -> dict[str, Any]:
    return json.loads(output.splitlines()[-1])


def text_on_hub(api: HfApi, repo: str, name: str, tmp_path: Path) -> str:
    return Path(api.hf_hub_download(repo, name, cache_dir=tmp_path)).read_text()


def commits(api: HfApi, repo: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


@pytest.mark.parametrize("way", ["own", "function"])
def test_transformers_model_comes_back_equal(hub: Hub, api: HfApi, base: str, way: str, tmp_path: Path) -> None:
    repo = f"acme/llama-{way}"
    pushed = last_json(hub.python(hub_scripts.PUSH_LLAMA, base, repo, way))
    loaded = last_json(hub.python(hub_scripts.LOAD_LLAMA, repo))
    assert loaded["tensors"] == pushed["tensors"] and loaded["output"] == pushed["output"]
    assert loaded["report"] == pushed["report"]
    assert all(layer["error"] > 0 for layer in loaded["report"]["layers"])

    files = api.list_repo_files(repo)
    assert {"README.md", REPORT_FILE, "config.json", "model.safetensors.index.json"} <= set(files)
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    message = (
        "tiny" if way == "function" else f"Upload LlamaForCausalLM, rtn at {loaded['report']['bits_per_weight']:.2f}"
    )
    assert [len(commits(api, repo)), commits(api, repo)[0].startswith(message)] == [2, True]  # the first is empty
    assert json.loads(text_on_hub(api, repo, REPORT_FILE, tmp_path)) == pushed["report"]

    card = ModelCard(text_on_hub(api, repo, "README.md", tmp_path))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (base, "quantized")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (data["license"], data["license_name"]) == ("other", "tiny")
    assert {"hf_lowbit", "rtn", "4-bit", "int"} <= set(data["tags"])
    assert f'AutoModelForCausalLM.from_pretrained("{repo}")' in card.text
    config = json.loads(text_on_hub(api, repo, "config.json", tmp_path))
    assert config["quantization_config"]["provenance"]["base_model"] == base


@pytest.mark.parametrize("way", ["pipeline", "own"])
def test_diffusers_comes_back_equal(hub: Hub, api: HfApi, way: str, tmp_path: Path) -> None:
    repo = f"acme/unet-{way}"
    pushed = last_json(hub.python(hub_scripts.PUSH_PIPELINE, repo, way))
    loaded = last_json(hub.python(hub_scripts.LOAD_PIPELINE, repo, way))
    assert loaded["tensors"] == pushed["tensors"] and loaded["output"] == pushed["output"]
    assert loaded["report"] == pushed["report"]
    assert all(layer["name"].startswith("unet.") and layer["error"] > 0 for layer in loaded["report"]["layers"])
    assert len(commits(api, repo)) == 2
    files = set(api.list_repo_files(repo))
    card = ModelCard(text_on_hub(api, repo, "README.md", tmp_path))
    assert card.data.to_dict()["library_name"] == "diffusers"
    if way == "pipeline":
        assert {"model_index.json", f"unet/{REPORT_FILE}"} <= files and "unet/README.md" not in files
        assert card.data.to_dict()["pipeline_tag"] == "unconditional-image-generation"
        assert f'DiffusionPipeline.from_pretrained("{repo}")' in card.text and "`unet`" in card.text
    else:
        assert {"config.json", REPORT_FILE} <= files
        assert f'UNet2DModel.from_pretrained("{repo}")' in card.text


PUSH_AGAIN = """
import sys, hf_lowbit
from transformers import AutoModelForCausalLM
from tests.integrations.hub_scripts import describe_llama
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
hf_lowbit.push_to_hub(model, sys.argv[2])
print(describe_llama(model))
"""


def test_reloaded_model_can_be_pushed_and_replaces_old_shards(hub: Hub, api: HfApi, base: str, tmp_path: Path) -> None:
    first, second = "acme/again-first", "acme/again-second"
    pushed = last_json(hub.python(hub_scripts.PUSH_LLAMA, base, first, "own"))
    shards = {name for name in api.list_repo_files(first) if name.endswith(".safetensors")}
    assert "model.safetensors" not in shards
    for target in (second, first):
        again = last_json(hub.python(PUSH_AGAIN, first, target))
        assert again == pushed
        assert last_json(hub.python(hub_scripts.LOAD_LLAMA, target)) == pushed
        weights = {name for name in api.list_repo_files(target) if "safetensors" in name}
        assert weights == {"model.safetensors"}
        data = ModelCard(text_on_hub(api, target, "README.md", tmp_path / target)).data.to_dict()
        assert (data["base_model"], data["license"]) == (base, "other")
    assert len(commits(api, first)) == 3


def test_card_of_a_user_on_the_hub_stays(hub: Hub, api: HfApi, base: str, tmp_path: Path) -> None:
    repo = "acme/own-card"
    api.create_repo(repo)
    mine = b"---\nlicense: mit\n---\n# My own words\n"
    api.create_commit(repo, [CommitOperationAdd("README.md", mine)], commit_message="card")
    hub.python(hub_scripts.PUSH_LLAMA, base, repo, "own")
    assert text_on_hub(api, repo, "README.md", tmp_path) == mine.decode()
    assert REPORT_FILE in api.list_repo_files(repo)


@pytest.mark.parametrize("edit", ["replaced", "edited", "untouched"])
def test_card_of_a_user_in_a_folder_stays(tmp_path: Path, edit: str) -> None:
    model = quantized()
    model.save_pretrained(tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    if edit == "replaced":
        card.write_bytes(b"# Mine\r\n\xff")  # not even UTF-8
    elif edit == "edited":
        card.write_text(card.read_text().replace("## Limits", "## Limits\n\nMind the gap.\n"))
    before = card.read_bytes()
    hf_lowbit.report(model).evaluation = {"perplexity": 12.5}
    model.save_pretrained(tmp_path / "saved")
    assert (card.read_bytes() == before) == (edit != "untouched")
    assert json.loads((tmp_path / "saved" / REPORT_FILE).read_text())["evaluation"] == {"perplexity": 12.5}


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(4, 4)), LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)), object()],
    ids=["module", "float", "object"],
)
def test_what_is_not_quantized_is_refused_before_any_request(hub: Hub, model: Any) -> None:
    before = hub.requests()
    with pytest.raises(ValueError, match="was not quantized by hf_lowbit"):
        hf_lowbit.push_to_hub(model, "acme/refused", token=hub.token)
    with pytest.raises(ValueError, match="was not quantized by hf_lowbit"):
        hf_lowbit.report(model)
    assert hub.requests() == before


def test_plain_module_is_refused_with_a_hint(hub: Hub) -> None:
    module = hf_lowbit.quantize(nn.Sequential(nn.Linear(32, 32)), hf_lowbit.RTNConfig(bits=4, group_size=32))
    before = hub.requests()
    with pytest.raises(ValueError, match=r"hf_lowbit\.save\(module, folder\)"):
        hf_lowbit.push_to_hub(module, "acme/refused", token=hub.token)
    assert hub.requests() == before


PUSH_WITHOUT_TOKEN = """
import sys, hf_lowbit
from huggingface_hub.errors import HfHubHTTPError
from tests.integrations.test_hub import quantized
try:
    quantized().push_to_hub("acme/anonymous")
except HfHubHTTPError as error:
    print("status", error.response.status_code)
"""


def test_push_without_a_token_leaves_nothing(hub: Hub, api: HfApi) -> None:
    assert hub.python(PUSH_WITHOUT_TOKEN, HF_TOKEN="").splitlines()[-1] == "status 401"
    assert not api.repo_exists("acme/anonymous")


def test_report_without_its_file_counts_what_is_there(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    (tmp_path / REPORT_FILE).unlink()
    found, expected = hf_lowbit.report(LlamaForCausalLM.from_pretrained(tmp_path)), hf_lowbit.report(model)
    assert (found.packed_bytes, found.bits_per_weight) == (expected.packed_bytes, expected.bits_per_weight)
    assert found.skipped == dict.fromkeys(expected.skipped, "not in the plan")
    assert {layer.error for layer in found.layers} == {None} and found.seconds is None


def test_report_of_another_quantization_gives_no_errors(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    text = (tmp_path / REPORT_FILE).read_text()
    (tmp_path / REPORT_FILE).write_text(text.replace('"bits": 4', '"bits": 3'))
    assert {layer.error for layer in hf_lowbit.report(LlamaForCausalLM.from_pretrained(tmp_path)).layers} == {None}


OFFLINE = """
import os, sys, hf_lowbit
from transformers import AutoModelForCausalLM
from huggingface_hub import constants, snapshot_download
snapshot_download(sys.argv[1], ignore_patterns=["lowbit_report.json"])
constants.HF_HUB_OFFLINE = True
print([layer.error for layer in hf_lowbit.report(AutoModelForCausalLM.from_pretrained(sys.argv[1])).layers][0])
"""


def test_report_without_network_counts_what_is_there(hub: Hub, base: str) -> None:
    hub.python(hub_scripts.PUSH_LLAMA, base, "acme/offline", "own")
    assert hub.python(OFFLINE, "acme/offline").splitlines()[-1] == "None"


def test_base_model_without_a_head_finds_its_errors(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    from transformers import LlamaModel

    errors = [layer.error for layer in hf_lowbit.report(LlamaModel.from_pretrained(tmp_path)).layers]
    assert errors == [layer.error for layer in hf_lowbit.report(model).layers]


def test_nothing_uploaded_names_a_folder_of_this_machine(hub: Hub, api: HfApi, base: str, tmp_path: Path) -> None:
    source = tmp_path / "secret-place" / "model"
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(source)
    script = """
import sys, hf_lowbit
model = hf_lowbit.quantize(sys.argv[1], hf_lowbit.RTNConfig(bits=4, group_size=32))
hf_lowbit.report(model).evaluation = {"perplexity": 9.5, "command": f"hf-lowbit evaluate {sys.argv[1]} --json"}
hf_lowbit.push_to_hub(model, "acme/from-a-folder")
"""
    hub.python(script, str(source))
    for name in ("README.md", "config.json"):
        assert "secret-place" not in text_on_hub(api, "acme/from-a-folder", name, tmp_path), name
    assert "base_model" not in ModelCard(text_on_hub(api, "acme/from-a-folder", "README.md", tmp_path)).data.to_dict()


def test_configs_keep_repositories_and_lose_paths(tmp_path: Path) -> None:
    snapshot = "/home/somebody/hub/models--org--name/snapshots/0123/unet"
    for value, expected in (("org/name", "org/name"), (snapshot, "org/name"), (str(tmp_path), None), ("./x", None)):
        values = {"_name_or_path": value, "quantization_config": {"provenance": {"source": value, "seed": 0}}}
        (tmp_path / "config.json").write_text(json.dumps(values))
        forget_local_paths(tmp_path)
        cleaned = json.loads((tmp_path / "config.json").read_text())
        assert cleaned.get("_name_or_path") == expected
        assert cleaned["quantization_config"]["provenance"].get("source") == expected
