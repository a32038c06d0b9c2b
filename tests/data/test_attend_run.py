"""`data.attend` in whole runs: every forward pass over packed text has it, losses are those of documents, and measuring follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import shearling
from models import save_tiny_source, tiny_tokenizer
from runs import contents, metrics, recipe_values, write_text
from shearling import cli
from shearling.data.tokens import open_tokens
from shearling.errors import ArtifactError, ConfigError
from shearling.inputs import document_positions

END = 1
EXACT = {"speed": False, "device": "cpu", "precision": "float32"}


class Calls:
    """The forward passes of all Llamas while it is installed: ids, and the positions that were given."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = LlamaForCausalLM.forward

        def forward(model: Any, *args: Any, **given: Any) -> Any:
            assert not args and given["use_cache"] is False and given.get("attention_mask") is None
            self.seen.append((given["input_ids"], given.get("position_ids")))
            return original(model, **given)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Calls]]:
    """Does a run with `data.attend` so, once; its directory, and the forward passes that it took."""
    root = tmp_path_factory.mktemp("attend")
    save_tiny_source(root / "source", "llama", tied=True)
    text, done = write_text(root), dict[str, tuple[Path, Calls]]()

    def run(attend: str) -> tuple[Path, Calls]:
        if attend not in done:
            values = recipe_values(
                root / "source",
                text,
                data={"attend": attend},
                prune={"steps": 6, "rotate": "tied", "compensate": 4},
                train={"steps": 4, "evaluate_every": 4},
                evaluate={"speed": False},
                runtime={"precision": "float32"},
            )
            calls = Calls()
            with pytest.MonkeyPatch.context() as monkeypatch:
                calls.install(monkeypatch)
                shearling.run(values, root / attend)
            done[attend] = root / attend, calls
        return done[attend]

    return run


def test_every_forward_pass_of_a_run_stays_inside_documents(run_of: Callable[[str], tuple[Path, Calls]]) -> None:
    """Held-out losses, scores, rotation, training with gates and without, compensation, verifying the cut and what is published."""
    path, calls = run_of("document")
    assert open_tokens(path / "data").document_end == END
    assert len(calls.seen) > 30 and any((ids_BT[:, :-1] == END).any() for ids_BT, _ in calls.seen)
    for ids_BT, positions_BT in calls.seen:
        assert positions_BT is not None and torch.equal(positions_BT, document_positions(ids_BT, END))
    _, others = run_of("sequence")
    assert len(others.seen) == len(calls.seen) and all(positions_BT is None for _, positions_BT in others.seen)


def test_the_losses_of_a_run_are_those_of_documents_alone(run_of: Callable[[str], tuple[Path, Calls]]) -> None:
    """The source's by domain, computed here document by document; everything else differs from a run whose tokens see all."""
    (path, _), (other, _) = run_of("document"), run_of("sequence")
    tokens = open_tokens(path / "data")
    model = AutoModelForCausalLM.from_pretrained(path.parent / "source").eval()
    losses = json.loads((path / "stages" / "source.json").read_text())["loss"]
    for domain in tokens.domains:
        found = []
        for row_T in np.asarray(tokens.sequences(domain, "heldout")[:], dtype=np.int64):
            parts = [part for part in np.split(row_T, np.flatnonzero(row_T == END) + 1) if len(part)]
            with torch.no_grad():
                logits_TV = torch.cat([model(input_ids=torch.from_numpy(part)[None]).logits[0] for part in parts])
            found.append(F.cross_entropy(logits_TV[:-1], torch.from_numpy(row_T[1:])))
        assert losses[domain] == pytest.approx(float(torch.stack(found).mean()), rel=1e-5)
    reports = [json.loads((run / "report.json").read_text())["loss"] for run in (path, other)]
    for stage in ("source", "before_hardening", "pruned", "final"):
        assert all(abs(reports[0][stage][domain] - reports[1][stage][domain]) > 1e-4 for domain in tokens.domains)
    steps = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (path, other)]
    assert len(steps[0]) == len(steps[1]) == 10 and all(one != another for one, another in zip(*steps, strict=True))


def test_what_is_prepared_does_not_depend_on_it(run_of: Callable[[str], tuple[Path, Calls]]) -> None:
    one, another = (contents(run_of(attend)[0] / "data") for attend in ("document", "sequence"))
    for found in (one, another):
        found.pop(".verified.json", None)  # when each was looked at
    assert one == another


def test_evaluate_does_as_the_run_did_or_as_it_is_told(
    run_of: Callable[[str], tuple[Path, Calls]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, _), (other, _) = run_of("document"), run_of("sequence")
    final = json.loads((path / "report.json").read_text())["loss"]["final"]
    found = shearling.evaluate(path / "model", path, **EXACT)
    assert found["attend"] == "document" and found["loss"] == pytest.approx(final, rel=1e-5)
    monkeypatch.setenv("HOME", str(path.parent))
    assert shearling.evaluate(path / "model", f"~/{path.name}", **EXACT) == found
    crossing = shearling.evaluate(path / "model", path, attend="sequence", **EXACT)
    assert crossing["attend"] == "sequence" and abs(crossing["loss"]["mean"] - final["mean"]) > 1e-4
    assert shearling.evaluate(path / "model", path / "data", **EXACT) == shearling.evaluate(path / "model", other, **EXACT) == crossing
    assert shearling.evaluate(path / "model", path / "data", attend="document", **EXACT) == found
    cli.evaluate(str(path / "model"), path / "data", attend="document", as_json=True, **EXACT)
    assert json.loads(capsys.readouterr().out) == found
    with pytest.raises(ConfigError, match=r"attend: found 'row'.*sequence or document"):
        shearling.evaluate(path / "model", path, attend="row", **EXACT)


def test_evaluate_refuses_text_of_another_tokenizer(run_of: Callable[[str], tuple[Path, Calls]], tmp_path: Path) -> None:
    """With a vocabulary of the same size; more rows in the embedding than the tokenizer has words do no harm."""
    path, _ = run_of("sequence")
    save_tiny_source(tmp_path / "larger", "llama", vocab=100)
    tiny_tokenizer().save_pretrained(tmp_path / "larger")
    assert shearling.evaluate(tmp_path / "larger", path, **EXACT)["loss"]["mean"] > 0
    shutil.copytree(path / "model", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"w10"', '"x10"'))
    with pytest.raises(ArtifactError, match="source: found a tokenizer with the fingerprint"):
        shearling.evaluate(tmp_path / "other", path, **EXACT)
    save_tiny_source(tmp_path / "smaller", "llama", vocab=90)
    with pytest.raises(ArtifactError, match="a vocabulary of 90 where the text was prepared for 96"):
        shearling.evaluate(tmp_path / "smaller", path, **EXACT)
