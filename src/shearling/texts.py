"""The prepared text that a run, or a command, works with: where it lies, whether it is the right one, and a look at it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.config import parse
from shearling.data.config import CACHE, DataConfig
from shearling.data.remote import Remote, is_url, shown_place
from shearling.errors import ArtifactError, ConfigError, Problem
from shearling.io.files import sha256_file
from shearling.recipe import Recipe, load_recipe
from shearling.run import RECIPE_FILE, stage_result
from shearling.sources import Source, open_source

if TYPE_CHECKING:
    from shearling.data.tokens import TokenSet

GIB = 2**30
DOCUMENTS = {
    **{"documents": "documents", "heldout_documents": "held out", "tokens": "tokens", "bytes": "bytes", "bytes_per_token": "bytes/token"},
    **{"duplicate_documents": "duplicate", "overlapping_documents": "overlapping"},
    **{"filtered_documents": "filtered", "skipped_documents": "skipped"},
}
SEQUENCES = {"train_sequences": "training sequences", "heldout_sequences": "held-out sequences", "shards": "shards"}
USE = {"share": "share", "epochs": "epochs", "repeated_above": "repeated above"}
ALL = {**DOCUMENTS, **SEQUENCES, **USE}
"""Columns of the table, by the name of what stands in them."""
END_OF_DOCUMENT = "-------- end of document --------"
_CONTROL = re.compile(r"[^\S \n\t]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that could steer a terminal."""


@dataclass(frozen=True)
class Place:
    """Where prepared text lies."""

    where: str
    """A folder, or a URL."""
    cache: str = CACHE
    """Folder of the cache, for a URL."""
    cache_gib: float = DataConfig.model_fields["cache_gib"].default
    source: str | None = None
    """The source of the run that it belongs to."""
    run: Path | None = None
    """The directory of that run."""

    @property
    def limit_bytes(self) -> int:
        """What the cache may hold."""
        return int(self.cache_gib * GIB)


def find_text(where: str | Path) -> Place:
    """The prepared text that a URL, a folder of it, or a run directory leads to; raise `ArtifactError` where there is none."""
    from shearling.data.tokens import MANIFEST

    if is_url(str(where)):
        return Place(str(where))
    folder = Path(where).expanduser()
    if (folder / MANIFEST).is_file():
        return Place(str(folder))
    if (folder / RECIPE_FILE).is_file():
        recipe = load_recipe(folder / RECIPE_FILE)
        return place_of_run(recipe, folder)
    if (folder / "data" / MANIFEST).is_file():
        return Place(str(folder / "data"))
    found = "a file" if folder.is_file() else "another folder" if folder.is_dir() else "nothing"
    remedy = "Give a run directory, a folder or URL of prepared text, or prepare the text first."
    raise ArtifactError(f"{where}: no prepared text", [Problem("data", found, remedy)])


def place_of_run(recipe: Recipe, path: Path) -> Place:
    """Where the text of the run at `path` lies, or will lie."""
    data = recipe.data
    return Place(data.prepared or str(path / "data"), data.cache, data.cache_gib, recipe.source, path)


def open_text(place: Place, manifest: Mapping[str, Any] | None = None, *, verify: bool = True) -> TokenSet:
    """The rows of the text at a place; see `shearling.data.elsewhere.open_prepared`. `manifest`: as read there; left out, it is read."""
    from shearling.data.elsewhere import open_prepared, read_prepared

    if manifest is None:
        manifest = read_prepared(place.where)
    return open_prepared(place.where, manifest, place.cache, place.limit_bytes, verify=verify)


def read_text_of_recipe(recipe: Recipe, source: Source) -> dict[str, Any] | None:
    """The manifest of the prepared text that a recipe names, None where it names none; read and checked before any expensive work.

    Raises what `read_prepared` and `check_prepared` of `shearling.data.elsewhere` raise.
    """
    from shearling.data.elsewhere import check_prepared, read_prepared

    if recipe.data.prepared is None:
        return None
    manifest = read_prepared(recipe.data.prepared)
    check_prepared(manifest, recipe.data, source.tokenizer(), source.anatomy.sizes["vocab"])
    return manifest


def with_domains_of(recipe: Recipe, manifest: Mapping[str, Any] | None) -> Recipe:
    """A recipe that leaves the domains of its prepared text out, with them; raise `ConfigError` where its other fields do not fit them."""
    if manifest is None or recipe.data.domains:
        return recipe
    values = recipe.model_dump(mode="json")
    values["data"]["domains"] = {name: {} for name in manifest["domains"]}
    return parse(Recipe, values, "recipe, with the domains of the prepared text")


