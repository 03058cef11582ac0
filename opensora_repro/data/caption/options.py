"""How a model or an endpoint is asked: the options of it, declared and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora_repro.data.options import option
from opensora_repro.errors import DataError, check_least

ASKED, WITH_MODEL, WITH_ENDPOINT = "what a model or an endpoint is asked", "with --model", "with --endpoint"


@dataclass(frozen=True, kw_only=True)
class AskedArguments:
    """Options of every caption that a model or an endpoint writes."""

    instruction: str | None = option("what to write, in place of the built-in words", None, group=ASKED, metavar="TEXT")
    frames: int | None = option("frames of a clip (by the model; endpoints 8)", None, group=ASKED, metavar="N")
    max_tokens: int = option("longest answer (%(default)s)", 256, group=ASKED, metavar="N")

    device: str = option(
        "cuda: a GPU a worker; cuda:0, cpu: all share it (cuda where there is a GPU)", "", group=WITH_MODEL
    )
    dtype: str = option(
        "(bfloat16 on a GPU, float32 on a CPU)", "", group=WITH_MODEL, choices=("float32", "bfloat16", "float16")
    )
    batch_size: int | None = option(
        "clips a batch (8; on a GPU as many as its free memory has room for)", None, group=WITH_MODEL, metavar="N"
    )
    model_workers: int = option("copies of the model (%(default)s)", 1, group=WITH_MODEL, metavar="N")

    concurrency: int = option("questions at a time to each (%(default)s)", 8, group=WITH_ENDPOINT, metavar="N")
    retries: int = option("tries after the first (%(default)s)", 6, group=WITH_ENDPOINT, metavar="N")
    timeout: float = option("seconds for an answer (%(default)g)", 180.0, group=WITH_ENDPOINT, metavar="S")
    send: str | None = option(
        "pictures, or the clip's file (frames)", None, group=WITH_ENDPOINT, choices=("frames", "video")
    )
    temperature: float | None = option("of the answers (the server's own)", None, group=WITH_ENDPOINT, metavar="T")
    seed: int | None = option("of the answers, where the server knows seeds", None, group=WITH_ENDPOINT, metavar="N")
    extra_body: str | None = option(
        "more fields of each question, such as '{\"top_k\": 20}'", None, group=WITH_ENDPOINT, metavar="JSON"
    )
    api_key_env: str = option("variable with the API's key", "OPENAI_API_KEY", group=WITH_ENDPOINT, metavar="NAME")
    price_in: float = option("of a million tokens sent", 0.0, group=WITH_ENDPOINT, metavar="P")
    price_out: float = option("of a million tokens written", 0.0, group=WITH_ENDPOINT, metavar="P")


def check_asked(args: AskedArguments, *, endpoint: bool) -> None:
    """Raise UserError for options that do not go together; `endpoint`: there is one."""
    check_least(args, "frames", "max_tokens", "batch_size", "model_workers", "concurrency")
    check_least(args, "retries", "price_in", "price_out", least=0)
    for name in ("send", "temperature", "seed", "extra_body"):
        if getattr(args, name) is not None and not endpoint:
            raise DataError(f"--{name.replace('_', '-')}: only with --endpoint")
    check_least(args, "temperature", least=0)
    if args.send == "video" and args.frames:
        raise DataError("--frames: the server chooses them with --send video (vLLM's --extra-body can say how)")
    if not 0 < args.timeout < math.inf:
        raise DataError(f"--timeout {args.timeout}: expected a number of seconds")
