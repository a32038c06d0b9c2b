"""A tiny word-level tokenizer, and text to go with it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

WORDS = [f"w{number}" for number in range(60)]
EOS, BOS = 0, 1


def make_tokenizer(*, bos: bool = False, eos: bool = True, words: Iterable[str] = WORDS) -> Any:
    """Words -> ids from 3 on; 0 is </s>, 1 is <s> (added to a text only if `bos`), 2 is <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": EOS, "<s>": BOS, "<unk>": 2, **{word: number for number, word in enumerate(words, start=3)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    marks = {"bos_token": "<s>", **({"eos_token": "</s>"} if eos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **marks)


def make_texts(number: int, seed: int, length: int = 30) -> list[str]:
    """Distinct documents of about `length` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(length // 2, length * 3 // 2))) + f" {seed}-{n}" for n in range(number)]


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    """A JSON lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., Any]:
    return make_tokenizer


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    return make_texts


@pytest.fixture(scope="session")
def jsonl() -> Callable[[Path, Iterable[str]], Path]:
    return write_lines
