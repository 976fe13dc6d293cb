"""Renders a model card from the figures in `training.json`; states nothing that is not in there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FRONT_MATTER = """---
license: other
license_name: psf-2.0
license_link: ../LICENSE-PSF.txt
library_name: transformers
pipeline_tag: text-generation
tags: [demo, python, tiny]
---
"""


def render_card(record: Mapping[str, Any]) -> str:
    """The README of one demo model."""
    sections = (
        FRONT_MATTER.rstrip(),
        _introduction(record),
        _figures(record),
        _evaluation(record["evaluation"]),
        _data(record["data"]),
        _reproduction(record),
        _samples(record["samples"]),
    )
    return "\n\n".join(sections) + "\n"


def _introduction(record: Mapping[str, Any]) -> str:
    model = record["model"]
    return (
        f"# {record['name']}\n\n"
        f"A {model['parameters'] / 1e6:.2f} M parameter `{model['architecture']}` trained from "
        "scratch on the Python standard library, small enough to live in a repository and to serve "
        "from a laptop. It exists to exercise a serving engine with real weights: it writes "
        "Python-like text, it does not write correct programs, and it knows nothing else."
    )


def _figures(record: Mapping[str, Any]) -> str:
    model, run = record["model"], record["run"]
    recipe = run["recipe"]
    score = record["evaluation"]["held_out_split"]
    rows = [
        ("held-out bits per byte (whole held-out split)", f"{score['bits_per_byte']:.4f}"),
        ("parameters", f"{model['parameters']:,}"),
        ("parameters active per token", f"{model['active_parameters']:,}"),
        ("training steps", f"{run['steps']:,}"),
        ("steps that decay the rate", _decays(run["cycles"])),
        ("tokens seen", f"{run['tokens_seen']:,}"),
        ("tokens per step", f"{recipe['batch_tokens']:,}"),
        ("training windows", _mixture(recipe)),
        ("peak learning rate", f"{recipe['peak_learning_rate']} (AdamW)"),
        ("wall time", f"{run['wall_seconds'] / 60:.1f} min"),
        ("machine", run["machine"]),
        ("versions", f"torch {run['torch']}, transformers {run['transformers']}"),
    ]
    rows += [(f"`{name}`", f"{value}") for name, value in model["config"].items()]
    return _table(("figure", "value"), rows)


def _decays(cycles: Sequence[Mapping[str, int]]) -> str:
    return ", then ".join(
        f"{cycle['steps'] - cycle['decay_steps']:,} to {cycle['steps']:,}" for cycle in cycles
    )


def _mixture(recipe: Mapping[str, Any]) -> str:
    pairs = zip(recipe["lengths"], recipe["length_shares"], strict=True)
    return ", ".join(f"{share:.0%} of {length}" for length, share in pairs) + " tokens"


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    protocol = evaluation["protocol"]
    names = {
        protocol["file"]: f"`{protocol['file']}`",
        "prefix": f"`{protocol['file']}`, first windows",
        "held_out_split": "all held-out files",
    }
    rows = [
        (
            shown,
            f"{evaluation[name]['bits_per_byte']:.5f}",
            f"{evaluation[name]['bytes']:,}",
            f"{evaluation[name]['tokens']:,}",
            f"{evaluation[name]['windows']:,}",
        )
        for name, shown in names.items()
    ]
    text = (
        f"## Evaluation\n\n{protocol['rule']} Here `window_tokens` is {protocol['window_tokens']} "
        f"and `start_token_id` is {protocol['start_token_id']}; {protocol['arithmetic']}. "
        "`bits_per_byte.py` is this rule as code, for any engine.\n\n"
        + _table(("text", "bits per byte", "bytes", "tokens", "windows"), rows)
    )
    load = evaluation["expert_load"]
    if not load:
        return text
    spread = "; ".join(
        f"layer {layer}: {min(shares):.3f} to {max(shares):.3f}"
        for layer, shares in enumerate(load)
    )
    return f"{text}\n\nShare of routed tokens per expert on that text: {spread}."


def _data(data: Mapping[str, Any]) -> str:
    return (
        "## Data and licence\n\n"
        f"{data['source']} of Python {data['python_version']}, split by file: "
        f"{data['train_files']} files ({data['train_bytes']:,} bytes) to train on, "
        f"{len(data['held_out_files'])} files ({data['held_out_bytes']:,} bytes) held out. "
        f"{data['chat_documents']:,} conversations, derived from documented functions and classes "
        f"of the train files, make up {data['chat_tokens'] / data['train_tokens']:.0%} of the "
        f"{data['train_tokens']:,} training tokens. File texts are tokenised in random "
        "pieces, so that a prompt may end anywhere. Corpus SHA-256: "
        f"`{data['corpus_sha256']}`.\n\n"
        "The sources and `heldout.txt` are under the Python Software Foundation licence, kept in "
        "`../LICENSE-PSF.txt`; the weights are derived from them."
    )


def _reproduction(record: Mapping[str, Any]) -> str:
    run = record["run"]
    kind = record["name"].removeprefix("demo-")
    commands = "\n".join(
        f"python -m examples.models.train train --model {kind} --work /tmp/demo-{kind} \\\n"
        f"    --steps {cycle['steps']} --decay-steps {cycle['decay_steps']}"
        for cycle in run["cycles"]
    )
    return (
        "## Reproduce\n\n"
        "The run was bounded by wall time, so its step count depends on the machine. Given the "
        "recorded steps it repeats, cycle by cycle: weights, batches and learning rates depend "
        "on seed and step alone (rounding may still differ between processors).\n\n"
        f"```sh\n{commands}\n```"
    )


def _samples(samples: list[Mapping[str, Any]]) -> str:
    parts = ["## Samples\n\nUp to 128 new tokens, seeded; the prompt is part of the text shown."]
    for sample in samples:
        how = f"temperature {sample['temperature']}" if sample["temperature"] else "greedy"
        if sample["kind"] == "chat":
            title, text = f"Chat, {how}: {sample['prompt']}", sample["completion"]
        else:
            title, text = f"Completion, {how}", sample["prompt"] + sample["completion"]
        parts.append(f"{title}\n\n````text\n{text.rstrip()}\n````")
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
