"""What a stage's process loads, loaded once by the server that the tests' processes are forked from."""

# ruff: noqa: F401
from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import av
import diffusers.models.autoencoders.autoencoder_kl
import ftfy
import pyarrow.parquet
import tomli_w
import torch.utils.tensorboard
import wcwidth
from transformers.models.t5.modeling_t5 import T5EncoderModel

import benchmarks.everywhere
import opensora_repro.parallel.colossal
import opensora_repro.training.dry_run
import opensora_repro.training.run
import stages.sample
import tests.sequence_world
from tests.tiny_models import make_tiny_text

with contextlib.suppress(ImportError):  # of torch before 2.6
    import opensora_repro.parallel.fsdp

with tempfile.TemporaryDirectory() as folder:  # the first model of a process makes transformers' own tables
    make_tiny_text(Path(folder) / "text")
    T5EncoderModel.from_pretrained(Path(folder) / "text")
