"""From text to ids: what spells a mark is text, and nothing that others set on the tokenizer matters."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shearling.config import parse
from shearling.data.config import DataConfig
from shearling.data.encode import Encoder, tokenizer_fingerprint
from shearling.data.prepare import prepare
from shearling.data.tokens import open_tokens
from shearling.errors import DataError

END = "<|endoftext|>"


def byte_tokenizer() -> Any:
    """Bytes -> ids 1 to 256, and <|endoftext|> is 0: a special token of a byte-level BPE, as most models have it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {END: 0, **{letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def test_text_that_spells_a_mark_is_text() -> None:
    tokenizer = byte_tokenizer()
    text = f"one{END}two {END}"
    assert 0 in tokenizer(text)["input_ids"]
    (ids,) = Encoder(tokenizer, 257).encode([text])
    assert len(ids) == len(text) and 0 not in ids
    assert tokenizer.decode(ids) == text
    assert 0 in tokenizer(text)["input_ids"]  # the caller's own is as it was


def test_a_model_that_has_the_mark_as_a_word(tokenizer: Any) -> None:
    """A list of words finds it in any text; there it is left out, as it would end a document that goes on."""
    ids = Encoder(tokenizer, 100).encode(["w1 </s> w2", "</s>", "w1 w2"])
    assert [found.tolist() for found in ids] == [[4, 5], [], [4, 5]]


def test_nothing_but_the_ends_of_documents_has_the_id_of_the_mark(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    texts = [f"{number}{END}{END} and so on" for number in range(400)]
    config = parse(DataConfig, {"sequence_length": 32, "heldout_sequences": 2, "domains": {"web": str(jsonl(tmp_path / "a.jsonl", texts))}})
    manifest = prepare(config, byte_tokenizer(), 257, tmp_path / "out", seed=1)
    tokens = open_tokens(tmp_path / "out")
    assert tokens.document_end == manifest["document_end"] == 0
    flat = tokens.sequences("web", "train")[:].reshape(-1)
    lengths = np.diff(np.flatnonzero(flat == 0)) - 1
    assert len(lengths) > 350 and set(lengths.tolist()) <= {len(text) for text in texts}


def test_settings_of_the_caller_do_not_matter(tokenizer_factory: Callable[..., Any]) -> None:
    tokenizer, texts = tokenizer_factory(), ["w1 w2 w3 w4", "w5"]
    before, fingerprint = Encoder(tokenizer, 100).encode(texts), tokenizer_fingerprint(tokenizer)
    encoder = Encoder(tokenizer, 100)
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.enable_truncation(2)
    for again in (encoder, Encoder(tokenizer, 100)):
        assert all(map(np.array_equal, again.encode(texts), before))
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2  # nor do ours for the caller


def test_many_threads_encode_at_once(tokenizer: Any, texts: Callable[..., list[str]]) -> None:
    encoder, documents = Encoder(tokenizer, 100), texts(200, seed=4)
    expected = encoder.encode(documents)
    assert all(len(ids) == len(text.split()) for ids, text in zip(expected, documents, strict=True))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(encoder.encode, [documents] * 12):
            assert all(map(np.array_equal, found, expected))


def test_the_environment_decides_on_parallelism_and_stays(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, texts: Callable[..., list[str]]
) -> None:
    import os

    found = []
    for value in (None, "false", "true"):
        if value is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        found.append([ids.tolist() for ids in Encoder(tokenizer, 100).encode(texts(30, seed=5))])
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
    assert found[0] == found[1] == found[2]


def test_a_slow_tokenizer_is_refused(tokenizer: Any) -> None:
    slow = type("Slow", (), {"is_fast": False})()
    for use in (tokenizer_fingerprint, lambda found: Encoder(found, 100)):
        with pytest.raises(DataError, match="fast tokenizer"):
            use(slow)
