"""What is measured: every row of the tables, with the environment and the worker that measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

OURS = "hf_lowbit"
TASKS = ("smollm2", "whisper", "diffusion", "llama1b")


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        task: one of `TASKS`.
        name: unique within its task.
        worker: a module of `whole_models.workers`.
        options: what the worker makes of it.
        environment: folder name of a virtual environment, or `OURS`: the one that runs the benchmark.
        model: the float model it starts from.
        artefact: name of the saved model where another variant has it, too.
        new_tokens: decoded; fewer for a slow one.
        note: what a reader must know of the row.
    """

    task: str
    name: str
    worker: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str = OURS
    model: str = ""
    artefact: str = ""
    new_tokens: int = 64
    note: str = ""

    @property
    def stored(self) -> str:
        """Folder name of its saved model."""
        return f"{self.task} {self.artefact or self.name}".replace(" ", "-").replace(",", "")


def _packed(dtype: str = "float32", **fields: Any) -> dict[str, Any]:
    ends = {"quantize_embeddings": True, "quantize_lm_head": True}
    return {"dtype": dtype, "config": {**fields, **ends}}


INT4 = _packed(bits=4, group_size=64)
INT4_BFLOAT16 = _packed("bfloat16", bits=4, group_size=64)
INT4_INT8 = _packed("bfloat16", bits=4, group_size=64, activation_bits=8)
_BYTES = {"format": "int", "bits": 8, "group_size": 32}  # as llama.cpp's Q8_0
INT4_BYTE_HEAD = _packed(
    "bfloat16", bits=4, group_size=64, overrides={name: _BYTES for name in ("embed_tokens", "lm_head")}
)
INT8 = _packed(bits=8, group_size=None)


def smollm2() -> list[Variant]:
    """SmolLM2-135M: floats, every width of hf_lowbit, and its peers."""
    ours = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "8 bits": INT8,
        "4 bits": INT4,
        "4 bits, bfloat16": INT4_BFLOAT16,
        "4 bits, int8 activations": INT4_INT8,
        "4 bits, head in 8 bits": INT4_BYTE_HEAD,
        "NF4": _packed(format="nf", bits=4, group_size=64),
        "2 bits": _packed(bits=2, group_size=64),
    }
    rows = [Variant("smollm2", name, "lowbit", options) for name, options in ours.items()]
    once = [(name, False) for name in ("bfloat16", "4 bits", "4 bits, bfloat16")]
    stay = [
        (name, True) for name in ("4 bits", "4 bits, bfloat16", "4 bits, int8 activations", "4 bits, head in 8 bits")
    ]
    for name, stays in once + stay:
        how, values = ", modules stay" if stays else "", {**ours[name], "compiled": True, "modules_stay": stays}
        rows.append(Variant("smollm2", f"{name}, compiled{how}", "lowbit", values, artefact=name, note="static cache"))
    return rows + peers()


def peers() -> list[Variant]:
    """Other runtimes, each with the dtype that was faster here in a trial."""

    def row(name: str, worker: str, options: dict[str, Any], **values: Any) -> Variant:
        return Variant("smollm2", name, worker, options, environment=worker, **values)

    gguf = {"model": "gguf"}
    few = {"new_tokens": 8}
    return [
        row("llama.cpp Q8_0", "llama_cpp", {"type": "Q8_0"}, **gguf),
        row("llama.cpp Q4_0", "llama_cpp", {"type": "Q4_0"}, **gguf, note="embedding and head in Q8_0"),
        row("llama.cpp Q4_0 pure", "llama_cpp", {"type": "Q4_0", "pure": True}, **gguf, note="head in Q4_0, too"),
        row("OpenVINO int4", "openvino", {"bits": 4, "group_size": 64}),
        row("torchao int4", "torchao", {"bits": 4, "group_size": 64, "dtype": "bfloat16"}, note="float embedding"),
        row("torchao int8", "torchao", {"bits": 8, "dtype": "float32"}, **few, note="float embedding"),
        row("bitsandbytes NF4", "bitsandbytes", {"dtype": "float32"}, **few, note="float embedding and head"),
        row("quanto qint4", "quanto", {"dtype": "float32"}, **few, note="float embedding"),
        row("HQQ 4 bits", "hqq", {"group_size": 64, "dtype": "bfloat16"}, **few, note="float embedding and head"),
    ]


def idle() -> list[Variant]:
    """Processes that only import: name -> modules."""
    modules = ["torch", "transformers"]
    return [
        Variant("smollm2", "idle", "idle", {"modules": modules}),
        Variant("smollm2", "idle with hf_lowbit", "idle", {"modules": [*modules, "hf_lowbit"]}),
        Variant("smollm2", "idle openvino", "idle", {"modules": modules}, environment="openvino"),
        Variant("smollm2", "idle llama_cpp", "idle", {"modules": ["llama_cpp"]}, environment="llama_cpp"),
    ]


def whisper() -> list[Variant]:
    """Whisper tiny.en: the decoder's embedding and head packed as well."""
    rows = {"float32": {}, "8 bits": {"config": INT8["config"]}, "4 bits": {"config": INT4["config"]}}
    return [Variant("whisper", name, "whisper", options) for name, options in rows.items()]


def diffusion() -> list[Variant]:
    """The trained UNet and DiT pipelines, 20 steps, with a packed denoiser."""
    configs: dict[str, dict[str, Any]] = {
        "float32": {},
        "W8": {"config": {"bits": 8, "group_size": None}},
        "W8A8": {"config": {"bits": 8, "group_size": None, "activation_bits": 8}},
        "W4": {"config": {"bits": 4, "group_size": 32}},
    }
    denoisers = {"sd-fashion": "unet", "dit-fashion": "transformer"}
    return [
        Variant("diffusion", f"{model} {name}", "diffusion", {**config, "denoiser": part, "steps": 20}, model=model)
        for model, part in denoisers.items()
        for name, config in configs.items()
    ]


def llama1b() -> list[Variant]:
    """A Llama of 1B parameters."""
    floats = {dtype: ({"dtype": dtype}, 8) for dtype in ("float32", "bfloat16")}
    packed = {"4 bits": (INT4, 32), "4 bits, bfloat16": (INT4_BFLOAT16, 32)}
    compiled = {
        f"{name}, compiled": ({**values, "compiled": True, "modules_stay": True}, 32)
        for name, values in {"4 bits, bfloat16": INT4_BFLOAT16, "4 bits, int8 activations": INT4_INT8}.items()
    }
    return [
        Variant(
            "llama1b",
            name,
            "llama1b",
            options,
            model="llama1b",
            new_tokens=count,
            artefact=name.removesuffix(", compiled"),
        )
        for name, (options, count) in {**floats, **packed, **compiled}.items()
    ]


def variants(task: str, patterns: Sequence[str] = ("*",)) -> list[Variant]:
    """The rows of a task whose names match one of the patterns, in the order of its table."""
    rows = {"smollm2": smollm2, "whisper": whisper, "diffusion": diffusion, "llama1b": llama1b}
    return [row for row in rows[task]() if any(fnmatch(row.name, pattern) for pattern in patterns)]
