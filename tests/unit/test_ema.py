"""The average of the weights: its formula, its use for sampling, and saving it."""

from __future__ import annotations

import torch
from torch import nn

from opensora_repro.training.step import Ema, horizon_warning
from tests.checkpoints import prepared


def make() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_buffer("table", torch.arange(3.0))
    return model


def test_follows_the_formula_with_warm_up() -> None:
    model = make()
    ema = Ema(prepared(model), decay=0.4)
    name = "1.weight"
    expected = model[1].weight.detach().double().clone()
    for n in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[1].weight.detach().double()
    assert ema.updates == 8
    torch.testing.assert_close(ema.shadow[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_decay_zero_is_the_newest_weights() -> None:
    model = make()
    ema = Ema(prepared(model), decay=0.0)
    with torch.no_grad():
        model[0].weight.mul_(3).add_(1)
    ema.update()
    torch.testing.assert_close(ema.shadow["0.weight"], model[0].weight.detach(), rtol=0, atol=1e-6)


def test_applied_puts_the_trained_weights_back_bit_for_bit() -> None:
    model = make()
    ema = Ema(prepared(model), decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.applied():
        assert torch.equal(model[0].weight, ema.shadow["0.weight"])
        assert not torch.equal(model[0].weight, trained["0.weight"])
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_warns_when_the_horizon_exceeds_the_run() -> None:
    assert horizon_warning(0.99, 100) is None
    message = horizon_warning(0.9999, 600)
    assert message is not None
    assert "ema.decay=0.9999" in message
    assert "train.steps=600" in message
