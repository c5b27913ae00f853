"""A random Llama and a tokenizer of single characters, made in the test."""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = string.ascii_lowercase + " "
VOCABULARY = len(CHARACTERS) + 2
TEXT = "the quick brown fox jumps over the lazy dog and runs away from all of it " * 3


def tiny_llama(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Two layers of width 16, in training mode, with predictions that are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).train()


def tiny_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; <s> is the BOS token, if there is to be one."""
    vocabulary = {"<s>": 0, "<unk>": 1, **{character: index for index, character in enumerate(CHARACTERS, 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
