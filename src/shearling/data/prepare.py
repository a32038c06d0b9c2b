"""From text to token shards: look at everything, tokenise and pack domain by domain, publish one directory whole.

A try that was cut short is gone on with, and a damaged directory is mended, by the same call: both are a token set in which some
domains are finished and others are not.

As in Sheared LLaMA's preparation, a document becomes BOS (where the tokenizer adds it), its ids, EOS; the documents of a domain
follow one another and are cut into rows of T tokens, and the last partial row is dropped. What is different: ids of up to 32 bits,
exact duplicates dropped, and held-out text chosen document by document, so that no document is on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shearling.data.config import DataConfig
from shearling.data.encode import Encoder, tokenizer_fingerprint
from shearling.data.held import held_out
from shearling.data.origins import Origin, find_origins, survey
from shearling.data.pack import Tell, pack_domain
from shearling.data.partial import Partial
from shearling.data.tokens import (
    FORMAT,
    MANIFEST,
    SHARD_TOKENS,
    SPLITS,
    damaged_shards,
    dtype_for,
    fingerprint,
    read_manifest,
    shard_rows,
    shards_of,
)
from shearling.errors import ArtifactError, OutputError, Problem
from shearling.io.files import RunLock, check_writable, publish_directory, replace_directory, storage_errors, sweep_temporary


def prepare(
    config: DataConfig,
    tokenizer: Any,
    vocab_size: int,
    out: Path,
    *,
    seed: int,
    progress: Tell | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Make the token shards of every domain, or find them made.

    A domain that was finished before a kill, an error or a full disk is not tokenised again by the next call with the same settings,
    and one that was begun is gone on with: what was done since its ledger was written, some seconds before, is done again. Where `out` is
    finished but shards in it are missing or damaged, their domains are made anew and the others taken over.

    Held out are a domain's `heldout` files, or else documents split off from its text: a document is held out where a hash of seed
    and text falls under a small fraction, whatever other files there are, until `heldout_sequences` are filled; such documents
    beyond that are dropped, never trained on. A domain of fewer than 200 documents is split inside them instead: the last part of
    each, at most a tenth, which the manifest's `notes` say. What one domain holds out is trained on in none, and documents that are
    split inside are used in one domain alone; docs/data.md has the one exception. A document that is repeated inside a domain is
    used once.

    Args:
        config: domains and lengths; paths are relative to the working directory unless `config.resolved` made them absolute.
        tokenizer: a Hugging Face fast tokenizer.
        vocab_size: rows of the model's embedding; every id is below it.
        out: directory to publish. Returned from straight away if it holds this data already, undamaged: the same settings,
            tokenizer, and names and sizes of the files.
        seed: decides which documents are held out.
        progress: called after every batch of about 1 MiB of text.
        shard_tokens: tokens in a shard, at most; see `shard_rows`.

    Returns:
        The manifest. By domain: documents and heldout_documents (used whole or in part), duplicate_documents, overlapping_documents,
        filtered_documents and skipped_documents (dropped: repeated, held out in another way, left out by `where`, broken),
        train_sequences, heldout_sequences, tokens and bytes (of the text used on both sides; tokens with the marks), shards by split
        (file, sequences, sha256), notes. Beside them document_end, the id that ends each document and that nothing else has.

    Raises:
        DataError: files, text or tokenizer are wrong; what can be found before tokenising is found then, and all at once.
        OutputError: `out` holds something else, or another process is writing it.
        ArtifactError: `out` holds this data, but its manifest is damaged, or the text now gives other shards than the damaged
            ones were. `out` is left as it is.
        StorageError: the disk is full or not writable.
        Nothing incomplete is ever left under the name `out`.
    """
    out = Path(out)
    if out.is_dir():
        out = out.resolve()  # what a link points to is mended in its place
    encoder = Encoder(tokenizer, vocab_size)
    origins = find_origins(config)
    head = _head(config, encoder, origins, tokenizer_fingerprint(tokenizer), seed, shard_rows(config.sequence_length, shard_tokens))
    there = _existing(out, head)
    if there and not damaged_shards(out, there):
        return there
    if not out.exists():  # in a folder that is there, a kill would leave the trial's file
        check_writable(out)
    with RunLock(out.parent / f".{out.name}.lock"), storage_errors(out):
        sweep_temporary(out.parent, out.name)
        there = _existing(out, head)  # a process that held the lock until now, or the sweep, may have put it there
        damaged = damaged_shards(out, there) if there else {}
        if there and not damaged:
            return there
        with Partial(out, there or head) as partial:  # what is mended keeps its order of domains, by which cursors are saved
            if there:
                lost = partial.domains.keys() | {domain for domain, _ in damaged}
                partial.take_over(out, {name: facts for name, facts in there["domains"].items() if name not in lost})
            _complete(partial, config, encoder, origins, seed, progress)
            if there:
                _check_promises(there, partial, out)
                replace_directory(partial.path, out)
            else:
                if out.is_dir():  # empty, or _existing would have refused it
                    out.rmdir()
                publish_directory(partial.path, out)
    return partial.manifest


