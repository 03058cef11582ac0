"""Memory of a training step, by part, for one process of any parallel layout.

The formulas follow the model's blocks line by line: which tensors autograd keeps, of which dtype, and what is alive
besides at the largest moments of the forward and the backward pass. Tests hold them against counts of real tensors.
Memory that a device's libraries take for themselves is not in here, see gpus.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opensora_repro.config import Config, ParallelConfig
from opensora_repro.config.sections import encodes_after_start
from opensora_repro.data.buckets import Bucket, as_one_size, largest_buckets
from opensora_repro.models.config import TrainedConfig, is_costly, targeted_layers
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.encoders import FrozenSizes, frozen_sizes, text_values
from opensora_repro.planning.flops import attended
from opensora_repro.planning.parameters import (
    adapter_parameters,
    block_weights,
    count_parameters,
    cut_parameters,
    input_weights,
    mlp_width,
    modulations,
    outside_weights,
    trained_parameters,
)
from opensora_repro.planning.sizes import Grid, Strides, latent_shape, token_grid

FLOAT = 4  # bytes: of weights, of the residual stream, of norms
HALF = 2
SHORT_FRAMES = 64  # as kernels/ops.py has it, which needs torch
CHUNK, STREAMED_CHUNKS = 2**24, 3  # moments in host memory come in such chunks, see parallel/offload.py
# Float32 tensors as large as the latents that the loss saves for its own backward pass, and how many are alive at its
# largest moment (both counted on a CPU)
IN_TRANSIT = 2  # blocks' inputs on the way to host memory, or the last ones, which stay
LOSS_LATENTS = {"iddpm": (14.5, 31.5), "flow": (1.0, 7.0)}


@dataclass(frozen=True)
class States:
    """Bytes of what a process keeps from step to step, and of the gradients."""

    weights: float
    gradients: float
    optimizer: float
    average: float


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch needs besides weights and gradients."""

    kept: float  # between forward and backward
    forward_peak: float
    backward_peak: float  # at its begin, when hardly any gradient exists
    backward_end: float  # in the first block, where all gradients but its own and the embedders' exist, less those
    workspace: float = 0.0  # the largest that an attention's backward pass takes for itself

    def peak_with(self, gradients: float, *, lasting: bool, freed: bool) -> float:
        """The largest moment, gradients included.

        `lasting` ones are there from the start; where they are `freed` one by one, hardly any ever exists.
        """
        if freed:
            return max(self.forward_peak, self.backward_peak)
        if lasting:
            return gradients + max(self.forward_peak, self.backward_peak)
        return max(self.forward_peak, self.backward_peak, gradients + max(self.backward_end, 0))


@dataclass(frozen=True)
class Memory:
    """Bytes by part; `peak` is less than the sum, as not all of them meet."""

    states: States
    activations: Activations
    encoders: float  # weights of autoencoder and text encoder
    encoding: float  # while frames are encoded, or decoded for samples
    peak: float


# ---------------------------------------------------------------------------------------------------------------------
# From step to step


def state_bytes(cfg: TrainedConfig, parameters: int, parallel: ParallelConfig, mesh: Mesh) -> States:
    """Weights, gradients, Adam's two moments and the average are float32, and spread as the plugin does.

    What is not trained has weights alone, which DDP and ZeRO leave whole.
    """
    idle = count_parameters(cfg) - trained_parameters(cfg)
    if parallel.plugin == "fsdp":
        share = FLOAT * (parameters - idle) / mesh.world_size
        return States(share + FLOAT * idle / mesh.world_size, share, 2 * share, share)
    own = parameters - cut_parameters(cfg) * (1 - 1 / mesh.tp_size)
    trained = own * (parameters - idle) / parameters if idle else own  # of tensor parallelism's cut, about
    sharers = 1 if parallel.plugin == "ddp" else mesh.world_size // mesh.tp_size
    gradients = trained / sharers if parallel.plugin == "zero2" else trained
    moments = FLOAT * trained / sharers
    return States(FLOAT * own, FLOAT * gradients, 2 * moments, moments)


