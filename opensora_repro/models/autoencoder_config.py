"""The sizes of Open-Sora 1.2's video autoencoder, under the names of its constructors. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TemporalVAEConfig:
    """The part that takes latents of frames and shortens them in time; defaults: as published."""

    in_out_channels: int = 4  # of the frames' latents
    latent_embed_dim: int = 4  # channels within, before and after the codes
    embed_dim: int = 4  # channels of the codes
    filters: int = 128  # channels, times each level's multiplier
    num_res_blocks: int = 4  # a level
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)  # whether time is halved between two levels
    num_groups: int = 32  # of GroupNorm
    activation_fn: str = "swish"  # SiLU's older name, the only one

    def __post_init__(self) -> None:
        """Raises ValueError for what no network can be built of."""
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries: expected "
                f"{len(self.channel_multipliers) - 1}, one fewer than channel_multipliers"
            )
        if self.activation_fn not in ("swish", "silu"):
            raise ValueError(f"activation_fn {self.activation_fn!r}: expected swish")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.filters * multiplier for multiplier in self.channel_multipliers)

    @property
    def stride(self) -> int:
        """Frames a latent."""
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class VideoAutoencoderConfig:
    """An image autoencoder, applied to each frame, and the temporal one over it; defaults: as published."""

    temporal: TemporalVAEConfig = TemporalVAEConfig()
    micro_frame_size: int | None = 17  # frames a chunk; chunks do not see each other; None: one chunk
    latent_scale: float = (
        0.18215  # of the image autoencoder's latents: Stable Diffusion's, though SDXL's own is another
    )
    shift: tuple[float, ...] = (-0.10, 0.34, 0.27, 0.98)  # codes are (z - shift) / scale, by channel
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)

    def chunks(self, num_frames: int) -> list[int]:
        """Frames of each chunk of a clip, in order."""
        size = self.micro_frame_size or num_frames
        return [min(size, num_frames - first) for first in range(0, num_frames, size)]

    def latent_frames(self, num_frames: int) -> int:
        """Latents of a clip of so many frames."""
        return sum(-(-frames // self.temporal.stride) for frames in self.chunks(num_frames))
