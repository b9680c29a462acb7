"""`glm5 compare`: what the number formats of chips do to a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foundation.errors import UsageError


def compare(
    profile: Annotated[
        str,
        typer.Option(help="Accelerators, comma-separated: PROFILE[:FORMATS[:CACHE]], as in ascend-910c:w4a8:int8."),
    ],
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Hugging Face checkpoint directory [default: the embedded tiny model].")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="Formats for profiles that name none [default: the profile's own].")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text to read [default: prose; for the embedded model, its own kind]."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line, to continue greedily.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of text read at once: the longest context.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens a prompt is continued by.")] = 32,
    tasks: Annotated[
        int, typer.Option(min=0, help="Ask this many questions of each task of `glm5 eval`, harder ones too.")
    ] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page to open in a browser.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a model in the number formats of accelerators with itself in float32: logits, tokens, experts chosen."""
    from foundation.writing import replacing, require_writable
    from runtime.porting import compare as runs

    parts = [part.strip() for part in profile.split(",") if part.strip()]
    targets = [runs.Compared.parse(part, formats) for part in parts]
    if not targets:
        raise UsageError("--profile names no accelerator; `glm5 profiles list` lists them")
    if formats is not None and all(":" in part for part in parts):
        raise UsageError(f"--formats {formats}: every profile names formats of its own; leave out one of the two")
    if html is not None:
        require_writable(html)

    from model.tokenizer import Tokenizer
    from runtime.cli.opening import opened_checkpoint

    opened = opened_checkpoint(checkpoint)
    tokenizer = Tokenizer.load(opened.path)
    texts = runs.read_texts(opened, tokenizer, text, prompts, window, max_tokens)
    result = runs.compare(opened, targets, texts, tokenizer, max_tokens, tasks, _progress(as_json))
    if html is not None:
        from runtime.reports.compare import page

        with replacing(html) as temporary:
            temporary.write_text(page(result), encoding="utf-8")
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _print(result)
    if html is not None:
        print(f"Page: {html}")


def _progress(quiet: bool) -> Any:
    """A line on stderr for every run, whoever reads; with --json only for a person who waits."""
    if quiet and not sys.stderr.isatty():
        return lambda line: None
    return lambda line: print(f"running {line}", file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from runtime.cli.terminal import Terminal
    from runtime.reports.compare import foreign_text

    reference = result["reference"]
    console = Terminal()
    if warning := foreign_text(result):
        console.print(f"[bold red]warning[/]: {warning}", highlight=False)
    console.print(
        f"{result['model']}: {result['text_tokens']} tokens of {result['text']}, perplexity in float32: "
        f"{reference['perplexity']:.3f}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = ("profile", "formats", "cache", "logit error", "KL (nats)", "same token", "perplexity", "experts",
                "selection", "first other token")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right", no_wrap=True)
    for row in result["profiles"]:
        firsts = [first["at"] for first in row["first_difference"] if first["at"] is not None]
        table.add_row(
            row["label"],
            row["formats"],
            row["cache"],
            f"{row['logit_error']:.2%}",
            f"{row['kl_nats']['mean']:.2e}",
            f"{row['top1_agreement']:.2%}",
            f"{row['perplexity']:.3f}",
            _mean(row, "routing"),
            _mean(row, "selection"),
            f"{min(firsts) + 1} of {result['continued_tokens']}" if firsts else "none",
        )
    console.print(table)
    for name in reference.get("tasks", {}):
        scores = ", ".join(f"{row['label']} {row['tasks'][name]:.0%}" for row in result["profiles"])
        console.print(f"task {name}: float32 {reference['tasks'][name]:.0%}, {scores}", highlight=False)


def _mean(row: dict[str, Any], key: str) -> str:
    values = [layer[key] for layer in row["layers"] if layer[key] is not None]
    return f"{sum(values) / len(values):.1%}" if values else "–"
