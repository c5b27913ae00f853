"""FID and CLIP score proper: Inception through torchmetrics, CLIP through transformers, from weights that are at hand.

Nothing is downloaded. ``pip install "hf_lowbit[image]"`` brings torchmetrics; Inception needs torch-fidelity beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes them


class InceptionFeatures:
    """The 2048 features of FID, as a callable for :func:`hf_lowbit.evaluation.pictures.compare_pictures`.

    Args:
        weights: the file of torch-fidelity's Inception; None: in torch's hub cache.

    Raises:
        ImportError: torchmetrics or torch-fidelity is missing.
        FileNotFoundError: the weights are.
    """

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS if weights is None else Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"FID proper needs Inception's weights, and {path} is not there: pass the file {INCEPTION_WEIGHTS} of "
                "torch-fidelity, or measure in the features of a classifier"
            )
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError(
                f'FID proper needs torchmetrics and torch-fidelity: pip install "hf_lowbit[image]" torch-fidelity '
                f"({error})"
            ) from None
        self.network = network.to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, batch_size: int = 32) -> Tensor:
        """Features [n, 2048] of pictures [n, 1 or 3, h, w] in [0, 1]; on the CPU."""
        parts = []
        for part in pictures.split(batch_size):
            whole = (255 * part.clamp(0, 1)).round().to(self.device, torch.uint8)
            parts.append(self.network(whole.expand(-1, 3, -1, -1)).cpu())
        return torch.cat(parts)


@torch.no_grad()
def clip_score(pictures: Tensor, prompts: Sequence[str], model: str | Path, batch_size: int = 32) -> float:
    """100 times the cosine of picture and prompt in CLIP, mean over pairs, and at least 0: torchmetrics' CLIPScore.

    (Its own, of 1.9, does not run with transformers 5, whose CLIP returns outputs where it expects tensors.)

    Args:
        pictures: [n, 1 or 3, h, w] in [0, 1].
        prompts: one for each picture; what exceeds the model's length is cut.
        model: folder of a CLIP model of transformers with its processor.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: another number of prompts than pictures.
    """
    if not Path(model).is_dir():
        raise FileNotFoundError(f"the CLIP score needs a CLIP model, and {model} is no folder; nothing is downloaded")
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures")
    from transformers import CLIPModel, CLIPProcessor

    network: Any = CLIPModel.from_pretrained(model)
    processor: Any = CLIPProcessor.from_pretrained(model)
    longest = network.config.text_config.max_position_embeddings
    whole = (255 * pictures.clamp(0, 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
    cosines = []
    for start in range(0, len(whole), batch_size):
        part = slice(start, start + batch_size)
        texts = {"text": list(prompts[part]), "padding": True, "truncation": True, "max_length": longest}
        found = network.eval()(**processor(images=list(whole[part]), return_tensors="pt", **texts))
        cosines.append((found.image_embeds * found.text_embeds).sum(-1))  # both are of unit length
    return max(100 * float(torch.cat(cosines).mean()), 0.0)
