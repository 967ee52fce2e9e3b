"""On a GPU the numbers are the CPU's.

Without one, tests with fake tensors find those that would lie on the wrong device.
"""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import datasets
import dmel
import models
import search_spaces
import train
from config import parse

EXPERIMENTS = (search_spaces.time_frequency, search_spaces.audio_mnist, search_spaces.esc50)
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def config_of(space, **changes):
    config = space(1)
    config["init_lambd"] = config["init_lambd"]["grid_search"][1]
    config["trainable"] = True
    config["seed"] = 0
    return parse(config | changes)


@pytest.mark.parametrize("space", EXPERIMENTS)
def test_forward_with_fake_cuda_tensors(space):
    config = config_of(space, augment=True)
    n_fft = dmel.fft_size(config.init_lambd)
    real_filters = dmel.mel_filters

    def filters(*arguments):
        # Fake ones have no values to look for bins in.
        *settings, device, dtype = arguments
        with unset_fake_temporarily():
            groups = real_filters(*settings, "cpu", dtype)
        return [(bins, torch.empty(weights.shape).to(device, dtype)) for bins, weights in groups]

    patches = mock.patch.multiple(dmel, fft_size=lambda *_: n_fft, mel_filters=filters)
    with FakeTensorMode(), patches:
        with torch.device("cuda"):
            net, loss_function = models.build(config)
            clips = torch.randn(4, config.n_points)
            labels = torch.zeros(4, dtype=torch.int64)
        for clips_need_it in (False, True):
            logits, features = net(clips.requires_grad_(clips_need_it))
            for tensor in (logits, features, loss_function(logits, labels)):
                assert tensor.device.type == "cuda"


@pytest.mark.gpu
@with_cuda
@pytest.mark.parametrize("clips_need_it", [False, True])
@pytest.mark.parametrize("seconds", [0.010, 0.035, 0.300])
def test_layer_as_on_the_cpu(seconds, clips_need_it):
    clips = torch.randn(8, 40000)
    upstream = torch.linspace(-1, 1, 64)[:, None]  # the same in all frames
    outcomes = []
    for device in ("cpu", "cuda"):
        layer = dmel.DMEL(8000, n_mels=64, hop_length=80, init_lambd=8000 * seconds / 6).to(device)
        x = clips.to(device).requires_grad_(clips_need_it)
        log_mel = layer(x)
        (log_mel * upstream.to(device)).mean().backward()
        outcome = [log_mel.cpu(), layer.lambd.grad.cpu()]
        if clips_need_it:
            outcome.append(x.grad.cpu())
        outcomes.append(outcome)

    for on_cpu, on_cuda in zip(*outcomes, strict=True):
        tolerance = 1e-3 * on_cpu.abs().max().item()
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-3, atol=tolerance)


@pytest.mark.gpu
@with_cuda
@pytest.mark.parametrize("space", EXPERIMENTS)
def test_training_step_as_on_the_cpu(space):
    """λ and the loss of two steps, without dropout: each device draws masks of its own."""
    outcomes = []
    for device in ("cpu", "cuda:0"):
        config = config_of(space, device=device)
        torch.manual_seed(0)
        clips = torch.randn(16, config.n_points)
        with mock.patch.object(torch.cuda, "is_available", return_value=device != "cpu"):
            net, loss_function, device = train.prepare(config)
        optimizer = train.make_optimizer(net, config)
        data = datasets.Data(clips, torch.arange(16) % 3, {}).to(device)
        with mock.patch.object(models.Dropout, "forward", lambda self, x: x):
            batches = torch.arange(16, device=device).split(8)
            loss, energy = train.train_epoch(net, loss_function, optimizer, data, batches)
        outcomes.append([loss, energy, net.spectrogram_layer.lambd.item()])
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-3)
