"""Captions that an endpoint writes: of clips, and of short captions detailed ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from opensora_repro.data.caption.chat import Endpoint
from opensora_repro.data.caption.completions import Prices, Prompt, complete_all
from opensora_repro.data.caption.endpoints import Endpoints
from opensora_repro.data.caption.options import AskedArguments
from opensora_repro.data.caption.questions import (
    DESCRIBE,
    INSTRUCTION,
    METHOD,
    REWRITE,
    about_clip,
    about_text,
    clip_keys,
)
from opensora_repro.data.caption.text import REJECTED, Caption, judge
from opensora_repro.data.jobs.course import Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner
from opensora_repro.errors import DataError
from opensora_repro.files import digest

REWRITE_METHOD = 1  # raise when the same caption would be asked about otherwise
OURS = ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed", "stream")
ANSWERS = ("captions", "rewrites")  # kinds of records of what an endpoint has answered
ENDPOINT_FRAMES = 8
Record = dict[str, Any]


def endpoint_of(urls: Sequence[str], model: str, args: AskedArguments) -> Endpoint | Endpoints:
    """Raises DataError."""
    how: Record = {"key_env": args.api_key_env, "max_tokens": args.max_tokens, "timeout": args.timeout}
    fields = fields_of(args)
    found = [Endpoint(url, model, retries=args.retries, fields=fields, **how) for url in dict.fromkeys(urls)]
    return found[0] if len(found) == 1 else Endpoints(found, args.concurrency)


def fields_of(args: AskedArguments) -> Record:
    """Return what a question has beside the model, the messages and the limit. Raises DataError."""

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is none of its numbers")

    try:
        fields = json.loads(args.extra_body or "{}", parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--extra-body: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError('--extra-body: expected a JSON object, such as {"top_k": 20}')
    if taken := sorted(set(OURS) & set(fields)):
        raise DataError(f"--extra-body: {taken[0]} is not among what it can set; --help lists the options that are")
    given = {"temperature": args.temperature, "seed": args.seed}
    return fields | {name: value for name, value in given.items() if value is not None}


def from_endpoint(
    rows: Sequence[Record], args: AskedArguments, endpoint: Endpoint | Endpoints, records: Records, runner: Runner
) -> list[Caption]:
    """Return every clip's caption as the endpoint writes it."""
    whole = args.send == "video"
    usual = f"This is a video clip. {DESCRIBE}" if whole else INSTRUCTION
    instruction = usual if args.instruction is None else args.instruction
    frames = 0 if whole else args.frames or ENDPOINT_FRAMES
    how = [METHOD, endpoint.model, instruction, frames, args.max_tokens, endpoint.fields]
    keeping = Keeping(records, ANSWERS[0])
    keys = clip_keys(rows, keeping, how, runner, lambda: how)
    prompts = {key: partial(about_clip, row, instruction, frames) for key, row in zip(keys, rows, strict=True)}
    found = answers(prompts, args, endpoint, keeping, "captioning")
    return [judge(found[key]) for key in keys]


def rewritten(
    captions: Sequence[Caption], args: AskedArguments, endpoint: Endpoint | Endpoints, records: Records
) -> list[Caption]:
    """Return the captions made detailed; what is no caption, and is not sent, as it is."""
    how: list[Any] = [REWRITE_METHOD, endpoint.model, REWRITE, args.max_tokens]
    how += [endpoint.fields] if endpoint.fields else []  # without any, the answers of earlier runs are still right
    keys = [digest([found.text, *how]) if found.text and not found.reason else None for found in captions]
    keys = [None if found.flag in REJECTED else key for key, found in zip(keys, captions, strict=True)]
    prompts = {key: partial(about_text, found.text) for key, found in zip(keys, captions, strict=True) if key}
    written = answers(prompts, args, endpoint, Keeping(records, ANSWERS[1]), "rewriting")
    detailed = [judge(written[key]) if key else short for key, short in zip(keys, captions, strict=True)]
    return [replace(d, reason=d.reason and f"rewriting: {d.reason}") if key else d
            for key, d in zip(keys, detailed, strict=True)]  # fmt: skip


def answers(
    prompts: Mapping[str, Callable[[], list[Record]]], args: AskedArguments, endpoint: Endpoint | Endpoints,
    keeping: Keeping, label: str,
) -> dict[str, Record]:  # fmt: skip
    questions = [Prompt(key, messages) for key, messages in prompts.items()]
    prices = Prices(args.price_in, args.price_out)
    concurrency = args.concurrency * (len(endpoint.servers) if isinstance(endpoint, Endpoints) else 1)
    return complete_all(questions, keeping, endpoint, concurrency=concurrency, label=label, prices=prices)
