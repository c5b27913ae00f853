"""Train the small Mamba and Mamba-2 language models of ``tests/assets``.

Each has about 4.7 million parameters (under 10 MB in float16), a byte-level BPE tokenizer of 4096 entries that both
share, and reads English technical documentation.

Data: the prose of the HTML pages of these Debian packages (versions of Debian 12), 16 MB in 1285 documents, every
twentieth held out: debian-handbook (GPL-2+ or CC-BY-SA-3.0), debian-reference-en (GPL-2+), debian-policy (GPL-2+),
developers-reference (GPL-2+), python3.11-doc (PSF-2.0), git-doc (GPL-2) and postgresql-doc-15 (PostgreSQL). Install
them with apt-get; the first run then writes ``lm_train.txt`` and ``lm_validation.txt`` into the folder of ``--text``.

    python train_lm.py mamba --text text --tokenizer tokenizer --output mamba-debian --minutes 8.8 --batch 24
    python train_lm.py mamba2 --text text --tokenizer tokenizer --output mamba2-debian --minutes 4.6 --batch 32

Measured on one NVIDIA H100 that both runs shared, started together: 4727 steps (29 million tokens, 6.9 epochs) and
3735 steps (31 million tokens, 7.3 epochs); validation loss 3.604 and 3.627 from 9.61 and 9.57 untrained.

Mamba trains far faster with the package mambapy (a parallel scan in PyTorch), used when it is installed. Mamba-2 was
trained with transformers 5.23, whose gated normalization works per group as in mamba_ssm; 5.17 normalizes all groups
together, which costs this checkpoint about 0.47 of loss. A run that was stopped continues when it is started again.
"""

from __future__ import annotations

import argparse
import glob
import html
import json
import math
import pathlib
import platform
import re
import shlex
import sys
import time

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils.import_utils import is_mambapy_available

PAGES = (
    "debian-handbook/html/en-US/*.html",
    "../debian-reference/*.en.html",
    "debian-policy/policy.html/*.html",
    "../developers-reference/*.html",
    "python3.11/html/**/*.html",
    "git/html/**/*.html",
    "postgresql-doc-15/html/*.html",
)
END = "<|endoftext|>"


def pages(root: pathlib.Path = pathlib.Path("/usr/share/doc")) -> dict[str, str]:
    """Path of each page with enough prose -> its prose; the first and every twentieth after it are held out."""
    found = {}
    for page in sorted(p for pattern in PAGES for p in glob.glob(f"{root}/{pattern}", recursive=True)):
        source = pathlib.Path(page).read_text(errors="ignore")
        source = re.sub(r"(?is)<(script|style|pre|head|nav)[ >].*?</\1>", " ", source)
        source = re.sub(r"(?i)<(/p|/h\d|br|/li|/div|/dd)[^>]*>", "\n", source)
        source = html.unescape(re.sub(r"<[^>]+>", "", source))
        lines = (re.sub(r"\s+", " ", line).strip() for line in source.split("\n"))
        prose = "\n".join(line for line in lines if len(line) > 40)
        if len(prose) > 2000:
            found[page] = prose
    return found


