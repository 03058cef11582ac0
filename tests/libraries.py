"""The heavy libraries that a command's process loads."""

# ruff: noqa: F401
from __future__ import annotations

import tempfile
from pathlib import Path

import av
import colossalai.booster.plugin
import cv2
import diffusers.models.autoencoders.autoencoder_kl
import ftfy
import pandas
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
import tomli_w
import torch.distributed.fsdp
import torch.utils.tensorboard
import wcwidth
from transformers.models.t5.modeling_t5 import T5EncoderModel

from tests.tiny_models import make_tiny_text

with tempfile.TemporaryDirectory() as folder:  # the first model of a process makes transformers' own tables
    make_tiny_text(Path(folder) / "text")
    T5EncoderModel.from_pretrained(Path(folder) / "text")
