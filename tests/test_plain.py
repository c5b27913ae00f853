"""save() and load() of plain modules: bit-equal, and every damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit import ConfigError, LowRankConfig, RTNConfig
from hf_lowbit.nn import CorruptWeightError
from hf_lowbit.plan import PlanError, packed_modules
from hf_lowbit.state import state_of


class Net(nn.Module):
    """Every plain kind, a tied pair, a module in two places, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.conv = nn.Conv1d(32, 32, 4, padding="same")
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.BatchNorm1d(32)) for _ in range(2))
        self.shared = nn.Linear(32, 32)
        self.again = self.shared
        self.head = nn.Linear(32, 40)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.ones(32))

    def forward(self, tokens: Tensor) -> Tensor:
        """Forward."""
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2) + self.offset
        for layer in self.layers:
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(self.again(self.shared(x)))


TOKENS = torch.arange(12).reshape(2, 6)
CONFIGS = {
    "default": RTNConfig(group_size=16),
    "tied ends": RTNConfig(group_size=16, quantize_embeddings=True),
    "everything": RTNConfig(
        format="nf", symmetric=False, group_size=16, quantize_embeddings=True,
        activation_bits=8, low_rank=LowRankConfig(3),
        overrides={"conv": {"format": "codebook", "bits": 3}, "layers.1": {"scale_dtype": "float32"}},
    ),
}  # fmt: skip