def documents(folder: pathlib.Path, name: str) -> list[str]:
    """The documents of ``lm_<name>.txt``, which is made from the installed Debian packages if it is absent."""
    if not (folder / f"lm_{name}.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = list(pages().values())
        (folder / "lm_train.txt").write_text("\n\n".join(d for i, d in enumerate(found) if i % 20))
        (folder / "lm_validation.txt").write_text("\n\n".join(found[::20]))
    return (folder / f"lm_{name}.txt").read_text().split("\n\n")


def get_tokenizer(folder: pathlib.Path, text: pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in ``folder``; it is trained first if there is none."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[END], initial_alphabet=alphabet)
        bpe.train_from_iterator(documents(text, "train"), trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def configuration(kind: str, vocabulary: int) -> PretrainedConfig:
    shared = {"vocab_size": vocabulary, "hidden_size": 256, "tie_word_embeddings": True}
    shared |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "mamba":
        return MambaConfig(**shared, num_hidden_layers=8, state_size=16, use_mambapy=is_mambapy_available())
    heads = {"num_heads": 16, "head_dim": 32, "n_groups": 4, "state_size": 64, "chunk_size": 64}
    return Mamba2Config(**shared, num_hidden_layers=7, **heads)


def windows(tokens: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """At most ``count`` windows of ``length + 1`` tokens, evenly spread, that share no predicted token."""
    starts = torch.arange(0, len(tokens) - length, length)
    starts = starts[torch.linspace(0, len(starts) - 1, min(count, len(starts))).long()]
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])


@torch.no_grad()
def evaluate(model: torch.nn.Module, held_out: torch.Tensor, batch: int) -> float:
    """Mean cross-entropy per token, in float32."""
    model.eval()
    losses = []
    for part in held_out.split(batch):
        logits = model(part[:, :-1]).logits.float()
        losses.append(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    model.train()
    return torch.cat(losses).mean().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["mamba", "mamba2"])
    parser.add_argument("--text", type=pathlib.Path, required=True, help="folder of lm_train.txt, lm_validation.txt")
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="its folder; made there if absent")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the trained model")
    parser.add_argument("--minutes", type=float, default=8, help="training time; the schedule follows the clock")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=48, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--evaluations", type=int, default=30, help="evaluations, evenly spread over the time")
    parser.add_argument("--patience", type=int, default=4, help="stop after so many evaluations without a gain")
    parser.add_argument("--held-out", type=int, default=256, help="validation windows")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    tokenizer = get_tokenizer(args.tokenizer, args.text)

    def encode(name: str) -> torch.Tensor:
        encoded = tokenizer(documents(args.text, name)).input_ids
        return torch.tensor([i for ids in encoded for i in [*ids, tokenizer.eos_token_id]])

    train, held_out = encode("train").to(device), windows(encode("validation"), args.length, args.held_out).to(device)
    model = AutoModelForCausalLM.from_config(configuration(args.kind, len(tokenizer)), dtype=torch.float32).to(device)
    kept = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("A_log")]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("A_log")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device.type == "cuda")

    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output / "checkpoint.pt"
    run = {"steps": 0, "seconds": 0.0, "best": math.inf, "since": 0, "history": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run, best = saved["run"], saved["best"]
        torch.manual_seed(args.seed + run["steps"])
    else:
        run["untrained_loss"], best = evaluate(model, held_out, args.batch), model.state_dict()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(train)} tokens, untrained {run.get('untrained_loss'):.3f}", flush=True)

    start, total, span = time.time() - run["seconds"], args.minutes * 60, torch.arange(args.length + 1, device=device)
    running, recent = torch.zeros((), device=device), 0
    while run["since"] < args.patience and run["seconds"] < total:
        fraction = run["seconds"] / total
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, fraction))
            group["lr"] = args.rate * min(1.0, (run["steps"] + 1) / 100) * (0.02 + 0.98 * cosine)
        first = torch.randint(0, len(train) - args.length - 1, (args.batch, 1), device=device)
        sample = train[first + span]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(sample[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running, recent = running + loss.detach(), recent + 1
        run["steps"] += 1
        if run["steps"] % 10 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # keep the clock honest
        run["seconds"] = time.time() - start
        if run["seconds"] >= total * (len(run["history"]) + 1) / args.evaluations:
            validation, training = evaluate(model, held_out, args.batch), running.item() / recent
            running, recent = torch.zeros_like(running), 0
            run["seconds"] = time.time() - start
            entry = {"step": run["steps"], "seconds": round(run["seconds"])}
            entry |= {"train": round(training, 4), "validation": round(validation, 4)}
            run["history"].append(entry)
            run["since"] = 0 if validation < run["best"] else run["since"] + 1
            if validation < run["best"]:
                run["best"], best = validation, {k: v.detach().clone() for k, v in model.state_dict().items()}
            print(json.dumps(entry), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run, "best": best}
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)

    model.load_state_dict(best)
    model.half().float()  # the loss of what is saved
    final = evaluate(model, held_out, args.batch)
    if args.kind == "mamba":
        model.config.use_mambapy = False
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    record = {
        "command": shlex.join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "parameters": parameters,
        "steps": run["steps"],
        "tokens": run["steps"] * args.batch * args.length,
        "epochs": round(run["steps"] * args.batch * args.length / len(train), 2),
        "seconds": round(run["seconds"]),
        "device": name,
        "seed": args.seed,
        "untrained_loss": round(run["untrained_loss"], 4),
        "train_loss": round(run["history"][-1]["train"], 4) if run["history"] else None,
        "validation_loss": round(final, 4),
        "validation_perplexity": round(math.exp(final), 2),
        "validation_windows": list(held_out.shape),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "history": run["history"],
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(f"validation loss {final:.4f}, perplexity {math.exp(final):.2f}", flush=True)


if __name__ == "__main__":
    main()
