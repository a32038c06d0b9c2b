"""The commands: each parses its arguments, calls the function of the same name, and ends with the error's exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from shearling import api
from shearling.errors import ConfigError, Problem, ShearlingError
from shearling.progress import Terminal
from shearling.run import run_path
from shearling.world import launched_rank

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Shear a pretrained language model to exactly the shape you can serve.\n\n"
    "A recipe (YAML) names the source, the target shape, the text by domain, and the two stages of training. "
    "Start with [bold]shearling plan SOURCE --target ...[/bold], which computes nothing, then "
    "[bold]shearling run RECIPE.yaml[/bold]. The same command goes on after any interruption.\n\n"
    "Exit codes: 0 done · 1 a bug · 2 recipe or shape wrong · 3 model or text wrong · 4 numbers went wrong · 5 output exists or in "
    "use · 6 storage failed · 75 stopped by a signal, run the same command to go on.",
)

data_app = typer.Typer(no_args_is_help=True, help="Look at prepared text.")
app.add_typer(data_app, name="data")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory; made if it is not there. Left out, runs/NAME of the recipe's file."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the recipe, as in train.steps=100.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run that is there, and begin afresh. Leave it out to go on after an interruption.")
]
AcceptChanged = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-changed",
        metavar="FIELD",
        help="Go on although this field of the recipe (or section, as in train) differs from what the run was begun with.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    recipe: RecipePath, out: Out = None, overrides: Set = None, overwrite: Overwrite = False, accept_changed: AcceptChanged = None
) -> None:
    """The whole of it: prepare, prune, cut, verify, continue pretraining, evaluate, report. Run again, it goes on."""
    _finish(_through(api.run, recipe, out, overrides, overwrite, accept_changed), run_path(recipe, out))


@app.command()
def prepare(
    recipe: RecipePath, out: Out = None, overrides: Set = None, overwrite: Overwrite = False, accept_changed: AcceptChanged = None
) -> None:
    """Text by domain to token shards in DIR/data."""
    report = _through(api.prepare, recipe, out, overrides, overwrite, accept_changed)
    if not launched_rank():  # process 0 tells it
        from shearling.texts import describe_table

        typer.echo(describe_table(report["data"]["table"]))


@app.command()
def prune(
    recipe: RecipePath, out: Out = None, overrides: Set = None, overwrite: Overwrite = False, accept_changed: AcceptChanged = None
) -> None:
    """The run up to the cut and verified model in DIR/pruned."""
    _finish(_through(api.prune, recipe, out, overrides, overwrite, accept_changed), run_path(recipe, out))


@app.command()
def train(
    recipe: RecipePath, out: Out = None, overrides: Set = None, overwrite: Overwrite = False, accept_changed: AcceptChanged = None
) -> None:
    """The run up to the trained model in DIR/model; stages that are done are kept."""
    _finish(_through(api.train, recipe, out, overrides, overwrite, accept_changed), run_path(recipe, out))


@app.command()
def compare(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the comparison; made if it is not there.")],
    methods: Annotated[
        list[str],
        typer.Option(
            metavar="A,B,...",
            help="Names of `shearling methods`, also as NAME+compensate, +rotate, +lora, +distill; recipe; checkpoint:PATH.",
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Rows of each method: the recipe's seed and those after it.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="What each row may spend in all; left out, what the recipe spends.")] = None,
    learning_rates: Annotated[
        list[str] | None, typer.Option(metavar="A,B,...", help="Of recovery: try each on the first seed, take the best for the others.")
    ] = None,
    scratch_tokens: Annotated[int | None, typer.Option(help="What from-scratch may spend, in the place of --tokens.")] = None,
    cuts_only: Annotated[bool, typer.Option("--cuts-only", help="Recover nothing: what a cut costs by itself.")] = False,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Methods side by side: one source, as many parameters, the same text, tokens in all and recovery. Run again, it goes on."""
    from shearling.compare import TABLE_FILE
    from shearling.compare import compare as function

    more: dict[str, Any] = {"seeds": seeds, "tokens": tokens, "scratch_tokens": scratch_tokens, "cuts_only": cuts_only}
    more["overrides"] = overrides or ()
    found = function(recipe, out, _listed(methods), learning_rates=_rates(learning_rates or ()), show=Terminal(), **more)
    typer.echo(json.dumps(found, indent=1) if as_json else (out / TABLE_FILE).read_text())