def adapted_state_bytes(cfg: Config, parameters: int, mesh: Mesh) -> States:
    """With [lora]: frozen weights, whole on every process, of which a run in bfloat16 keeps blocks' matrices so.

    Adapters are float32 and spread as weights are.
    """
    adapters, plugin = FLOAT * adapter_parameters(cfg.model, cfg.lora), cfg.parallel.plugin
    blocks = cfg.model.depth * sum(block_weights(cfg.model, spans) for spans in cfg.model.block_spans)
    frozen = FLOAT * parameters - (FLOAT - HALF) * blocks * (cfg.train.dtype == "bf16")
    share = adapters / mesh.world_size
    own = share if plugin == "fsdp" else adapters
    moments = adapters if plugin == "ddp" else share
    gradients = share if plugin in ("fsdp", "zero2") else adapters
    return States(frozen + own, gradients, 2 * moments, moments)


def gathered_bytes(cfg: TrainedConfig, dtype: str) -> float:
    """What FSDP has of weights and gradients that are whole for a while.

    A block that runs again in the backward pass, its largest part as that arrives, and of the part after it the
    gradients as they are and as they are exchanged, in float32.
    """
    size = HALF if dtype == "bf16" else FLOAT
    part = 2 * cfg.hidden_size * mlp_width(cfg)
    block = max(block_weights(cfg, spans) for spans in cfg.block_spans)
    return float(size * block + (size + size + FLOAT) * part)


# ---------------------------------------------------------------------------------------------------------------------
# A micro-batch


