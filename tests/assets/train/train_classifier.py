"""Train the Fashion-MNIST classifier of ``tests/assets``, whose features measure how far apart sets of pictures are.

A convolutional net of 0.2 million parameters with 96 features before its last layer (see
``hf_lowbit/evaluation/pictures/classifier.py``). Pictures are 28x28, padded by 2 to 32x32, as those that the diffusion
models of ``tests/assets`` draw.

Data: the Debian package dataset-fashion-mnist (MIT licence), or a folder with its four files:

    apt-get install dataset-fashion-mnist
    python train_classifier.py --output fashion-classifier --minutes 7 --threads 1

Beside the weights it writes ``training.json``, and the test set's features, which distances to real pictures need:
``real.safetensors`` with their mean [96] and covariance [96, 96] (float64, all 10,000 pictures) and the first 2,000
features [2000, 96] (float16).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import pathlib
import shlex
import sys
import time

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from hf_lowbit.evaluation.pictures.classifier import ClassifierConfig, PictureClassifier

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KEPT_FEATURES = 2000


def load(folder: pathlib.Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures float32 [n, 1, 32, 32] in [0, 1] and labels int64 [n] of "train" or "t10k"."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return pad(torch.from_numpy(pixels.copy()), (2, 2, 2, 2)).float() / 255, torch.from_numpy(labels)


def augment(pictures: Tensor) -> Tensor:
    """Half of the batches are mirrored, all are moved by up to 2 pixels."""
    if torch.rand(()) < 0.5:
        pictures = pictures.flip(-1)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return pictures.roll((down, right), (2, 3))  # the border is black


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the trained classifier")
    parser.add_argument("--minutes", type=float, default=7, help="training time; the schedule follows the clock")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="pictures a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pictures, labels = load(args.data, "train")
    model = PictureClassifier(ClassifierConfig(LABELS)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, weight_decay=0.01)
    start, total, steps, order = time.time(), args.minutes * 60, 0, torch.empty(0, dtype=torch.int64)
    while (fraction := (time.time() - start) / total) < 1:
        if len(order) < args.batch:
            order = torch.randperm(len(pictures))
        chosen, order = order[: args.batch], order[args.batch :]
        rate = args.rate * min(1.0, (steps + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * fraction)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = augment(pictures[chosen]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        loss = cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        if steps % 100 == 0:
            print(steps, round(time.time() - start), round(loss.item(), 4), flush=True)
    seconds = time.time() - start
    model.save(args.output)
    model = PictureClassifier.load(args.output)  # what is measured is what is saved
    pictures, labels = load(args.data, "t10k")
    seen = model.see(pictures)
    features = seen.features.double()
    save_file(
        {
            "mean": features.mean(0),
            "covariance": features.T.cov(),
            "count": torch.tensor(len(features)),
            "features": seen.features[:KEPT_FEATURES].half(),
        },
        args.output / "real.safetensors",
    )
    accuracy = (seen.logits.argmax(1) == labels).double().mean().item()
    record = {
        "command": shlex.join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "epochs": round(steps * args.batch / 60000, 2),
        "seconds": round(seconds),
        "threads": args.threads,
        "seed": args.seed,
        "test_accuracy": round(accuracy, 4),
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
