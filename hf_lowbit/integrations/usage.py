"""How a saved model is loaded, as code for its card, and the Hub's name for what it does."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

# Auto class, name of its mapping in transformers, the Hub's task. The first that lists a model's class counts.
_AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "text-generation"),
    ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "automatic-speech-recognition"),
    ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", "automatic-speech-recognition"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "image-text-to-text"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", None),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "fill-mask"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "text-classification"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "token-classification"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "question-answering"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "image-classification"),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "audio-classification"),
    ("AutoModel", "MODEL_MAPPING_NAMES", None),
)
_PIPELINES = (
    ("AUTO_TEXT2IMAGE_PIPELINES_MAPPING", "text-to-image"),
    ("AUTO_IMAGE2IMAGE_PIPELINES_MAPPING", "image-to-image"),
)
_UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")


@dataclass(frozen=True)
class Usage:
    """What a card says about loading.

    Attributes:
        library: "transformers" or "diffusers".
        loader: the class to call ``from_pretrained`` of.
        task: the Hub's ``pipeline_tag``, or None where it does not follow from the class.
    """

    library: str
    loader: str
    task: str | None = None

    def code(self, location: str, adapter: str | None = None) -> str:
        """Python code that loads the model from a repository or folder, and an adapter in a folder of it."""
        lines = [
            f"import hf_lowbit  # pip install hf-lowbit; registers its methods with {self.library}",
            f"from {self.library} import {self.loader}",
            "",
            f'model = {self.loader}.from_pretrained("{location}")',
        ]
        if self.loader == "DiffusionPipeline":
            lines[-1] = f'pipeline = DiffusionPipeline.from_pretrained("{location}")'
        if adapter is not None:
            lines.insert(2, "from peft import PeftModel")
            lines.append(f'model = PeftModel.from_pretrained(model, "{location}", subfolder="{adapter}")')
        return "\n".join(lines)


def usage_of(model: Any) -> Usage:
    """How a transformers or diffusers model, or a whole pipeline, is loaded."""
    from transformers import PreTrainedModel

    name = type(model).__name__
    if isinstance(getattr(model, "components", None), dict):
        return Usage("diffusers", "DiffusionPipeline", _pipeline_task(type(model)))
    if not isinstance(model, PreTrainedModel):
        return Usage("diffusers", name)
    from transformers.models.auto import modeling_auto

    for auto_class, mapping, task in _AUTO_CLASSES:
        listed = getattr(modeling_auto, mapping, {}).get(model.config.model_type, ())
        if name in ((listed,) if isinstance(listed, str) else listed):
            return Usage("transformers", auto_class, task)
    return Usage("transformers", name)


def _pipeline_task(pipeline_class: type) -> str | None:
    if pipeline_class.__name__ in _UNCONDITIONAL:
        return "unconditional-image-generation"
    auto = sys.modules.get("diffusers.pipelines.auto_pipeline")
    for mapping, task in _PIPELINES:
        if pipeline_class in getattr(auto, mapping, {}).values():
            return task
    return None
