"""A cut by another tool: OptiPFair or mergekit, on a Hugging Face directory.

    python peers_cut.py JOB.json

It runs in the other tool's environment, without Shearling: it needs that tool, torch and transformers. `benchmarks/peers.py` calls it.
JOB names the tool (`tool`), its source directory (`source`), an empty folder for the checkpoint (`out`), the ways that come into question
(`choices`: [layers dropped, neurons kept], of which every one fits the budget) and the rows of text that may be looked at (`rows`: a
.npy file of ids [B, T], or null). Progress goes to standard error; the last line of standard output is JSON: the settings that were
used, versions, and the tokens that were looked at.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 8
"""Rows of one forward pass."""


def percentage(neurons: int, kept: int) -> float:
    """The `pruning_percentage` at which OptiPFair keeps exactly `kept` of `neurons`: it prunes int(percentage / 100 * neurons).

    The middle between two of its steps, so that no rounding can take it over one.
    """
    return 100 * (neurons - kept + 0.5) / neurons


def slices_of(source: str, layers: int, dropped: int, start: int) -> dict[str, Any]:
    """The mergekit config (`passthrough`) that leaves out the blocks start .. start + dropped - 1 of `layers`."""
    ranges = [[0, start], [start + dropped, layers]]
    return {"slices": [{"sources": [{"model": source, "layer_range": r}]} for r in ranges if r[0] < r[1]], "merge_method": "passthrough"}


def load(source: str) -> Any:
    """The stock model in eval mode, in the dtype of its files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).eval()


def batches_of(rows_BT: np.ndarray) -> list[dict[str, torch.Tensor]]:
    """What OptiPFair takes as a dataloader."""
    ids = torch.from_numpy(rows_BT.astype(np.int64))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]