def cache_notes(recipe: Recipe, manifest: Mapping[str, Any] | None) -> list[str]:
    """What the user should know of the cache before text of a URL is trained on; `manifest`: of the text prepared before, if any."""
    from shearling.data.elsewhere import too_small_for

    if manifest is None or not is_url(str(recipe.data.prepared)):
        return []
    note = too_small_for(manifest, place_of_run(recipe, Path()).limit_bytes)
    return [note] if note else []


def training_sequences(recipe: Recipe) -> int:
    """Sequences that the steps of a recipe train on, in both stages."""
    stages = ([] if recipe.target is None else [recipe.prune]) + [recipe.train]
    return sum(stage.steps * stage.batch_size for stage in stages)


def described(recipe: Recipe | None, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of prepared text.

    Args:
        recipe: of the run; None where it is not known.
        prepared: what the ledger's stage prepare, or a manifest, says; `starting_shares` of it is needed for how often text is used.

    Returns:
        `domains`: as given. `table`: {domain: counts}, see `shearling.data.census.census`, with `share`, `epochs` and `repeated_above` of
        `passes`. `notes`: of the domains, and on text that is repeated.
    """
    from shearling.data.census import census, passes, repetition_notes
    from shearling.data.mixture_config import MOVING

    domains, shares = prepared["domains"], prepared.get("starting_shares")
    table = census(domains)
    notes = [note for facts in domains.values() for note in facts.get("notes", ())]
    if recipe is not None and shares:
        passed = passes(domains, shares, training_sequences(recipe))
        table = {name: {**row, **passed[name]} for name, row in table.items()}
        notes += repetition_notes(passed, recipe.mixture.update in MOVING)
    return {**{key: value for key, value in prepared.items() if key != "seconds"}, "table": table, "notes": notes}


def inspect(
    data: str | Path, sequence: str | None, tokenizer: str | None, verify: bool, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """See `shearling.api.inspect_data`. `progress` is called with shards verified so far, and in all."""
    from shearling.data.elsewhere import read_prepared

    asked = None if sequence is None else _asked(sequence)
    place = find_text(data)
    manifest = read_prepared(place.where)
    shares = (stage_result(place.run, "prepare") or {}).get("starting_shares") if place.run else None
    recipe = load_recipe(place.run / RECIPE_FILE) if place.run else None
    found: dict[str, Any] = {"place": shown_place(place.where)}
    found |= {
        key: manifest[key] for key in ("format", "fingerprint", "sequence_length", "vocab_size", "dtype", "document_end", "tokenizer")
    }
    told = described(recipe, {"domains": manifest["domains"], "starting_shares": shares})
    found |= {"table": told["table"], "notes": told["notes"]}
    if verify:
        found["verified"] = _verify(place, manifest, progress)
    if asked is not None:
        found["sequence"] = _decoded(place, manifest, asked, tokenizer)
    return found


def _asked(sequence: str) -> tuple[str, str, int]:
    """(domain, split, number) of DOMAIN:N or DOMAIN/heldout:N."""
    match = re.fullmatch(r"([^/:]+)(?:/(train|heldout))?:([0-9]{1,15})", sequence)
    if match is None:
        raise ConfigError(
            "no sequence is named", [Problem("--show", repr(sequence), "Write DOMAIN:N, or DOMAIN/heldout:N; N counts from 0.")]
        )
    return match[1], match[2] or "train", int(match[3])


def _verify(place: Place, manifest: Mapping[str, Any], progress: Callable[[int, int], None] | None) -> dict[str, int]:
    """Read every shard where it lies and compare its size and sha256; raise one `ArtifactError` for all that are wrong."""
    from shearling.data.tokens import SPLITS, row_bytes, shards_of

    row = row_bytes(manifest)
    shards = [shard for facts in manifest["domains"].values() for split in SPLITS for shard in shards_of(facts, split)]
    problems, total = [], 0
    for number, shard in enumerate(shards, start=1):
        size = shard.sequences * row
        found = _difference(place, shard.file, size, shard.sha256)
        if found:
            remedy = "It is damaged: prepare it again, or get it again from where it was prepared."
            problems.append(Problem(shard.file, found, remedy))
        total += size
        if progress:
            progress(number, len(shards))
    if problems:
        raise ArtifactError(f"{place.where}: {len(problems)} of {len(shards)} shards are not what they should be", problems)
    return {"shards": len(shards), "bytes": total}


def _difference(place: Place, file: str, size: int, sha256: str) -> str | None:
    """What is wrong with a shard as it lies there, if anything."""
    from shearling.data.tokens import difference_of

    if not is_url(place.where):
        return difference_of(Path(place.where) / file, size, sha256, lambda path, _: sha256_file(path))
    remote = Remote(place.where)

    def read() -> tuple[int, str]:
        length, digest = 0, hashlib.sha256()
        for block in remote.blocks(file):
            length += len(block)
            digest.update(block)
        return length, digest.hexdigest()

    try:
        length, digest = remote.patiently(file, read)
    except ArtifactError as error:
        return error.problems[0].found
    if length != size:
        return f"{length} bytes where {size} are expected"
    return None if digest == sha256 else f"sha256 {digest} where {sha256} is expected"


def _decoded(place: Place, manifest: Mapping[str, Any], asked: tuple[str, str, int], tokenizer: str | None) -> dict[str, Any]:
    """One sequence as ids and as the text of each document in it; see `shearling.api.inspect_data`."""
    from shearling.data.encode import tokenizer_fingerprint
    from shearling.data.tokens import row_bytes, shards_of

    domain, split, number = asked
    if domain not in manifest["domains"]:
        remedy = f"The domains are {', '.join(manifest['domains'])}."
        raise ConfigError("no such sequence", [Problem("--show", f"the domain {domain!r}", remedy)])
    facts = manifest["domains"][domain]
    if number >= facts[f"{split}_sequences"]:
        remedy = f"It has {facts[f'{split}_sequences']} there, counted from 0."
        raise ConfigError("no such sequence", [Problem("--show", f"sequence {number} of {domain}/{split}", remedy)])
    name = tokenizer or place.source
    if name is None:
        remedy = "Give --tokenizer, the model that the text was prepared for, or a run directory."
        raise ConfigError("a sequence cannot be decoded", [Problem("--tokenizer", "nothing", remedy)])
    decoder = open_source(name).tokenizer()
    if tokenizer_fingerprint(decoder) != manifest["tokenizer"]:
        remedy = "Give the model that the text was prepared for."
        raise ConfigError("another tokenizer than the text was prepared with", [Problem("--tokenizer", name, remedy)])
    if not is_url(place.where):  # a remote shard is checked when it is fetched
        shard = shards_of(facts, split)[number // manifest["shard_sequences"]]
        if wrong := _difference(place, shard.file, shard.sequences * row_bytes(manifest), shard.sha256):
            raise ArtifactError(f"{place.where}: a shard is damaged", [Problem(shard.file, wrong, "Prepare it again.")])
    ids = [int(token) for token in open_text(place, manifest, verify=False).sequences(domain, split)[number]]
    ends = [at for at, token in enumerate(ids) if token == manifest["document_end"]]
    starts = [0, *(end + 1 for end in ends)]
    documents = [
        {"text": decoder.decode(ids[start:end], skip_special_tokens=False), "tokens": end - start, "ends": end < len(ids)}
        for start, end in zip(starts, [*ends, len(ids)], strict=True)
        if end < len(ids) or start < end
    ]
    return {"domain": domain, "split": split, "number": number, "ids": ids, "documents": documents}


def describe_table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of `described`, for reading."""
    return f"{_aligned(*cells(table, DOCUMENTS))}\n\n{_aligned(*cells(table, SEQUENCES | USE))}"


def cells(table: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] = ALL) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, for reading; columns that are not known of every domain are left out."""
    known = {field: title for field, title in columns.items() if all(field in row for row in table.values())}
    return ["domain", *known.values()], [[name, *(_cell(row[field], field) for field in known)] for name, row in table.items()]


def _aligned(head: list[str], body: list[list[str]]) -> str:
    rows = [head, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any, field: str) -> str:
    if field in ("share", "repeated_above"):
        return "never" if value is None else f"{value:.1%}"
    if field in ("epochs", "bytes_per_token"):
        return "-" if value is None else f"{value:.2f}"
    return f"{value:,}"


def describe_sequence(sequence: Mapping[str, Any]) -> str:
    """A sequence of `inspect`, for reading: the ends of its documents visible, characters that could steer a terminal spelled out."""
    lines = [f"{sequence['domain']}/{sequence['split']}:{sequence['number']}, {len(sequence['ids'])} tokens", ""]
    for document in sequence["documents"]:
        lines.append(_CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), document["text"]))
        lines += [END_OF_DOCUMENT] if document["ends"] else []
    return "\n".join(lines)
