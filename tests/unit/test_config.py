"""The config loader: strict keys, strict types, dotted overrides, ranges, and a lossless dump."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opensora_repro.config import (
    Config,
    ConfigError,
    ParallelConfig,
    check_config,
    dump_toml,
    load_config,
    load_recorded,
)
from opensora_repro.files import here_or_shipped, shipped
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig

BASE = """
[model]
patch_size = [1, 2, 2]
hidden_size = 64
num_heads = 4
[optim]
lr = 1e-3
[train]
steps = 20
"""


def load(tmp_path: Path, text: str = BASE, *overrides: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def error(tmp_path: Path, text: str = BASE, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_file_over_defaults_and_overrides_over_file(tmp_path: Path) -> None:
    config = load(tmp_path, BASE, "train.steps=7", "optim.lr=3", "optim.betas=[0.5, 0.75]", "data.flip=false")
    assert (config.train.steps, config.optim.lr, config.optim.betas) == (7, 3.0, (0.5, 0.75))
    assert type(config.optim.lr) is float
    assert config.data.flip is False
    assert config.model.patch_size == (1, 2, 2)
    assert config.train.batch_size == Config().train.batch_size


def test_bare_text_is_a_string(tmp_path: Path) -> None:
    config = load(tmp_path, BASE, "init.weights=runs/stage1", "run.dir=2024-01-01", 'data.manifest="a b=c.parquet"')
    assert (config.init.weights, config.run.dir, config.data.manifest) == ("runs/stage1", "2024-01-01", "a b=c.parquet")
    assert load(tmp_path, BASE, "run.dir=12").run.dir == "12"
    assert load(tmp_path, BASE, 'sample.prompts=["a cat", "a dog"]').sample.prompts == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("text", "named", "closest"),
    [
        ("[train]\nstep = 3", "train.step", "train.steps"),
        ("[optim]\nlearning_rate = 3", "optim.learning_rate", "optim."),
        ("[train]\nlr = 3", "train.lr", "optim.lr"),
        ("[optimizer]\nlr = 3", "[optimizer]", "[optim]"),
        ("[modell]\ndepth = 3", "[modell]", "[model]"),
        ("steps = 3", "[steps]", "train.steps"),
    ],
)
def test_unknown_names_get_the_closest_known_one(tmp_path: Path, text: str, named: str, closest: str) -> None:
    message = error(tmp_path, text)
    assert named in message
    assert closest in message.split("did you mean")[1]


@pytest.mark.parametrize(
    ("override", "closest"),
    [("train.stpes=3", "train.steps"), ("trian.steps=3", "train.steps"), ("steps=3", "train.steps"), ("train", "")],
)
def test_unknown_override(tmp_path: Path, override: str, closest: str) -> None:
    message = error(tmp_path, BASE, override)
    assert override in message
    assert closest in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=abc", 'train.steps = "abc": expected an integer'),
        ("train.steps=1.5", "train.steps = 1.5: expected an integer"),
        ("train.steps=true", "train.steps = true: expected an integer"),
        ("data.flip=False", 'data.flip = "False": expected true or false'),
        ("data.flip=1", "data.flip = 1: expected true or false"),
        ("optim.lr=fast", 'optim.lr = "fast": expected a number'),
        ("optim.lr=nan", "optim.lr = nan: expected a finite number"),
        ("optim.betas=0.9", "optim.betas = 0.9: expected a list"),
        ("optim.betas=[0.9]", "optim.betas = [0.9]: expected a list of 2 values"),
        ("model.patch_size=[1, 2, 2.5]", "model.patch_size[2] = 2.5: expected an integer"),
        ("sample.prompts=[1]", "sample.prompts[0] = 1: expected a string"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error(tmp_path, BASE, override)
    section, assignment = override.split(".", 1)
    if not any(word in override for word in ("abc", "False", "fast")):
        assert expected in error(tmp_path, f"[{section}]\n{assignment}")


def test_wrong_type_in_file_and_section_that_is_none(tmp_path: Path) -> None:
    assert "run.dir = 3: expected a string" in error(tmp_path, "[run]\ndir = 3")
    assert "[train] must be a section" in error(tmp_path, "train = 3")
    assert "not valid TOML" in error(tmp_path, "[train\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "absent.toml", [])


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.batch_size=-1",
        "data.height=0",
        "train.dtype=fp16",
        "diffusion.objective=ddpm",
        "sample.sampler=rk4",
        "ema.decay=1.0",
        "optim.lr=0",
        "optim.betas=[0.9, 1.0]",
        "model.class_dropout_prob=1.5",
        "validation.timesteps=[2.0]",
        "validation.timesteps=[]",
        "model.num_heads=3",
        "data.max_bad_fraction=-0.1",
        "run.seed=-1",
        "data.cache=latents",
        "sample.sampler=euler",
        "sample.steps=1001",
        "model.pred_sigma=false",
    ],
)
def test_ranges(tmp_path: Path, override: str) -> None:
    key = override.split("=")[0]
    message = error(tmp_path, BASE, override)
    assert ("data.draws" if key == "data.cache" else key) in message
    assert "expected" in message


HYBRID = ("parallel.engine=colossalai", "parallel.plugin=hybrid")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.plugin=zero2"],
            'parallel.plugin = "zero2": expected one of ddp, fsdp with parallel.engine = torch',
        ),
        (["parallel.engine=deepspeed"], "parallel.engine"),
        ([*HYBRID, "parallel.tp_size=3", "model.num_heads=16"], "16 heads are not divisible by tp_size=3"),
        (["parallel.tp_size=2"], "parallel.tp_size = 2: expected 1 with parallel.plugin = ddp"),
        ([*HYBRID, "parallel.tp_size=4", "model.mlp_ratio=1.05"], "channels are not divisible by tp_size=4"),
        (["parallel.sp_size=2", "model.temporal_attention=false"], "parallel.sp_size = 2: expected 1 without"),
        (["parallel.sp_size=8", "data.num_frames=7"], "parallel.sp_size = 8: there are only 7 latent frames"),
        (
            ["parallel.engine=colossalai", "parallel.plugin=gemini"],
            'parallel.plugin = "gemini": expected parallel.engine=torch parallel.plugin=fsdp',
        ),
        (
            ["parallel.engine=colossalai", "parallel.plugin=fsdp"],
            "one of ddp, zero1, zero2, hybrid with",
        ),
        (["parallel.plugin=fsdp", "train.compile=on"], "expected off or auto with plugin fsdp"),
        (
            ["parallel.plugin=fsdp", "optim.in_backward=true"],
            "optim.in_backward = true: expected false, or parallel.engine = torch with plugin ddp",
        ),
    ],
)
def test_impossible_layouts_stop_with_the_arithmetic(tmp_path: Path, overrides: list[str], said: str) -> None:
    message = error(tmp_path, BASE, *overrides)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("engine", "plugin"), [("torch", "fsdp"), *(("colossalai", name) for name in ("ddp", "zero1", "zero2", "hybrid"))]
)
def test_every_plugin_of_the_design_is_known(tmp_path: Path, engine: str, plugin: str) -> None:
    config = load(tmp_path, BASE, f"parallel.engine={engine}", f"parallel.plugin={plugin}")
    assert config.parallel.plugin == plugin


def test_a_run_that_gemini_has_begun_goes_on_with_fsdp(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[parallel]\nengine = "colossalai"\nplugin = "gemini"\n')
    assert load_recorded(tmp_path / "config.toml").parallel == ParallelConfig("torch", "fsdp")


def test_dump_round_trip(tmp_path: Path) -> None:
    prompts = 'sample.prompts=["naïve \\"quote\\"", "back\\\\slash"]'
    config = load(tmp_path, BASE, prompts, "optim.lr=1e-5", "diffusion.shift=0.1")
    again = load(tmp_path, dump_toml(config))
    assert again == config


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, opensora_repro.config; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What saves memory


def test_activation_checkpointing_was_true_or_false(tmp_path: Path) -> None:
    """A new config is told the new names; what a run of an earlier release has left is read as it was meant."""
    for old, new in (("true", "full"), ("false", "none")):
        text = f"[train]\nactivation_checkpointing = {old}"
        assert f'activation_checkpointing = {old}: expected "{new}", or "selective"' in error(tmp_path, text)
        assert load_recorded(tmp_path / "config.toml").train.activation_checkpointing == new
    assert "expected one of none, selective, full" in error(tmp_path, "", "train.activation_checkpointing=some")


WITHIN = ("optim.in_backward=true", "optim.clip_norm=0", "train.max_bad_steps=1")


def test_steps_in_backward_and_what_they_rule_out(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, *WITHIN).optim.in_backward
    for change, said in (
        ("optim.clip_norm=1", "optim.clip_norm = 0 (the norm is known too late)"),
        ("train.accumulation=2", "train.accumulation = 1"),
        ("train.max_bad_steps=5", "train.max_bad_steps = 1 (a non-finite step cannot be skipped)"),
        ("parallel.engine=colossalai", "parallel.engine = torch"),
        ("optim.offload=true", "optim.offload = false"),
    ):
        assert f"optim.in_backward = true: expected false, or {said}" in error(tmp_path, BASE, *WITHIN, change)


def test_a_text_encoder_is_spread_or_offloaded(tmp_path: Path) -> None:
    both = error(tmp_path, BASE, "text.shard=true", "text.offload=true")
    assert "text.shard = true: expected false with text.offload = true" in both
    assert load(tmp_path, BASE, "text.shard=true").text.shard


def test_offloaded_activations_need_checkpointing(tmp_path: Path) -> None:
    changes = ("train.offload_activations=true", "train.activation_checkpointing=none")
    assert "train.offload_activations = true: expected false with" in error(tmp_path, BASE, *changes)
    assert load(tmp_path, BASE, changes[0]).train.offload_activations


def test_recipes_and_the_demos_models_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("configs/demo/stage1.toml")
    assert load_config(recipe).run.dir == "runs/demo/stage1"
    assert here_or_shipped("checkpoints/demo/vae") == shipped("checkpoints/demo/vae")
    recipe.parent.mkdir(parents=True)
    recipe.write_text('[run]\ndir = "mine"\n')
    assert load_config(recipe).run.dir == "mine"  # what is here comes first
    for name in ("opensora_repro/config", "configs/absent.toml", ""):
        assert here_or_shipped(name) == Path(name)


PACKED = '[data]\npacking_tokens = 64\n[[data.buckets]]\nnum_frames = 1\nresolution = "144p"\n'


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (BASE, ["data.packing_tokens=64"], "data.packing_tokens = 64: expected 0, or [[data.buckets]]"),
        (PACKED + "batch_size = 4\n", [], "data.buckets[0].batch_size = 4: expected none with data.packing_tokens"),
        (PACKED, ["parallel.engine=colossalai"], 'parallel.engine = "colossalai": expected torch with data.packing'),
        (PACKED, ["parallel.plugin=fsdp"], 'parallel.plugin = "fsdp": expected ddp with data.packing_tokens'),
        (PACKED.replace("= 1", "= 4"), ["parallel.sp_size=2"], "parallel.sp_size = 2: expected 1 with data.packing_"),
        (PACKED, ["train.compile=on"], 'train.compile = "on": expected off or auto with data.packing_tokens'),
        (
            PACKED,
            ["optim.in_backward=true", "optim.clip_norm=0", "train.max_bad_steps=1"],
            "optim.in_backward = true: ",
        ),
    ],
)
def test_what_packing_cannot_go_with(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    assert load(tmp_path, PACKED).data.packing_tokens == 64
    assert said in error(tmp_path, text, *overrides)


# The kind of model


STDIT3 = '[model]\narchitecture = "stdit3"\nhidden_size = 64\nnum_heads = 4\n'


def test_the_architecture_chooses_the_sections_class(tmp_path: Path) -> None:
    assert load(tmp_path, BASE).model == STDiTConfig(hidden_size=64, num_heads=4)  # as files of earlier releases
    config = load(tmp_path, STDIT3, "model.qk_norm=false", "model.depth=2")
    assert config.model == STDiT3Config(hidden_size=64, num_heads=4, depth=2, qk_norm=False)
    assert config.model.model_max_length == 300
    again = load(tmp_path, dump_toml(config))
    assert again == config
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded/config.toml").write_text(dump_toml(config), encoding="utf-8")
    assert load_recorded(tmp_path / "recorded/config.toml") == config


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_of_the_architecture(tmp_path: Path, order: int) -> None:
    """The keys that the other overrides may name are the new one's, wherever it stands among them."""
    overrides = ["model.architecture=stdit2", "model.qk_norm_legacy=false", "model.hidden_size=48"][::order]
    expected = STDiT2Config(hidden_size=48, num_heads=4, qk_norm_legacy=False)
    assert load(tmp_path, BASE, *overrides).model == expected
    assert load(tmp_path, STDIT3, "model.architecture=stdit").model == STDiTConfig(hidden_size=64, num_heads=4)
    whole = dump_toml(load(tmp_path, BASE))  # what stdit2 has not says what is so anyway
    assert load(tmp_path, whole, *overrides).model == replace(expected, model_max_length=120)
    scaled = dump_toml(load(tmp_path, BASE, "model.space_scale=0.5"))
    message = error(tmp_path, scaled, *overrides)
    assert 'model.space_scale = 0.5 has no place with model.architecture = "stdit2": leave it out' in message


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (BASE, ["model.architecture=stdit4"], 'model.architecture = "stdit4": expected one of stdit, stdit2, stdit3'),
        ("[model]\narchitecture = 3", [], "model.architecture = 3: expected one of stdit, stdit2, stdit3"),
        (
            BASE,
            ["model.qk_norm=false"],
            'unknown key model.qk_norm with model.architecture = "stdit" (of stdit2 and stdit3)',
        ),
        (
            STDIT3 + "space_scale = 0.5",
            [],
            'unknown key model.space_scale with model.architecture = "stdit3" (of stdit',
        ),
        (STDIT3, ["model.qk_nrom=false"], "did you mean model.qk_norm?"),
        (STDIT3, ["model.input_sq_size=0"], "model.input_sq_size = 0: expected at least 1"),
        (STDIT3, ["model.skip_y_embedder=true"], "model.skip_y_embedder = true: expected false in a run"),
        (STDIT3, ["model.num_heads=64"], "model.num_heads = 64: expected heads of an even width"),
        (STDIT3, ["model.architecture=stdit2"], "model.hidden_size = 64: expected a multiple of 3 with model.archi"),
        (STDIT3, ["model.pred_sigma=false"], "model.pred_sigma = false: expected true with diffusion.objective"),
    ],
)
def test_keys_and_values_of_another_architecture(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    assert said in error(tmp_path, text, *overrides)


def test_a_config_names_its_class() -> None:
    with pytest.raises(ConfigError, match=r'model\.architecture = "stdit": expected what STDiT3Config'):
        check_config(Config(model=STDiT3Config(architecture="stdit")))