@app.command()
def plan(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A Hugging Face directory, hub id, GGUF file or config.json.")],
    target: Annotated[str, typer.Option(metavar="FIELD=SIZE,...", help="The shape asked for, by config field.")] = "",
    recipe: Annotated[Path | None, typer.Option(metavar="RECIPE.yaml", help="Take target, tokens, memory and disk from a recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a target means before any compute: feasible or why not, parameters, what is pruned, tokens, memory and disk."""
    from shearling.planning import describe_text

    found = api.plan(source, _sizes(target) if target else None, recipe=recipe)
    typer.echo(json.dumps(found, indent=1) if as_json else describe_text(found))
    if not found["feasible"]:
        raise typer.Exit(2)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, hub id or GGUF file.")],
    data: Annotated[str | None, typer.Option(metavar="DIR", help="What prepare made, or the URL of it, or a run directory.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of one forward pass.", min=1)] = 8,
    speed: Annotated[bool, typer.Option(help="Measure tokens/s, too.")] = True,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    attend: Annotated[
        str | None, typer.Option(help="What a token attends to: sequence or document; left out, as the run directory's recipe says.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,NAME,...", help="Zero-shot tasks of lm-evaluation-harness.")] = None,
    task_data: Annotated[Path | None, typer.Option(metavar="DIR", help="The tasks' documents; left out, from the hub.")] = None,
    task_limit: Annotated[int | None, typer.Option(metavar="N", help="Documents of each task; left out, all.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Keep each task when it is done; run again, it goes on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out loss by domain, speed, and zero-shot tasks, of any model."""
    how: dict[str, Any] = {"batch_size": batch_size, "speed": speed, "precision": precision, "device": device, "attend": attend}
    how |= {"tasks": tasks, "task_data": task_data, "task_limit": task_limit, "out": out}
    found = api.evaluate(model, data, **how, show=Terminal())
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo(f"{found['name']}: {found['parameters']:,} parameters")
    for domain, loss in found.get("loss", {}).items():
        error = found["loss_error"][domain]
        typer.echo(f"  {domain:20s} {loss:.4f}{'' if error is None else f' ± {error:.4f}'} nats/token")
    for kind, rate in found.get("speed", {}).items():
        typer.echo(f"  {kind:20s} {rate:,.1f} tokens/s")
    if "tasks" in found:
        from shearling.measure import describe_task

        for task, result in found["tasks"].items():
            typer.echo(f"  {task:20s} {describe_task(result)}")


@data_app.command("inspect")
def inspect_data(
    data: Annotated[str, typer.Argument(metavar="DIR", help="A run directory, a folder of prepared text, or the URL of one.")],
    sequence: Annotated[
        str | None, typer.Option("--show", metavar="DOMAIN:N", help="Decode a sequence; DOMAIN/heldout:N for a held-out one. N from 0.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model whose tokenizer decodes it; left out, the source of the run.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """What prepared text has of each domain; what a sequence says; whether the shards are undamaged."""
    from shearling.texts import describe_sequence, describe_table

    found = api.inspect_data(data, sequence=sequence, tokenizer=tokenizer, verify=verify, show=Terminal())
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo(f"{found['place']}: sequences of {found['sequence_length']} tokens\n\n{describe_table(found['table'])}")
    for note in found["notes"]:
        typer.echo(f"\n{note}")
    if verify:
        typer.echo(f"\nall {found['verified']['shards']:,} shards ({found['verified']['bytes']:,} bytes) are what they should be")
    if sequence is not None:
        typer.echo(f"\n{describe_sequence(found['sequence'])}")


@app.command()
def pad(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model whose blocks differ in size.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the stock checkpoint.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a model whose blocks differ as a stock checkpoint that computes the same, padded with zeros."""
    found = api.pad(model, out, overwrite=overwrite)
    typer.echo(f"{found['before']:,} -> {found['after']:,} parameters ({found['ratio']:.2f} times): {out}")


@app.command()
def report(out: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, finished or not.")]) -> None:
    """Write report.json and report.html of a run directory again."""
    _finish(api.report(out), out)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The ways to choose what to keep, and the scores that they are made of."""
    found = api.methods()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for kind, entries in found.items():
        typer.echo(f"{kind}\n")
        for entry in entries:
            by = " · ".join(f"{axis}: {name}" for axis, name in entry["scores"].items()) if "scores" in entry else ", ".join(entry["axes"])
            typer.echo(f"  {entry['name']:24s}{entry['about']}\n{'':26s}{by}{'; ' if by else ''}{entry['paper']}")
        typer.echo("")


@app.command()
def reference(
    points: Annotated[Path, typer.Argument(metavar="POINTS.csv", help="Columns domain, parameters, loss; three sizes or more.")],
    parameters: Annotated[float, typer.Option(help="Parameters of the model whose losses are asked for.")],
    as_json: AsJson = False,
) -> None:
    """Reference losses by domain from a model family's: the power law of the paper, fitted per domain."""
    found = api.reference(points, parameters)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for domain, values in found.items():
        error = values["standard_error"]
        typer.echo(f"{domain}: {values['loss']:.4f} {'(interpolates: no error can be given)' if error is None else f'± {error:.4f}'}")


def main() -> None:
    """Entry point; turns every error of ours into its message and exit code, and a closed pipe into silence."""
    try:
        app()
    except ShearlingError as error:
        rank = launched_rank()
        if rank == 0 or not error.told:
            where = f" process {rank}:" if rank else ""
            text = f"[bold red]error:[/bold red]{where} {escape(str(error))}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _through(
    function: Callable[..., dict[str, Any]],
    recipe: Path,
    out: Path | None,
    overrides: list[str] | None,
    overwrite: bool,
    accept_changed: list[str] | None,
) -> dict[str, Any]:
    more = {"overwrite": overwrite, "accept_changed": accept_changed or ()}
    return function(recipe, out, overrides=overrides or (), show=Terminal(), **more)


def _finish(report: dict[str, Any], out: Path) -> None:
    if launched_rank():  # process 0 tells it
        return
    from shearling.report import summary_table

    console = Console()
    console.print(summary_table(report))
    for name in ("model", "pruned", "plan.json", "report.html", "report.json", "metrics.jsonl"):
        if (out / name).exists():
            console.print(f"{name + ':':15s}{escape(str(out / name))}", highlight=False, soft_wrap=True)


def _listed(texts: Sequence[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _rates(texts: Sequence[str]) -> list[float]:
    try:
        return [float(text) for text in _listed(texts)]
    except ValueError as error:
        problem = Problem("--learning-rates", str(error), "Write 1e-4,3e-4.")
        raise ConfigError("--learning-rates cannot be read", [problem]) from None


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _sizes(text: str) -> dict[str, Any]:
    """`hidden_size=432,num_hidden_layers=24` as a mapping; whatever is no number is left for the schema to refuse."""
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        field, equals, size = part.strip().partition("=")
        if not equals:
            raise ConfigError("--target cannot be read", [Problem("--target", repr(part), "Write FIELD=SIZE,FIELD=SIZE,...")])
        sizes[field.strip()] = int(size) if size.strip().isdecimal() else _share(size.strip())
    return sizes
