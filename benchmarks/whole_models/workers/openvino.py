"""SmolLM2 in OpenVINO, weights compressed by NNCF, through optimum-intel's `generate`."""

from __future__ import annotations

from typing import Any

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

from whole_models.workers.language import measure_language
from whole_models.workers.protocol import Job, serve


def prepare(job: Job) -> None:
    """options: bits, group_size (-1: a whole row). All layers get these bits, embedding and head included."""
    config = OVWeightQuantizationConfig(
        bits=job.options["bits"], group_size=job.options["group_size"], sym=True, all_layers=True, ratio=1.0
    )
    OVModelForCausalLM.from_pretrained(job.source, export=True, quantization_config=config).save_pretrained(job.folder)


def load(job: Job) -> Any:
    options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    return OVModelForCausalLM.from_pretrained(job.folder, ov_config=options)


def measure(job: Job) -> dict[str, Any]:
    return measure_language(job, load)


if __name__ == "__main__":
    serve(prepare, measure)
