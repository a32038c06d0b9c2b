"""Runs on text that was prepared before, in a folder or at a URL; and a look at prepared text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shearling
from models import save_tiny_source, tiny_tokenizer
from prepared import END, rows_of_files, serving, write_prepared
from ranks import Ranks
from runs import contents, metrics, recipe_values
from shearling import cli
from shearling.data import remote as remote_module
from shearling.data.tokens import MANIFEST
from shearling.errors import ArtifactError, ConfigError, ShearlingError, StorageError
from shearling.recipe import load_recipe
from shearling.show import Silent
from shearling.sources import Source
from shearling.texts import END_OF_DOCUMENT, describe_sequence, describe_table, described, find_text, training_sequences

SIZES = {"web": (50, 9), "code": (20, 4)}


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.counts: list[tuple[str, int, str]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def count(self, what: str, done: int, unit: str) -> None:
        self.counts.append((what, done, unit))


@pytest.fixture(scope="module")
def values(good_source: Path, domains: dict[str, str]) -> dict[str, Any]:
    """A recipe that prepares its text."""
    return recipe_values(good_source, domains, evaluate={"speed": False})


@pytest.fixture(scope="module")
def first(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that prepared the text; only to be read."""
    out = tmp_path_factory.mktemp("first") / "run"
    shearling.run(values, out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Prepared text of many small shards, for the tokenizer of the tiny models."""
    write_prepared(tmp_path / "prepared", SIZES, tiny_tokenizer())
    return tmp_path / "prepared"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test uses the user's own cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def on_prepared(values: dict[str, Any], where: str, **data: Any) -> dict[str, Any]:
    return {**values, "data": {"prepared": where, "sequence_length": 32, **data}}


def same_run(one: Path, other: Path) -> None:
    for name in ("model", "pruned"):
        assert contents(one / name) == contents(other / name), name
    assert metrics(one) == metrics(other)


def shards_of(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run / "data").items() if name != ".verified.json"}


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and all output of the command line."""
    found = CliRunner().invoke(cli.app, list(arguments))
    code = found.exception.exit_code if isinstance(found.exception, ShearlingError) else found.exit_code
    return code, found.output + (str(found.exception) if found.exception else "")


def test_a_run_on_the_text_of_another_is_that_run(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    """From a folder, which is not copied, and from a URL, whose shards are fetched once: the same bits."""
    before = shards_of(first)
    report = shearling.run(on_prepared(values, str(first / "data")), tmp_path / "folder")
    same_run(first, tmp_path / "folder")
    assert not (tmp_path / "folder" / "data").exists() and shards_of(first) == before
    assert report["data"]["prepared"] == str(first / "data") and list(report["data"]["table"]) == ["a", "b"]
    shown = Notes()
    with serving(first / "data") as served:
        weights = {"a": {"weight": 1.0}, "b": {"weight": 1.0}}
        recipe = on_prepared(values, served.url, domains=weights, cache=str(tmp_path / "cache"))
        shearling.run(recipe, tmp_path / "url", show=shown)
        same_run(first, tmp_path / "url")
        names = [f"{domain}.{split}.00000.bin" for domain in ("a", "b") for split in ("train", "heldout")]
        assert sorted(served.asked) == sorted(f"/data/{name}" for name in (MANIFEST, *names))
        assert served.asked[1:3] == ["/data/a.heldout.00000.bin", "/data/b.heldout.00000.bin"]
    assert ("held-out text", 2, "of 2 shards") in shown.counts and not (tmp_path / "home").exists()


def test_a_run_whose_network_failed_goes_on_to_the_same_bits(
    values: dict[str, Any], first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "WAITS", ())
    with serving(first / "data") as served:
        recipe = on_prepared(values, served.url, cache=str(tmp_path / "cache"))
        served.faults += ["", "", "", "500"]
        with pytest.raises(StorageError, match=rf"{served.url}/[ab]\.train\.00000\.bin: cannot be read .*500") as failed:
            shearling.run(recipe, tmp_path / "run")
        assert failed.value.exit_code == 6
        shearling.run(recipe, tmp_path / "run")
    same_run(first, tmp_path / "run")


def test_two_processes_share_the_cache(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    with serving(first / "data") as served:
        changes = {field: {**values[field], "microbatches": 2, "steps": 3} for field in ("prune", "train")}
        recipe = on_prepared({**values, **changes}, served.url, cache=str(tmp_path / "cache"))
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        ranks = Ranks(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")], tmp_path / "ranks")
        assert ranks.codes() == [0, 0], ranks.text()
        assert len(served.asked) == len(set(served.asked)) == 5


def test_text_that_has_moved_is_gone_on_with_and_other_text_is_not(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "data", tmp_path / "one")
    out = tmp_path / "run"
    shearling.prepare(on_prepared(values, str(tmp_path / "one")), out)
    (tmp_path / "one").rename(tmp_path / "two")
    shearling.prepare(on_prepared(values, str(tmp_path / "two")), out)
    assert load_recipe(out / "recipe.yaml").data.prepared == str(tmp_path / "two")
    with serving(tmp_path / "two") as served:
        shearling.prepare(on_prepared(values, served.url, cache=str(tmp_path / "cache")), out)
    other = write_prepared(tmp_path / "other", {"a": (60, 8), "b": (60, 8)}, tiny_tokenizer(), length=32)
    assert list(other["domains"]) == ["a", "b"]
    with pytest.raises(ConfigError, match="has changed since") as refused:
        shearling.prepare(on_prepared(values, str(tmp_path / "other")), out)
    assert [problem.field for problem in refused.value.problems] == ["data.a.heldout", "data.a.train", "data.b.heldout", "data.b.train"]
    with pytest.raises(ConfigError, match=r"data\.domains\.a\.train: found"):
        shearling.prepare(values, out)


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [
        ({"sequence_length": 64}, {}, ["data.sequence_length: found 64"]),
        ({"sequence_length": 64, "domains": {"a": {"weight": 1.0}, "c": {"weight": 1.0}}}, {}, ["64", "data.domains.c", "data.domains.b"]),
        ({}, {"mixture": {"reference": {"a": 2.0}}}, ["ixture.reference has losses for a where the domains are a, b"]),
        ({}, {"mixture": {"floor": {"c": 0.1}}}, ["ixture.floor names c"]),
        ({"domains": {"a": "x.txt", "b": "y.txt"}}, {}, ["prepared already"]),
    ],
)
def test_a_recipe_that_does_not_fit_its_text_is_refused_before_any_work(
    values: dict[str, Any], first: Path, tmp_path: Path, data: dict[str, Any], more: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        shearling.run({**on_prepared(values, str(first / "data"), **data), **more}, tmp_path / "run")
    assert all(part in str(refused.value) for part in said), str(refused.value)
    assert not (tmp_path / "run").exists()


def test_text_for_another_tokenizer_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    write_prepared(tmp_path / "other", {"a": (60, 8)}, tiny_tokenizer(90), length=32, vocab=90)
    with pytest.raises(ConfigError, match="source: found a tokenizer with the fingerprint"):
        shearling.run(on_prepared(values, str(tmp_path / "other")), tmp_path / "run")


def test_damaged_text_is_found_before_a_model_is_loaded(
    values: dict[str, Any], first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first / "data", tmp_path / "copy")
    _flip(tmp_path / "copy" / "b.heldout.00000.bin")
    monkeypatch.setattr(Source, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with serving(tmp_path / "copy") as served:
        for number, where in enumerate((str(tmp_path / "copy"), served.url)):
            with pytest.raises(ArtifactError, match=r"b\.heldout\.00000\.bin: found sha256"):
                shearling.run(on_prepared(values, where), tmp_path / str(number))


def test_overwriting_does_not_delete_the_text_it_reads(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds what the recipe reads\n  - data\.prepared"):
        shearling.run(on_prepared(values, str(tmp_path / "run" / "data")), tmp_path / "run", overwrite=True)
    assert contents(tmp_path / "run") == contents(first)


def test_a_cache_that_cannot_hold_the_text_is_told(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    shown = Notes()
    size = sum(path.stat().st_size for path in (first / "data").glob("*.bin"))
    with serving(first / "data") as served:
        recipe = on_prepared(values, served.url, cache=str(tmp_path / "cache"), cache_gib=(size - 2) / 2**30)
        shearling.prepare(recipe, tmp_path / "run", show=shown)
        assert any("data.cache_gib" in note for note in shown.notes)
        assert served.asked == [f"/data/{name}" for name in (MANIFEST, "a.heldout.00000.bin", "b.heldout.00000.bin")]
        with pytest.raises(ConfigError, match=r"data\.cache_gib: found a limit"):
            shearling.run({**recipe, "data": {**recipe["data"], "cache_gib": 100 / 2**30}}, tmp_path / "run")


def test_losses_on_text_at_a_url(values: dict[str, Any], first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the held-out shards are fetched, into the user's own cache; the run directory gives the same."""
    with serving(first / "data") as served:
        found = shearling.evaluate(first / "model", served.url, speed=False, precision="float32", device="cpu")
        assert sorted(served.asked) == sorted(f"/data/{name}" for name in (MANIFEST, "a.heldout.00000.bin", "b.heldout.00000.bin"))
    assert found["loss"] == shearling.evaluate(first / "model", first, speed=False, precision="float32", device="cpu")["loss"]
    assert list((Path.home() / ".cache" / "shearling" / "shards").iterdir())


def test_preparing_ends_with_a_table_and_tells_what_is_repeated(values: dict[str, Any], first: Path, tmp_path: Path) -> None:
    data = {**values["data"], "domains": {name: {"train": path, "weight": weight} for (name, path), weight in zip(
        values["data"]["domains"].items(), (9.0, 1.0), strict=True
    )}}  # fmt: skip
    recipe = {**values, "data": data, "train": {**values["train"], "steps": 80}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, printed = invoke("prepare", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    assert code == 0, printed
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    table, sequences = report["data"]["table"], (12 + 80) * 8
    assert training_sequences(load_recipe(recipe)) == sequences
    assert table["a"]["share"] == pytest.approx(0.9) and table["a"]["epochs"] == pytest.approx(
        0.9 * sequences / table["a"]["train_sequences"]
    )
    assert table["a"]["repeated_above"] == pytest.approx(table["a"]["train_sequences"] / sequences) and table["a"]["epochs"] > 1
    assert describe_table(table) in printed
    (note,) = [note for note in report["data"]["notes"] if note.startswith("a: at its starting share of 90.0%")]
    assert note in " ".join(printed.split()) and f"{table['a']['epochs']:.2f} times" in note
    assert any(note.startswith("b would be repeated above a share of") for note in report["data"]["notes"])
    assert "Text by domain" in (tmp_path / "run" / "report.html").read_text()
    static = described(load_recipe({**recipe, "mixture": {"update": "static"}}), report["data"])
    assert not any("b would be" in note for note in static["notes"])


def test_the_table_for_reading() -> None:
    row: dict[str, Any] = {
        "documents": 1234567, "heldout_documents": 8, "tokens": 10, "bytes": 39, "bytes_per_token": 3.9, "duplicate_documents": 2,
        "overlapping_documents": 1, "filtered_documents": 3, "skipped_documents": 4, "train_sequences": 50, "heldout_sequences": 5,
        "shards": 6,
    }  # fmt: skip
    lines = describe_table({"web": row, "a-longer-name": {**row, "bytes_per_token": None}}).splitlines()
    titles = "domain documents held out tokens bytes bytes/token duplicate overlapping filtered skipped"
    assert lines[0].split() == titles.split()
    assert lines[1].split() == ["web", "1,234,567", "8", "10", "39", "3.90", "2", "1", "3", "4"] and "-" in lines[2].split()
    assert len(lines) == 7 and "share" not in lines[4] and lines[5].split() == ["web", "50", "5", "6"]
    used = {**row, "share": 0.15, "epochs": 0.41, "repeated_above": 0.3661}
    lines = describe_table({"web": used, "code": {**used, "repeated_above": None}}).splitlines()
    assert lines[5].split()[4:] == ["15.0%", "0.41", "36.6%"] and lines[6].split()[-1] == "never"


def test_inspecting_a_run_a_folder_and_a_url(first: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shearling.inspect_data(first)
    assert found["place"] == str(first / "data") and found["sequence_length"] == 32 and "epochs" in found["table"]["a"]
    assert found["notes"] == json.loads((first / "report.json").read_text())["data"]["notes"]
    assert shearling.inspect_data(first / "data")["table"]["a"].items() < found["table"]["a"].items()
    with serving(folder) as served:
        there, here = shearling.inspect_data(served.url), shearling.inspect_data(folder)
        assert there["table"] == here["table"] and there["place"] == served.url
        assert here["table"]["web"]["train_sequences"] == 50 and here["table"]["web"]["shards"] == 9
    code, printed = invoke("data", "inspect", str(folder))
    assert code == 0 and describe_table(here["table"]) in printed
    code, printed = invoke("data", "inspect", str(folder), "--json")
    assert code == 0 and json.loads(printed) == here


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_sequence_is_decoded_with_its_documents_apart(values: dict[str, Any], folder: Path, split: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    with serving(folder) as served:
        for where in (str(folder), served.url):
            for number, ids in enumerate(rows_of_files(folder, manifest, "code", split).tolist()):
                name = f"code:{number}" if split == "train" else f"code/heldout:{number}"
                found = shearling.inspect_data(where, sequence=name, tokenizer=values["source"])["sequence"]
                assert found["ids"] == ids and (found["split"], found["number"]) == (split, number)
                again: list[int] = []
                for document in found["documents"]:
                    again += [int(word[1:]) for word in document["text"].split()] + [END] * document["ends"]
                assert again == ids
                assert sum(document["ends"] for document in found["documents"]) == ids.count(END)
                assert describe_sequence(found).count(END_OF_DOCUMENT) == ids.count(END)


def test_a_sequence_on_the_command_line(first: Path) -> None:
    """Of a run directory, whose source has the tokenizer."""
    code, printed = invoke("data", "inspect", str(first), "--show", "a/heldout:1")
    assert code == 0 and "a/heldout:1, 32 tokens" in printed and re.search(r"w\d+ w\d+", printed) and END_OF_DOCUMENT in printed


def test_text_cannot_steer_the_terminal() -> None:
    hostile = "\x1b[2Jred\x9b31m \u202eback\r\x07 tab\tand\nline"
    sequence = {"domain": "web", "split": "train", "number": 0, "ids": [1], "documents": [{"text": hostile, "ends": True}]}
    printed = describe_sequence(sequence)
    assert not set(printed) & set("\x1b\x9b\u202e\r\x07") and "\\x1b[2Jred" in printed and "tab\tand\nline" in printed


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"sequence": "web"}, ConfigError, "DOMAIN:N"),
        ({"sequence": "web:-1"}, ConfigError, "DOMAIN:N"),
        ({"sequence": "web/test:1"}, ConfigError, "DOMAIN:N"),
        ({"sequence": "books:1"}, ConfigError, "The domains are web, code"),
        ({"sequence": "web:50"}, ConfigError, "It has 50 there"),
        ({"sequence": "web/heldout:9"}, ConfigError, "It has 9 there"),
        ({"sequence": "web:0"}, ConfigError, "--tokenizer"),
    ],
)
def test_a_sequence_that_there_is_not(folder: Path, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        shearling.inspect_data(folder, **arguments)


def test_a_sequence_is_not_decoded_by_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    save_tiny_source(tmp_path / "other", "llama", vocab=90)
    with pytest.raises(ConfigError, match="another tokenizer"):
        shearling.inspect_data(folder, sequence="web:0", tokenizer=str(tmp_path / "other"))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[3] ^= 8
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"), [(_flip, "sha256"), (_cut, "255 bytes where 256|127 bytes where 128"), (Path.unlink, "o such file|404")]
)
def test_verifying_reads_every_shard_and_names_all_that_are_wrong(
    folder: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], said: str
) -> None:
    shown = Notes()
    with serving(folder) as served:
        for where in (str(folder), served.url):
            found = shearling.inspect_data(where, verify=True, show=shown)["verified"]
            assert found == {"shards": 13, "bytes": 83 * 16 * 2}
        assert len(served.asked) == 14 and shown.counts[-1] == ("verifying", 13, "of 13 shards")
        for name in ("web.train.00002.bin", "code.heldout.00000.bin"):
            damage(folder / name)
        for where in (str(folder), served.url):
            with pytest.raises(ArtifactError, match="2 of 13 shards") as caught:
                shearling.inspect_data(where, verify=True)
            assert [problem.field for problem in caught.value.problems] == ["web.train.00002.bin", "code.heldout.00000.bin"]
            assert all(re.search(said, problem.found) for problem in caught.value.problems)
            with pytest.raises(ArtifactError, match=r"web\.train\.00002"):
                shearling.inspect_data(where, sequence="web:17", tokenizer=values["source"])
        monkeypatch.setattr(remote_module, "WAITS", ())
        served.faults += ["", "500"]
        with pytest.raises(StorageError, match="cannot be read"):
            shearling.inspect_data(served.url, verify=True)
    code, printed = invoke("data", "inspect", str(folder), "--verify")
    assert code == 3 and "2 of 13 shards" in printed


def test_a_place_without_text(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, found in (("nothing", "nothing"), ("file", "a file"), (".", "another folder")):
        with pytest.raises(ArtifactError, match=f"no prepared text\n  - data: found {found}"):
            find_text(tmp_path / name)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="no prepared data"):
        shearling.inspect_data(tmp_path)