def activation_bytes(
    cfg: TrainedConfig,
    grid: Grid,
    batch_size: int,
    *,
    dtype: str,
    checkpointing: str,
    offload: bool = False,
    objective: str = "iddpm",
    tp_size: int = 1,
    sp_size: int = 1,
    device: str = "cuda",
    fused: bool = False,
    half_weights: bool = False,
) -> Activations:
    """`grid` is a whole sample's. `half_weights`: the weights come in bfloat16 (FSDP), are not cast to it.

    `offload`: what checkpointing keeps of blocks' inputs lies elsewhere. `device` matters for one rule of autocast
    without `fused` kernels: CUDA widens what is added to the float32 stream before it is saved.
    """
    tokens = batch_size * -(-grid.frames // sp_size) * grid.places
    half = dtype == "bf16"
    blocks = [
        _Block(
            cfg,
            spans,
            batch_size,
            tokens,
            tp_size,
            loss_latents=LOSS_LATENTS[objective],
            compute=HALF if half else FLOAT,
            gated=HALF if half and (fused or device == "cpu") else FLOAT,
            copies=half and not half_weights,
            fused=fused,
            attentions=tuple(_attentions(cfg, spans, grid, batch_size, sp_size, in_place=fused)),
            pads=half and device == "cuda",
        )
        for spans in cfg.block_spans
    ]
    if checkpointing == "none":
        found = _without_checkpointing(blocks)
    else:
        found = _with_checkpointing(blocks, selective=checkpointing == "selective", offload=offload)
    workspace = max(block.workspace(each) for block in blocks for each in block.attentions)
    return dataclasses.replace(found, workspace=workspace)


@dataclass(frozen=True)
class _Attention:
    """Sequences of queries on this process, their length, and how many keys each query sees."""

    sequences: int
    length: int
    seen: int
    in_place: bool = False  # one kernel that needs no memory of its own, see kernels/fused/attention.py


def _attentions(
    cfg: TrainedConfig, spans: Sequence[str], grid: Grid, batch_size: int, sp_size: int, *, in_place: bool
) -> Iterator[_Attention]:
    """The last one first, as the backward pass goes. `in_place`: whether short videos have a kernel of their own."""
    frames, places = -(-grid.frames // sp_size), -(-grid.places // sp_size)
    *own, captions = attended(cfg, grid, spans)
    yield _Attention(batch_size, frames * grid.places, captions)
    for span, seen in reversed(list(zip(spans, own, strict=True))):
        if span == "time":
            yield _Attention(batch_size * places, grid.frames, seen, in_place and grid.frames <= SHORT_FRAMES)
        elif span == "space":
            yield _Attention(batch_size * frames, grid.places, seen)
        else:
            yield _Attention(batch_size, frames * grid.places, seen)


@dataclass(frozen=True)
class _Block:
    """Bytes within one block, and of the layers before and after all blocks."""

    cfg: TrainedConfig
    spans: tuple[str, ...]  # of the block's self-attentions
    batch_size: int
    tokens: int  # of the micro-batch, on this process
    tp_size: int
    loss_latents: tuple[float, float]
    compute: int  # bytes of a value that matrices multiply
    gated: int  # of a branch's output, kept for its gate's gradient
    copies: bool  # autocast's bfloat16 copies of the weights
    fused: bool  # kernels
    attentions: tuple[_Attention, ...]  # of one block, the last one first
    pads: bool  # attention is flash attention, which pads sequences and heads in its backward pass

    @property
    def stream(self) -> float:
        """The residual stream, [tokens, hidden_size] in float32."""
        return float(FLOAT * self.tokens * self.cfg.hidden_size)

    def values(self, count: float) -> float:
        """`count` tensors of [tokens, hidden_size] that matrices multiply."""
        return count * self.compute * self.tokens * self.cfg.hidden_size

    @property
    def widening(self) -> float:
        """Width of the MLP over the model's, on this process."""
        return mlp_width(self.cfg) / self.cfg.hidden_size / self.tp_size

    @property
    def kept(self) -> float:
        """What one block keeps for its backward pass.

        Spatial: input, its norm, the modulated norm, queries, keys and values, their result, the projection. Temporal:
        the reordered input, then as before. Cross: input, queries, result. MLP: as spatial, with two wide tensors.
        Fused kernels compute norms again from their inputs.
        """
        attentions = len(self.spans)
        whole = attentions + 2  # what enters the matrices of each branch
        cut = attentions * 4 + 2
        gated = (attentions + 1) * self.gated * self.tokens * self.cfg.hidden_size
        turned = sum(map(self._turned, self.spans)) / self.tp_size
        wide = self.values(2 * self.widening)
        norms = (modulations(self.cfg) // 3 if attentions > 1 else 2) * (1 if self.fused else 2)
        streams = norms * self.stream
        return streams + self.values(whole + cut / self.tp_size) + turned + gated + wide + self._small + self.weights

    def _turned(self, span: str) -> float:
        """What norm and rotary positions add to one self-attention: new queries and keys, and a copy of the result.

        The norm keeps what it reads in float32, unless that was kept anyway, and what it gives before its gain.
        """
        cfg, rotates = self.cfg, self.cfg.rotary and span == "time"
        if not (cfg.qk_norm or rotates):
            return 0.0
        reads = 2 if self.compute == HALF or (rotates and cfg.qk_norm_legacy) else 0
        return self.values(3) + (cfg.qk_norm and (2 + reads) * self.stream)

    @property
    def costly(self) -> float:
        """Of these, what selective checkpointing keeps, see models/recompute.py: the MLP's result, long attentions."""
        cfg = self.cfg
        longest = sum(is_costly(2 * each.seen, cfg.hidden_size) for each in self.attentions if not each.in_place)
        log_sums = FLOAT * self.tokens * cfg.num_heads
        last = is_costly(mlp_width(cfg) // self.tp_size, cfg.hidden_size)
        return self.values(last) + longest * (self.values(1) + log_sums) / self.tp_size

    @property
    def _small(self) -> float:
        """Statistics of two norms, the attentions' log-sums, the caption's keys and values, modulation vectors."""
        cfg = self.cfg
        log_sums = sum(not each.in_place for each in self.attentions) * cfg.num_heads / self.tp_size
        caption = self.batch_size * cfg.model_max_length * 3 * cfg.hidden_size / self.tp_size
        vectors = 8 * self.batch_size * cfg.hidden_size
        return FLOAT * (self.tokens * (4 + log_sums) + vectors) + self.compute * caption

    @property
    def weights(self) -> float:
        """Autocast's copies of one block's matrices, kept for the inputs' gradients."""
        return HALF * block_weights(self.cfg, self.spans) / self.tp_size if self.copies else 0.0

    @property
    def latents(self) -> int:
        """Values of the micro-batch's latents."""
        return self.tokens * math.prod(self.cfg.patch_size) * self.cfg.in_channels

    @property
    def ends(self) -> float:
        """Kept outside the blocks: patches, the caption's layers, the final norm, its input and output."""
        cfg = self.cfg
        caption = self.batch_size * cfg.model_max_length * (cfg.caption_channels + 3 * cfg.hidden_size)
        vectors = 10 * self.batch_size * cfg.hidden_size  # the timestep's, the modulation
        # Where positions turn, conditions are computed in float32: captions and the final layer alone are rounded.
        last = math.prod(cfg.patch_size) * cfg.out_channels
        rounded = cfg.hidden_size * (cfg.hidden_size + last)
        if not cfg.rotary:
            rounded = outside_weights(cfg) - input_weights(cfg)
        copies = HALF * rounded if self.copies else 0
        return self.compute * (self.latents + caption + vectors) + self.final + copies

    @property
    def loss(self) -> float:
        return FLOAT * self.loss_latents[0] * self.latents

    @property
    def loss_peak(self) -> float:
        return FLOAT * self.loss_latents[1] * self.latents

    @property
    def final(self) -> float:
        """Of these, what the final layer keeps; it is gone when the last block's backward pass begins."""
        return (1 if self.fused else 2) * self.stream + self.values(1) + 2 * FLOAT * self.tokens

    @property
    def last_gradients(self) -> float:
        """The gradients that come last: a block's and the embedders'."""
        return FLOAT * (block_weights(self.cfg, self.spans) / self.tp_size + outside_weights(self.cfg))

    @property
    def backward_extra(self) -> float:
        """Alive besides while one block's backward pass runs, less what it has freed by then.

        In the MLP: the stream's gradient, the output's, the wide tensor's; or before, at the gate: three of the stream;
        or in an attention.
        """
        freed = self.gated * self.tokens * self.cfg.hidden_size
        in_mlp = self.stream + self.values(1 + self.widening) - freed
        return max(in_mlp, 3 * self.stream, *self._in_attentions())

    def _in_attentions(self) -> Iterator[float]:
        """Alive besides in each attention's backward pass, less what is freed by then.

        The stream's gradient, the output's, those of queries, keys and values, and a workspace.
        """
        stream_parts = (1 if self.fused else 2) * self.stream
        gated = self.gated * self.tokens * self.cfg.hidden_size
        freed = stream_parts + self.values(1 + 2 * self.widening) + gated  # of the MLP
        for number, each in enumerate(self.attentions):
            own = 2 if number == 0 else 4  # values that it keeps, captions' apart
            freed += gated if number else 0
            yield self.stream + self.values(own / self.tp_size) + self.workspace(each) - freed
            freed += self.values(1 + own / self.tp_size)

    def workspace(self, attention: _Attention) -> float:
        """Flash attention adds the queries' gradients up in float32, and has a number a query besides.

        It does so for sequences padded to 128 and heads padded to 32.
        """
        if not self.pads or attention.in_place:
            return 0.0
        cfg = self.cfg
        queries = attention.sequences * _round_up(attention.length, 128)
        size = _round_up(cfg.hidden_size // cfg.num_heads, 32)
        return FLOAT * queries * cfg.num_heads / self.tp_size * (size + 1)

    @property
    def final_extra(self) -> float:
        """Alive besides in the final layer's backward pass: gradients of the norm, its scale and shift."""
        return 4 * self.stream - self.values(1)


def _without_checkpointing(blocks: Sequence[_Block]) -> Activations:
    first, last = blocks[0], blocks[-1]
    kept = first.cfg.depth * sum(block.kept for block in blocks) + first.ends
    begin = max(kept + last.final_extra, kept - last.final + last.backward_extra)
    end = first.ends - first.final + first.kept + first.backward_extra - first.last_gradients
    return Activations(kept + first.loss, kept + first.loss_peak, begin, end)


def _with_checkpointing(blocks: Sequence[_Block], *, selective: bool, offload: bool) -> Activations:
    """A block keeps its input and what is costly, and runs again when its gradients are due."""
    first, last = blocks[0], blocks[-1]
    depth = first.cfg.depth
    costly = sum(block.costly for block in blocks) if selective else 0.0
    inputs = depth * len(blocks)
    inputs = min(inputs, IN_TRANSIT) if offload else inputs
    kept = inputs * first.stream + depth * costly + first.ends
    # Autocast forgets its copies at the end of the forward pass; until then there is one of every matrix.
    copies = sum(block.weights for block in blocks)
    in_forward = inputs * first.stream + depth * (costly + copies) + first.ends - first.final
    in_forward += first.stream + first.values(1 + 2 * first.widening)  # in the last block's MLP
    again = last.kept - last.stream + last.backward_extra
    begin = max(kept + last.final_extra, kept - last.final + again - (last.costly if selective else 0.0))
    again = first.kept - first.stream + first.backward_extra
    end = first.ends - first.final + first.stream + again - first.last_gradients
    return Activations(kept + first.loss, max(in_forward, kept + first.loss_peak), begin, end)


def with_adapters(found: Activations, cfg: Config, tokens: int) -> Activations:
    """What adapters keep: a narrow product each, and their share of the block's widest result while they are added.

    Their gradients are few, so the backward pass ends no lower than it goes.
    """
    model, half = cfg.model, HALF if cfg.train.dtype == "bf16" else FLOAT
    blocks = [targeted_layers(model, cfg.lora.targets, spans) for spans in model.block_spans]
    narrow: float = half * tokens * cfg.lora.rank * max(map(len, blocks))
    widest = max((out for block in blocks for _, out in block.values()), default=0)
    beside = 2 * half * tokens * widest  # the adapter's result, and the sum
    # As much as x has channels for each layer whose input is dropped from: the mask, and what is left
    dropped = sum(2 * inside for block in blocks for inside, _ in block.values()) / len(blocks)
    narrow += half * tokens * dropped * (cfg.lora.dropout > 0)
    kept = found.kept + narrow * (model.depth * len(blocks) if cfg.train.activation_checkpointing == "none" else 0)
    more = kept - found.kept if kept > found.kept else narrow
    return dataclasses.replace(
        found,
        kept=kept,
        forward_peak=found.forward_peak + more + beside,
        backward_peak=found.backward_peak + more + beside,
        backward_end=found.backward_peak + more + beside,
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------------
# Together


def step_memory(
    cfg: Config,
    grid: Grid,
    parameters: int,
    frozen: FrozenSizes,
    mesh: Mesh,
    *,
    encodes: bool,
    device: str = "cuda",
) -> Memory:
    """Of one process. `encodes`: autoencoder and text encoder stay loaded while the model trains."""
    parallel, train, row = cfg.parallel, cfg.train, cfg.data.packing_tokens
    samples = min(train.batch_size, -(-row // grid.tokens)) if row else train.batch_size  # that a row has, at most
    sharded = parallel.plugin == "fsdp" and mesh.world_size > 1
    states = state_bytes(cfg.model, parameters, parallel, mesh)
    if cfg.lora.rank:
        states = adapted_state_bytes(cfg, parameters, mesh)
    moments = states.optimizer
    if cfg.optim.offload:  # they and the average lie in host memory
        states = dataclasses.replace(states, optimizer=0.0, average=0.0)
    activations = activation_bytes(
        cfg.model,
        grid,
        samples,
        dtype=train.dtype,
        checkpointing=train.activation_checkpointing,
        offload=train.offload_activations,
        objective=cfg.diffusion.objective,
        tp_size=mesh.tp_size,
        sp_size=mesh.sp_size,
        device=device,
        fused=device == "cuda" and train.kernels != "eager",
        half_weights=sharded or (cfg.lora.rank > 0 and train.dtype == "bf16"),
    )
    if cfg.lora.rank:
        activations = with_adapters(activations, cfg, samples * grid.tokens)
    size = HALF if cfg.train.dtype == "bf16" and device == "cuda" else FLOAT
    encoders = encoding = beside = 0.0
    if encodes:
        encoders = float(size * (frozen.vae_parameters + text_values(cfg.text, frozen, mesh.world_size)))
        encoded = frozen.encoding_values if device == "cuda" else frozen.encoding_values_alone
        encoding = float(size * (max(encoded, frozen.decoding_values) if cfg.sample.every else encoded))
        between = device != "cuda" or (cfg.text.shard and mesh.world_size > 1)  # its steps, not beside them
        if cfg.train.overlap and not cfg.data.cache and not between:
            beside = float(size * encoded)
    # Other processes' sums, a second micro-batch or row, need gradients that stay.
    lasting = mesh.world_size > 1 or cfg.train.accumulation > 1 or row > 0
    stepping = activations.peak_with(states.gradients, lasting=lasting, freed=cfg.optim.in_backward) + beside
    if sharded:
        stepping += gathered_bytes(cfg.model, train.dtype)
    # While averaged weights are in their place, for samples and validation, the trained ones wait beside.
    evaluates = cfg.sample.every > 0 or cfg.validation.every > 0
    aside = states.weights if evaluates and not cfg.optim.offload else 0.0
    if sharded and evaluates:  # with whole weights
        aside += FLOAT * parameters
    working = max(stepping, encoding + max(lasting * states.gradients, aside))
    if cfg.optim.offload:
        parts = STREAMED_CHUNKS if device == "cuda" else 1
        working = max(working, states.gradients + min(moments, parts * 2 * FLOAT * CHUNK))
    peak = states.weights + states.optimizer + states.average + encoders + working
    return Memory(states, activations, encoders, encoding, peak)


class Size(NamedTuple):
    """A bucket with what follows from its size alone."""

    bucket: Bucket
    grid: Grid
    frozen: FrozenSizes


def largest_sizes(cfg: Config, strides: Strides | None = None) -> list[Size]:
    """`strides` as of `latent_shape`. Raises ConfigError."""
    ones = [(bucket, as_one_size(cfg, bucket)) for bucket in largest_buckets(cfg)]
    return [Size(bucket, token_grid(one.model, latent_shape(one, strides)), frozen_sizes(one)) for bucket, one in ones]


def needed_memory(cfg: Config, mesh: Mesh, device_type: str, sizes: Sequence[Size] = ()) -> Memory:
    """Of one process of a run, in the steps that need the most; `sizes` where they are known. Raises ConfigError."""
    if device_type == "cpu":  # where what is offloaded lies in the same memory
        optim, text = dataclasses.replace(cfg.optim, offload=False), dataclasses.replace(cfg.text, offload=False)
        cfg = dataclasses.replace(cfg, optim=optim, text=text)
    parameters, encodes = count_parameters(cfg.model), encodes_after_start(cfg)
    found = (
        step_memory(as_one_size(cfg, bucket), grid, parameters, frozen, mesh, encodes=encodes, device=device_type)
        for bucket, grid, frozen in sizes or largest_sizes(cfg)
    )
    return max(found, key=lambda memory: memory.peak)