def make(config: RTNConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    result: nn.Module = hf_lowbit.quantize(Net().to(dtype).eval(), config)
    return result


def meta() -> nn.Module:
    with torch.device("meta"):
        return Net().eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_lowbit.save(make(CONFIGS["tied ends"]), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("skeleton", [lambda: Net().eval(), meta], ids=["float", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_reload_is_bit_equal(name: str, dtype: torch.dtype, skeleton: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make(CONFIGS[name], dtype)
    hf_lowbit.save(model, tmp_path / "saved")
    given = skeleton()
    loaded = hf_lowbit.load(tmp_path / "saved", given)
    assert loaded is given
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(t.dtype == after[k].dtype and torch.equal(t, after[k]) for k, t in before.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_weights_are_stored_once_and_stay_shared(name: str, tmp_path: Path) -> None:
    model = make(CONFIGS[name])
    hf_lowbit.save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert "head.weight" not in stored and "again.weight" not in stored and "embed.weight" in stored
    loaded = hf_lowbit.load(tmp_path / "saved", meta())
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.again is loaded.shared
    first, second = hf_lowbit.report(model), hf_lowbit.report(loaded)
    assert (first.packed_bytes, first.elements) == (second.packed_bytes, second.elements)


def test_a_second_generation_is_the_same(folder: Path, tmp_path: Path) -> None:
    hf_lowbit.save(hf_lowbit.load(folder, meta()), tmp_path / "second")
    first, second = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "second"))
    assert list(first) == list(second) and all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    plans = [
        json.loads((place / "lowbit_config.json").read_text())["quantization_config"]["plan"]
        for place in (folder, tmp_path / "second")
    ]
    assert plans[0] == plans[1]


def test_files_and_their_contents(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "lowbit_config.json", "lowbit_report.json"}
    values = json.loads((folder / "lowbit_config.json").read_text())
    assert values["quantization_config"]["quant_method"] == "lowbit_rtn"
    assert load_file(folder / "model.safetensors")["conv.weight"].dtype == torch.int32


def test_a_loaded_module_knows_its_config(folder: Path) -> None:
    state = state_of(hf_lowbit.load(folder, meta()))
    assert state is not None and state.config.same_request(CONFIGS["tied ends"]) and state.source == str(folder)


def test_saving_over_an_older_result_replaces_it(folder: Path) -> None:
    model = make(CONFIGS["default"])
    hf_lowbit.save(model, folder)
    assert hf_lowbit.load(folder, meta()).embed.weight.is_floating_point()


def test_a_float_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not quantized: call hf_lowbit.quantize first"):
        hf_lowbit.save(Net(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# damage
def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "lowbit_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_plan(folder: Path, kind: str, change: Callable[[dict[str, Any]], None]) -> None:
    def edit(values: dict[str, Any]) -> None:
        (entry,) = [entry for entry in values["quantization_config"]["plan"] if entry["kind"] == kind]
        change(entry)

    edit_config(folder, edit)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(CorruptWeightError, match=r"model.safetensors cannot be read"):
        hf_lowbit.load(folder, meta())


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptWeightError, match=r"model.safetensors cannot be read"):
        hf_lowbit.load(folder, meta())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry["weight"].update(bits=3), "layers.0.0.weight|conv.weight"),
        (lambda entry: entry["weight"].update(group_size=8), "weight_scale"),
        (lambda entry: entry["weight"].update(group_size="tensor"), "weight_scale"),
        (lambda entry: entry["weight"].update(symmetric=False), "weight_zero_point"),
        (lambda entry: entry["weight"].update(scale_dtype="float32"), "weight_scale"),
        (lambda entry: entry.update(low_rank=2), "weight_low_rank_a"),
    ],
)
def test_an_edited_plan_contradicts_the_tensors(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_plan(folder, "linear", change)
    with pytest.raises(
        CorruptWeightError, match=rf"(layers|shared|head)\..*({message.split('|')[0].rpartition('.')[2]})"
    ):
        hf_lowbit.load(folder, meta())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("conv1d", lambda entry: entry.update(kind="linear"), "conv"),
        ("conv1d", lambda entry: entry.update(kind="conv2d"), "conv"),
        ("embedding", lambda entry: entry.update(kind="linear"), "embed"),
        ("linear", lambda entry: entry.update(kind="transformers_conv1d"), r"layers\.0\.0|shared|head"),
        ("conv1d", lambda entry: entry["weight"].update(group_size=24), "conv.*group_size=24 does not divide"),
        ("conv1d", lambda entry: entry.update(modules=["layers.0.2"]), r"layers\.0\.2.*BatchNorm1d"),
        (
            "conv1d",
            lambda entry: entry.update(modules=["convolution"]),
            "'convolution', which this model does not have",
        ),
    ],
)
def test_an_edited_plan_that_does_not_fit_the_model(
    folder: Path, kind: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_plan(folder, kind, change)
    with pytest.raises(PlanError, match=message):
        hf_lowbit.load(folder, meta())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["quantization_config"].update(bits=77), "1 to 8 bits"),
        (lambda v: v["quantization_config"].update(bist=4), "did you mean 'bits'"),
        (lambda v: v["quantization_config"].update(format_version=99), "upgrade hf_lowbit"),
        (lambda v: v["quantization_config"].update(quant_method="lowbit_magic"), "'magic', which is not installed"),
        (lambda v: v["quantization_config"].update(quant_method="bitsandbytes"), "not installed"),
        (lambda v: v["quantization_config"]["plan"][0].update(kind="os.system"), "unknown kind"),
        (lambda v: v["quantization_config"]["plan"][0]["weight"].update(bits=0), "1 to 8 bits"),
        (lambda v: v["quantization_config"].update(plan="all"), "a plan is a list"),
        (lambda v: v.update(quantization_config=[]), "lowbit_config.json"),
        (lambda v: v.pop("quantization_config"), "lowbit_config.json"),
        (lambda v: v.update(tied=["head.weight"]), "lowbit_config.json"),
        (lambda v: v.update(embedding_dtypes={"embed": "load"}), "no layer 'embed' of type 'load'"),
        (lambda v: v.update(embedding_dtypes={"offset": "float16"}), "no layer 'offset'"),
    ],
)
def test_an_edited_config_is_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit_config(folder, change)
    with pytest.raises(ConfigError, match=message):
        hf_lowbit.load(folder, meta())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_an_unreadable_config_is_refused(folder: Path, content: bytes) -> None:
    (folder / "lowbit_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"lowbit_config\.json cannot be read"):
        hf_lowbit.load(folder, meta())


def test_no_config_is_no_saved_module(folder: Path) -> None:
    (folder / "lowbit_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"hf_lowbit.save did not write it"):
        hf_lowbit.load(folder, meta())


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors["layers.1.0.weight_scale"][3, 1] = torch.tensor(float("nan")).bfloat16().view(torch.int16)


def set_infinite(tensors: dict[str, Tensor]) -> None:
    tensors["conv.weight_scale"][0, 0] = torch.tensor(float("inf")).bfloat16().view(torch.int16)


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_nan, r"layers\.1\.0: weight_scale holds NaN or infinite"),
        (set_infinite, "conv: weight_scale holds NaN or infinite"),
        (cut("conv.weight"), r"conv\.weight is \(31, "),
        (cut("conv.weight_scale"), r"conv\.weight_scale is \(31, "),
        (cut("layers.0.2.running_mean"), r"layers\.0\.2\.running_mean is \(31,\)"),
        (
            lambda t: t.pop("shared.weight_scale"),
            r"again\.weight_scale is tied to shared\.weight_scale|missing.*shared",
        ),
        (lambda t: t.pop("layers.0.0.weight"), r"missing: \['layers\.0\.0\.weight'\]"),
        (lambda t: t.pop("layers.0.0.bias"), r"missing: \['layers\.0\.0\.bias'\]"),
        (lambda t: t.update(extra=torch.zeros(1)), r"unexpected: \['extra'\]"),
        (lambda t: t.update({"conv.weight": torch.zeros(32, 32, 4)}), r"conv\.weight is \(32, 32, 4\) torch\.float32"),
        (lambda t: t.update({"conv.weight_scale": t["conv.weight_scale"].view(torch.bfloat16)}), r"conv\.weight_scale"),
        (lambda t: t.update({"conv.weight_scale": t["conv.weight_scale"].int()}), r"conv: weight_scale is .*int32"),
    ],
)
def test_damaged_tensors_are_named(folder: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CorruptWeightError, match=message):
        hf_lowbit.load(folder, meta())


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="does not have"):
        hf_lowbit.load(folder, nn.Sequential(nn.Linear(32, 32)))


def test_nothing_is_unpickled(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(CorruptWeightError, match="cannot be read"):
        hf_lowbit.load(folder, meta())


def test_packed_modules_are_what_the_plan_says(folder: Path) -> None:
    assert set(packed_modules(hf_lowbit.load(folder, meta()))) == {
        "embed",
        "conv",
        "layers.0.0",
        "layers.1.0",
        "shared",
        "head",
    }
