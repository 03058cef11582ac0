"""Run configuration: typed sections, strict TOML, dotted overrides.

Defaults live here and nowhere else. A file or an override that names an unknown key is an error that names the closest
known one, so that a typing mistake never trains another recipe.
"""

from opensora_repro.config.autoencoder import (
    AutoencoderConfig,
    AutoencoderModelConfig,
    CaptionModelConfig,
    HeldOutConfig,
    MixtureConfig,
    ReconstructionConfig,
)
from opensora_repro.config.checks import check_config
from opensora_repro.config.sections import (
    BucketConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    FrameMasksConfig,
    InitConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
    VaeConfig,
    ValidationConfig,
)
from opensora_repro.config.toml import (
    config_dict,
    dump_toml,
    load_autoencoder_config,
    load_config,
    load_recorded,
    parse_config,
    read_toml,
    toml_value,
)

__all__ = [
    "AutoencoderConfig",
    "AutoencoderModelConfig",
    "BucketConfig",
    "CaptionModelConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "EmaConfig",
    "FrameMasksConfig",
    "HeldOutConfig",
    "InitConfig",
    "LoraConfig",
    "MixtureConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReconstructionConfig",
    "RunConfig",
    "SampleConfig",
    "TextConfig",
    "TrainConfig",
    "VaeConfig",
    "ValidationConfig",
    "check_config",
    "config_dict",
    "dump_toml",
    "load_autoencoder_config",
    "load_config",
    "load_recorded",
    "parse_config",
    "read_toml",
    "toml_value",
]