def _head(config: DataConfig, encoder: Encoder, origins: list[Origin], tokenizer: str, seed: int, shard_sequences: int) -> dict[str, Any]:
    """The manifest without its domains: all that is known before a text is read."""
    settings = {
        "format": FORMAT,
        **config.model_dump(include={"sequence_length", "heldout_sequences", "max_train_sequences"}),
        "vocab_size": encoder.vocab_size,
        "tokenizer": tokenizer,
        "document_end": encoder.document_end,
        "shard_sequences": shard_sequences,
        "seed": seed,
        "domains": {origin.name: origin.settings() for origin in origins},
    }
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(settings),
        "dtype": dtype_for(encoder.vocab_size).str,
        "sequence_length": config.sequence_length,
        "vocab_size": encoder.vocab_size,
        "tokenizer": tokenizer,
        "document_end": encoder.document_end,
        "shard_sequences": shard_sequences,
        "settings": settings,
    }


def _complete(partial: Partial, config: DataConfig, encoder: Encoder, origins: list[Origin], seed: int, progress: Tell | None) -> None:
    """Make every domain that is not finished."""
    missing = [origin for origin in origins if origin.name not in partial.domains]
    if not missing:
        return
    whole = survey(origins)
    if any(origin.heldout for origin in missing):
        whole = replace(whole, held=held_out(origins, whole, config, encoder, seed))
    # Small domains first: one that is too short for a sequence is found before hours go into a large one.
    for origin in sorted(missing, key=lambda origin: float("inf") if (size := origin.size()) is None else size):
        ledger = partial.ledger(origin.name)
        facts = pack_domain(origin, whole, config, encoder, ledger, seed, partial.manifest["shard_sequences"], progress)
        partial.finish({origin.name: facts})
        ledger.discard()
    partial.drop_unfinished()


def _check_promises(there: Mapping[str, Any], partial: Partial, out: Path) -> None:
    """Raise `ArtifactError`, and keep nothing, where a shard made anew is not the one that the manifest of `out` promised."""
    remedy = f"Its text, or the manifest, has changed: put that back as it was, or delete {out} and prepare all of it anew."
    problems = []
    for name, facts in there["domains"].items():
        for split in SPLITS:
            made = {shard.file: shard.sha256 for shard in shards_of(partial.domains[name], split)}
            for shard in shards_of(facts, split):
                if (found := made.get(shard.file)) != shard.sha256:
                    problems.append(Problem(shard.file, f"sha256 {found} where {shard.sha256} is expected", remedy))
    if problems:
        partial.discard()
        raise ArtifactError(f"{out}: damaged, and cannot be mended: the text gives other shards than it did", problems)


def _existing(out: Path, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` if that was made with these settings, None if nothing is there; `OutputError` for all else."""
    if out.is_dir():
        if not any(out.iterdir()):
            return None
        if not (out / MANIFEST).is_file():
            raise OutputError(f"{out}: exists and holds no prepared data; choose another output")
    elif out.exists() or out.is_symlink():
        raise OutputError(f"{out}: exists and is no directory; choose another output")
    else:
        return None
    manifest = read_manifest(out)
    if manifest["fingerprint"] == head["fingerprint"]:
        return manifest
    there, asked = _flat(manifest["settings"]), _flat(head["settings"])
    names = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
    differences = "; ".join(f"{name}: {there.get(name, 'absent')} there, {asked.get(name, 'absent')} asked for" for name in names)
    raise OutputError(f"{out}: holds data prepared otherwise ({differences}); choose another output, or delete it")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
