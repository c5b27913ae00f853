"""Model cards: what they say, and that they say nothing that was not measured."""

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit import LowRankConfig, RTNConfig
from hf_lowbit.integrations import card as card_module
from hf_lowbit.integrations.card import CardFacts, is_ours, mark, render_card
from hf_lowbit.integrations.card_tables import evaluation, without_paths
from hf_lowbit.integrations.origin import HubOrigin, hub_origin
from hf_lowbit.integrations.usage import Usage, usage_of
from tests.integrations.hub_scripts import TINY_LLAMA

USAGE = Usage("transformers", "AutoModelForCausalLM", "text-generation")


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))


def facts(**values: Any) -> CardFacts:
    config = RTNConfig(bits=4, group_size=32, overrides={"layers.0": {"bits": 8}}, low_rank=LowRankConfig(rank=4))
    model = hf_lowbit.quantize(llama(), config)
    stored = model.config.quantization_config
    return dataclasses.replace(CardFacts(hf_lowbit.report(model), {"": stored}, USAGE), **values)


def test_header_and_numbers() -> None:
    made = facts(location="me/tiny", base_model="org/base", inherited={"license": "mit", "language": "en"}, tags=("x",))
    card = ModelCard(render_card(made))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["hf_lowbit", "rtn", "4-bit", "8-bit", "int", "x"],
    }
    report = made.report
    for text in (
        "# tiny",
        "[org/base](https://huggingface.co/org/base)",
        f"| 32 | {report.bits_per_weight:.3f} |",
        f"| {report.elements * 4:,} | {report.packed_bytes:,} |",
        "int, 8 bits, low rank 4",
        "groups of 32",
        "`lm_head`",
        "quantize_lm_head=True",
        'AutoModelForCausalLM.from_pretrained("me/tiny")',
        "arXiv 2210.17323",
        "RTNConfig(",
        f"torch {torch.__version__}",
    ):
        assert text in card.content, text
    assert "$" not in card.content.split("---", 2)[2]


def test_nothing_measured_says_so() -> None:
    text = render_card(facts())
    assert "Not measured." in text and "quality of the output was not measured" in text
    assert "base_model" not in text and "license:" not in text
    assert 'from_pretrained("this-repository-or-folder")' in text


def test_lost_errors_are_said_to_be_unknown() -> None:
    made = facts()
    for layer in made.report.layers:
        layer.error = None
    made.report.original_bits = None
    text = render_card(made)
    assert "not known" in text and "report of quantization was lost" in text


def test_every_number_has_its_command_and_interval() -> None:
    values = {
        "perplexity": 12.3456,
        "kl": 0.0,
        "intervals": {"perplexity": [12.0, 12.75]},
        "tokens": 16384,
        "data": "/data/private/held|out.txt",
        "bos": True,
        "hypotheses": ["a", "b"],
        "command": "hf-lowbit evaluate /home/me/out --data=/data/private/text.txt --json",
    }
    command = "`hf-lowbit evaluate out --data=text.txt --json`"
    conditions = "tokens 16384, data held\\|out.txt, bos True"
    assert evaluation(values).splitlines()[2:] == [
        f"| perplexity | 12.35 | 12 to 12.75 | {conditions} | {command} |",
        f"| kl | 0 |  | {conditions} | {command} |",
    ]
    nested = evaluation({"held out": {"wer": 0.5, "utterances": 3}})
    assert nested.splitlines()[2:] == ["| held out wer | 0.5 |  | utterances 3 | not recorded |"]
    assert evaluation({}) == evaluation({"tokens": 3}) == "Not measured."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://huggingface.co/org/name/tree", None),
        ("arXiv 2210.17323 and a/b/c, 3/4, w/o", None),
        ("layers.*.mlp and q/k", None),
        ("run /usr/bin/python x", "run python x"),
        ("~/models/mine/", "folder"),
        (r"C:\models\mine", "mine"),
        ("--data='/tmp/a b'", "--data='a b'"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, expected: str | None) -> None:
    assert without_paths(text) == (text if expected is None else expected)


def test_own_cards_are_known_until_somebody_edits_them() -> None:
    text = render_card(facts())
    assert is_ours(text) and is_ours(text.replace("\n", "\r\n")) and is_ours(text + "\n")
    assert not is_ours(text.replace("## Limits", "## Limit"))
    assert not is_ours(text + "\nmore\n") and not is_ours("# Mine\n") and not is_ours("")
    assert is_ours(mark("# anything"))


def test_adapter_is_loaded_from_its_folder() -> None:
    code = USAGE.code("me/tiny", "lowbit_adapter")
    assert 'PeftModel.from_pretrained(model, "me/tiny", subfolder="lowbit_adapter")' in code
    compile(code, "card", "exec")
    assert "`lowbit_adapter/`" in render_card(facts(adapter="lowbit_adapter"))


def test_loading_code_follows_from_the_class() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler
    from transformers import BertConfig, BertForSequenceClassification, LlamaModel, WhisperConfig
    from transformers import WhisperForConditionalGeneration as Whisper

    from tests.integrations.tiny_diffusers import unet

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "encoder_attention_heads": 2}
    small = WhisperConfig(**sizes, decoder_attention_heads=2, vocab_size=60000, encoder_ffn_dim=8, decoder_ffn_dim=8)
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    expected = {
        ("AutoModelForCausalLM", "text-generation"): llama(),
        ("AutoModel", None): LlamaModel(LlamaConfig(**TINY_LLAMA)),
        ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"): Whisper(small),
        ("AutoModelForSequenceClassification", "text-classification"): BertForSequenceClassification(bert),
        ("UNet2DModel", None): unet(),
        ("DiffusionPipeline", "unconditional-image-generation"): DDPMPipeline(unet(), DDPMScheduler()),
    }
    for (loader, task), model in expected.items():
        usage = usage_of(model)
        assert (usage.loader, usage.task) == (loader, task)
        compile(usage.code("me/tiny"), "card", "exec")


def test_only_repositories_are_origins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    snapshot = "/x/hub/models--org--a-name/snapshots/0123"
    assert hub_origin("org/name") == HubOrigin("org/name")
    assert hub_origin(snapshot) == HubOrigin("org/a-name", "0123")
    assert hub_origin(f"{snapshot}/unet") == HubOrigin("org/a-name", "0123", "unet")
    for local in ("out/model", "./model", "../a/b", str(tmp_path), "model", "a/b/c", "", None):
        assert hub_origin(local) is None, local


def test_card_of_a_model_from_a_folder_names_no_path(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    llama().save_pretrained(source)
    hf_lowbit.quantize(str(source), RTNConfig(bits=4, group_size=32), output=target)
    text = (target / "README.md").read_text()
    assert str(tmp_path) not in text and "base_model" not in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"


def test_template_is_found_without_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (Path(__file__).parents[2] / "model_cards" / "template.md").read_text()
    assert card_module._template() == expected

    def absent(package: str) -> Any:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(importlib.resources, "files", absent)
    assert card_module._template() == expected


def test_untouched_module_kinds_are_listed() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(8, 8))
    report = hf_lowbit.report(hf_lowbit.quantize(model, RTNConfig(bits=4, group_size=32)))
    assert "| `*` |" in render_card(CardFacts(report, {}, USAGE))