@torch.inference_mode()
def loss_of(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean loss in nats/token."""
    losses = [(len(batch["input_ids"]), model(**batch, labels=batch["input_ids"]).loss.item()) for batch in batches]
    return sum(count * loss for count, loss in losses) / sum(count for count, _ in losses)


def optipfair(job: dict[str, Any]) -> dict[str, Any]:
    """OptiPFair: depth first, then the neurons of the MLP, as its documentation puts the two in order (README, "Combining Both").

    Without text it goes by weights alone: neurons by its default score (MAW), and where they are not enough its default choice of
    layers (the last), as few as let the neurons reach the budget. With text layers go by `analyze_layer_importance`, neurons by MAW with a
    dataloader, and how much of either is the choice with the least loss on this text.
    """
    import optipfair as opf

    logging.getLogger().setLevel(logging.WARNING)
    rows = None if job["rows"] is None else np.load(job["rows"])
    batches = None if rows is None else batches_of(rows)
    source = load(job["source"])
    layers, neurons = source.config.num_hidden_layers, source.config.intermediate_size
    tokens, order = 0, []
    if batches is not None:
        scores = opf.analyze_layer_importance(source, batches, show_progress=False)
        order, tokens = sorted(scores, key=lambda layer: scores[layer]), rows.size
    tried, best = [], None
    for number, (dropped, kept) in enumerate(job["choices"]):
        model = source if len(job["choices"]) == 1 else copy.deepcopy(source)
        calls: list[dict[str, Any]] = []
        if dropped:
            which = (
                {"layer_indices": sorted(order[:dropped])} if order else {"num_layers_to_remove": dropped, "layer_selection_method": "last"}
            )
            calls.append({"pruning_type": "DEPTH", **which})
        if kept < neurons:
            asked = percentage(neurons, kept)
            calls.append({"pruning_type": "MLP_GLU", "neuron_selection_method": "MAW", "pruning_percentage": asked})
        for call in calls:
            text = {"dataloader": batches} if batches is not None and call["pruning_type"] == "MLP_GLU" else {}
            model = opf.prune_model(model, **call, **text, show_progress=False)
        looked = rows.size if batches is not None and kept < neurons else 0
        loss = None if batches is None else loss_of(model, batches)
        tried.append({"dropped": dropped, "neurons": kept, "loss": loss})
        at, said = f"{number + 1}/{len(job['choices'])}", "" if loss is None else f": {loss:.3f} nats/token on the text it looks at"
        print(f"  {at}: without {dropped} of {layers} layers and {neurons - kept} of {neurons} neurons{said}", file=sys.stderr)
        if best is None or (loss is not None and loss < best[0]):
            best = (loss, model, calls, looked)
        del model
    assert best is not None, "a job has a choice"
    best[1].save_pretrained(job["out"])
    searched = 0 if rows is None else sum(rows.size * (1 + (choice["neurons"] < neurons)) for choice in tried)
    return {
        "settings": {"calls": best[2], "dataloader": None if rows is None else list(rows.shape)},
        "layer_order": order,
        "tried": tried,
        "tokens": {"analysis": tokens, "cut": best[3], "search": searched - best[3]},
    }


@torch.inference_mode()
def distances(model: Any, batches: list[dict[str, torch.Tensor]], dropped: int) -> list[float]:
    """Angular distance, in [0, 1], between what goes into block l and what comes out of block l + dropped - 1, for every l.

    Of the last token of each row, as in "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887, section 3.2).
    """
    sums, count = torch.zeros(model.config.num_hidden_layers - dropped + 1, dtype=torch.float64), 0
    layers = model.model.layers
    streams: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: streams.append(args[0][:, -1].double())) for layer in layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0][:, -1].double())))
    for batch in batches:
        streams.clear()
        model(**batch)
        for start in range(len(sums)):
            cosine_B = torch.cosine_similarity(streams[start], streams[start + dropped], dim=-1).clamp(-1, 1)
            sums[start] += (cosine_B.arccos() / torch.pi).sum()
        count += len(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return (sums / count).tolist()


def mergekit(job: dict[str, Any]) -> dict[str, Any]:
    """mergekit's `passthrough` with slices that leave a contiguous run of blocks out; the first and the last block always stay.

    Without text the run ends just before the last block ("a simpler pruning strategy", arXiv 2403.17887, section 4.4); with text it is the
    run of least angular distance (algorithm of section 3.2), which is how mergekit's slices are commonly chosen.
    """
    import yaml

    ((dropped, _),) = job["choices"]
    config = json.loads((Path(job["source"]) / "config.json").read_text())
    layers = config["num_hidden_layers"]
    start, found, tokens = layers - 1 - dropped, None, 0
    if job["rows"] is not None:
        rows = np.load(job["rows"])
        found, tokens = distances(load(job["source"]), batches_of(rows), dropped), rows.size
        start = min(range(1, layers - dropped), key=found.__getitem__)
    print(f"  blocks {start} to {start + dropped - 1} of {layers} (from 0) are left out", file=sys.stderr)
    asked = slices_of(job["source"], layers, dropped, start)
    path = Path(job["out"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(asked))
    try:
        options = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
        program = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(path), job["out"], *options]
        ended = subprocess.run(program, stdout=sys.stderr)
    finally:
        path.unlink()
    if ended.returncode:
        sys.exit(ended.returncode)
    named = slices_of("SOURCE", layers, dropped, start)
    return {
        "settings": {"config": named, "options": options},
        "distances": found,
        "tokens": {"analysis": tokens, "cut": 0, "search": 0},
    }


def main() -> None:
    """Cut as JOB says."""
    job = json.loads(Path(sys.argv[1]).read_text())
    began = time.perf_counter()
    found = {"optipfair": optipfair, "mergekit": mergekit}[job["tool"]](job)
    seconds = round(time.perf_counter() - began, 2)
    versions = {name: version(name) for name in (job["tool"], "torch", "transformers")} | {"python": platform.python_version()}
    print(json.dumps({"versions": versions, **found, "seconds": seconds}))


if __name__ == "__main__":
    main()
