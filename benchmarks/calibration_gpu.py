"""GPTQ on a GPU: one block of 8B's shape by its parts, all of 8B's, and a 30B that neither card nor host could hold.

    python benchmarks/calibration_gpu.py block [--samples 128] [--precision highest high] [--loop]
    python benchmarks/calibration_gpu.py full --work DIR [--seconds 480] [--samples 128] [--precision highest]
    python benchmarks/calibration_gpu.py stream --work DIR [--seconds 480] [--samples 32] [--cap-gib 24]
    torchrun --nproc-per-node 2 benchmarks/calibration_gpu.py parallel

Llamas of random weights, at 4 bits in groups of 128, on random tokens, 2048 a sample. ``full``: the model of 16 GB lies
in the host's memory, its blocks come to the card. ``stream``: blocks are drawn when they are reached, by seeds of their
names, and exist nowhere else; the process may take --cap-gib of the card. Both keep finished blocks in --work, stop by
themselves once --seconds have passed and go on when the same command is given again, so that short leases are enough;
the result counts the seconds of all calls. ``parallel``: two processes, each with half of the data, and with a GPU
where there are as many, against one. Results are added to --output, a JSON file, under the mode's name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from calibrating.block import block
from calibrating.models import SHAPES
from calibrating.parallel import parallel
from calibrating.resuming import full, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("block", "full", "stream", "parallel"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--precision", nargs="*", default=["highest"], help="of torch.set_float32_matmul_precision")
    parser.add_argument("--loop", action="store_true", help="block: also without the fused sweep over columns")
    parser.add_argument("--work", type=Path, help="full, stream: where finished blocks are kept")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="parallel: gloo shares a card too")
    parser.add_argument("--shape", choices=list(SHAPES), help="by default the mode's")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    facts = {"block": block, "full": full, "stream": stream, "parallel": parallel}[options.mode](options)
    if facts is None:
        return
    facts = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "options": {k: v for k, v in vars(options).items() if v is not None and k not in ("work", "output")}, **facts,
    }  # fmt: skip
    print(json.dumps(facts, indent=1, default=str))
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.is_file() else {}
        options.output.write_text(json.dumps({**known, options.mode: facts}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
