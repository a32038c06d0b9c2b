"""From text to ids: what is asked of a tokenizer, how it is recognised again, and how documents are marked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shearling.errors import DataError, Problem

_HEADLINE = "this tokenizer cannot prepare data for this model"
_OTHER_MODEL = "The tokenizer belongs to another model; use the model's own."


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sha256 over all that decides which ids a text gets: the serialised backend, the length, the BOS and EOS ids.

    Padding and truncation are left out: they are settings of the last call, and change under a tokenizer that is in use. Raises
    `DataError` where the tokenizer is not a fast one.
    """
    _refuse_slow(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    text = json.dumps([facts, len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_slow(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        remedy = "A fast tokenizer (tokenizer.json) is needed; convert it, or use the model's own."
        raise DataError(_HEADLINE, [Problem("tokenizer", type(tokenizer).__name__, remedy)])


class Encoder:
    """Turns texts into ids of a vocabulary of known size.

    It works on a copy of the tokenizer's backend, so that padding, truncation and other settings of who uses the tokenizer too are of no
    account. Text that spells a special token (`<|endoftext|>`) is read as the plain text that it is. Many threads may encode at once.

    A batch is tokenised on all cores by the backend itself, unless the environment says otherwise (`TOKENIZERS_PARALLELISM=false`), or
    the process was forked from one that had tokenised, where the backend falls back to one core by itself.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: the tokenizer is not a fast one, has more tokens than the model, or no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        _refuse_slow(tokenizer)
        problems = []
        if len(tokenizer) > vocab_size:
            problems.append(Problem("tokenizer", f"{len(tokenizer)} tokens where the model has {vocab_size}", _OTHER_MODEL))
        elif (largest := max(tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0)) >= vocab_size:
            problems.append(Problem("tokenizer", f"the id {largest} where the model has {vocab_size} tokens", _OTHER_MODEL))
        if tokenizer.eos_token_id is None:
            problems.append(Problem("tokenizer.eos_token", "none", "Documents are separated by it; set the tokenizer's eos_token."))
        if problems:
            raise DataError(_HEADLINE, problems)
        self.vocab_size = vocab_size
        self.document_end: int = tokenizer.eos_token_id
        """The id of the mark that ends each document."""
        backend = tokenizer.backend_tokenizer
        self._backend = backend.__class__.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        bos = tokenizer.bos_token_id
        # Many tokenizers name a BOS token that their model never saw; only what the tokenizer adds by itself is added here.
        adds_bos = bos is not None and self._backend.encode("a").ids[:1] == [bos]
        self._head = np.array([bos] if adds_bos else [], dtype=np.uint32)
        self._tail = np.array([self.document_end], dtype=np.uint32)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text, without marks; raise `DataError` for an id that the model does not have.

        Where a text still gives the id of the mark, since to the tokenizer's model (a unigram, a list of words) it is a word like any
        other, that id is left out: it would end a document that goes on.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        largest = max((int(ids.max()) for ids in arrays if len(ids)), default=0)
        if largest >= self.vocab_size:
            found = f"the id {largest} where the model has {self.vocab_size} tokens"
            raise DataError(_HEADLINE, [Problem("tokenizer", found, _OTHER_MODEL)])
        return [ids if (kept := ids != self.document_end).all() else ids[kept] for ids in arrays]

    def mark(self, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """A document as the model sees it: BOS, if the tokenizer adds it, the ids, EOS."""
        return np.concatenate([self._head, ids, self._tail])
