"""The eight networks, Cnn6 against the original, the published checkpoint."""

import os
import pickle

import numpy as np
import pytest
import torch
from conftest import golden

import models
import search_spaces
import train
from config import InputError, parse
from dmel import DMEL, DifferentiableSpectrogram

SPECTROGRAM_MODELS = ("linear_net", "bn_linear_net", "mlp_net", "conv_net")
DROPOUT_RATES = {  # of all other models none
    "mel_linear_net": [0.2],
    "mel_bn_linear_net": [0.2],
    "mel_mlp_net": [0.2],
    "panns_cnn6": [0.2, 0.2, 0.2, 0.2, 0.5],
}


def config_of(model_name, **changes):
    if model_name in SPECTROGRAM_MODELS:
        config = search_spaces.time_frequency(1)
        config["n_points"] = 32
    else:
        config = search_spaces.audio_mnist(1)
    config |= {"model_name": model_name, "trainable": True, "init_lambd": 20.0, "seed": 0}
    return parse(config | changes)


def layer_of(**changes):
    """The front end of mel_linear_net."""
    net, _ = models.build(config_of("mel_linear_net", **changes))
    return net.spectrogram_layer


@pytest.mark.parametrize("model_name", models.MODELS)
def test_every_model_learns_from_its_features(model_name):
    config = config_of(model_name)
    net, loss_function = models.build(config)
    clips = torch.randn(2, config.n_points)
    logits, features = net(clips)
    if model_name in SPECTROGRAM_MODELS:
        assert isinstance(net.spectrogram_layer, DifferentiableSpectrogram)
        assert features.shape == (2, 1, 33, 33)
        assert logits.shape == (2, 3)
    else:
        assert isinstance(net.spectrogram_layer, DMEL)
        assert features.shape == (2, 1, 64, 101)
        assert logits.shape == (2, 10)

    loss_function(logits, torch.tensor([0, 1])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert net.spectrogram_layer.lambd.grad != 0
    rates = [module.p for module in net.modules() if isinstance(module, models.Dropout)]
    assert rates == DROPOUT_RATES.get(model_name, [])
    assert torch.equal(net(clips)[0], net(clips)[0]) != bool(rates)
    net.eval()
    assert torch.equal(net(clips)[0], net(clips)[0])


@pytest.mark.parametrize(("model_name", "hidden"), [("mlp_net", 128), ("mel_mlp_net", 32)])
def test_first_layer_is_drawn_first(model_name, hidden):
    torch.manual_seed(7)
    net, _ = models.build(config_of(model_name))
    linear = net.head[1]
    torch.manual_seed(7)
    assert torch.equal(linear.weight, torch.nn.Linear(linear.in_features, hidden).weight)


def test_batch_norm_normalizes_every_frequency_bin():
    net, _ = models.build(config_of("bn_linear_net"))
    spectrogram = torch.rand(8, 1, 20, 33) * torch.arange(1, 34)  # (batch, 1, frames, bands)
    normalized = net.head[0](spectrogram)
    torch.testing.assert_close(normalized.mean(dim=(0, 1, 2)), torch.zeros(33), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(dim=(0, 1, 2)), torch.ones(33), atol=1e-2, rtol=0)


def test_config_reaches_the_layer():
    clips = torch.randn(2, 8000)
    assert not layer_of(trainable=False).lambd.requires_grad
    log_mel = layer_of()(clips)
    mel = layer_of(energy_normalize=False)(clips)
    from_zero = layer_of(zero_floor=True)(clips)
    torch.testing.assert_close(log_mel, (mel + 1e-10).log())
    torch.testing.assert_close(from_zero, log_mel - np.log(1e-10))

    text = repr(layer_of(optimized=False, continuous=True, normalize_window=True))
    assert "optimized=False, normalize_window=True" in text and "continuous=True" in text
    assert layer_of(resample_rate=16000).sample_rate == 16000

    net, _ = models.build(config_of("linear_net", normalize_window=True))
    assert net.spectrogram_layer.normalize_window


def test_panns_loss_is_binary_cross_entropy_of_sigmoid_outputs():
    logits = torch.randn(4, 10)
    labels = torch.tensor([3, 1, 9, 0])
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), torch.eye(10)[labels])
    torch.testing.assert_close(models.MODELS["panns_cnn6"][2](logits, labels), expected)


def test_models_that_cannot_be_built():
    with pytest.raises(InputError, match="optimized: False"):
        models.build(config_of("linear_net", optimized=True))
    with pytest.raises(InputError, match=r"resnet.*mel_linear_net"):
        models.build(config_of("resnet"))
    with pytest.raises(InputError, match="16 or more"):
        models.build(config_of("panns_cnn6", n_mels=15))


def golden_weights(keys, state):
    """Weights drawn by a key's position, as the golden vectors' README says."""
    for position, key in enumerate(keys):
        if key.endswith("num_batches_tracked"):
            continue
        random = np.random.RandomState(position)
        shape = tuple(state[key].shape)
        if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            values = random.uniform(0.5, 1.5, shape)
        elif key.endswith(("running_mean", "bias")):
            values = random.uniform(-0.1, 0.1, shape)
        else:
            values = random.uniform(-1, 1, shape) * np.sqrt(3 / np.prod(shape[1:]))
        state[key] = torch.tensor(values, dtype=torch.float32)
    return state


def cnn6(n_mels, n_classes, augment=False):
    config = config_of("panns_cnn6", augment=augment)
    return models.Cnn6(96, n_mels, n_classes, config)


def test_golden_cnn6():
    tensors, meta = golden("cnn6")
    net = cnn6(meta["n_mels"], meta["n_classes"]).eval()
    assert sorted(net.state_dict()) == sorted(meta["keys"])
    assert sum(parameter.numel() for parameter in net.parameters()) == meta["params"]
    net.load_state_dict(golden_weights(meta["keys"], net.state_dict()))
    outputs = torch.sigmoid(net(tensors["x"]))
    torch.testing.assert_close(outputs, tensors["y"], atol=1e-5, rtol=1e-5)


def test_cnn6_starts_from_xavier_weights():
    net = cnn6(64, 50)
    for weight in (net.conv_block3.conv1.weight, net.fc1.weight):
        fan_out = weight.shape[0] * weight[0, 0].numel()
        fan_in = weight.shape[1] * weight[0, 0].numel()
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not net.fc1.bias.any() and not net.fc_esc50.bias.any()


def test_augment_masks_time_and_frequency_in_training_only():
    net = cnn6(64, 50, augment=True)
    seen = []
    net.conv_block1.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach())
    )
    torch.manual_seed(0)
    x = torch.randn(40, 1, 120, 64)
    net(x)
    net.eval()(x)
    in_training, in_evaluation = seen
    assert not (in_evaluation == 0).any()

    masked = in_training.squeeze(1) == 0
    frames = masked.all(dim=2).sum(dim=1)  # per example
    bands = masked.all(dim=1).sum(dim=1)
    assert frames.max() <= 64 and frames.max() > 32 and len(frames.unique()) > 5
    assert bands.max() <= 8 and bands.max() > 4 and len(bands.unique()) > 3


def published_checkpoint(path):
    """A file with the keys and shapes of the published Cnn6 checkpoint."""
    state = cnn6(64, 527).state_dict()
    state = golden_weights(sorted(state), state)
    published = {}
    for key, value in state.items():
        if key.startswith("bn1."):
            key = key.replace("bn1.", "bn0.", 1)
        published[key.replace("fc_esc50", "fc_audioset")] = value

    extractor = "spectrogram_extractor.stft.conv"
    published[f"{extractor}_real.weight"] = torch.zeros(257, 1, 512)
    published[f"{extractor}_imag.weight"] = torch.zeros(257, 1, 512)
    published["logmel_extractor.melW"] = torch.zeros(257, 64)
    sampler = {"indexes": np.arange(4), "pointer": np.int64(2), "weights": np.ones((2, 2))}
    torch.save({"iteration": 600000, "model": published, "sampler": sampler}, path)
    return state


def build_pretrained(path, **changes):
    if path is not None:
        path = str(path)
    config = config_of("panns_cnn6", pretrained=True, checkpoint_path=path, **changes)
    net, _ = models.build(config)
    return net


def test_published_checkpoint(tmp_path, recwarn):
    path = tmp_path / "Cnn6.pth"
    expected = published_checkpoint(path)
    train.check(config_of("panns_cnn6", pretrained=True, checkpoint_path=str(path)))
    assert not recwarn.list
    net = build_pretrained(path)
    for key, value in net.head.state_dict().items():
        if not key.startswith("fc_esc50."):
            torch.testing.assert_close(value, expected[key])
    assert net.head.fc_esc50.weight.shape == (10, 512)

    torch.save(torch.load(path, weights_only=False), path, pickle_module=NumpyOnePickle)
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert b"numpy._core.multiarray" not in path.read_bytes()
    build_pretrained(path)

    with pytest.raises(InputError, match="not the file that the experiment was begun with"):
        build_pretrained(path, checkpoint_sha256="0" * 64)
    with pytest.raises(InputError, match="size mismatch"):
        build_pretrained(path, n_mels=40)
    published = torch.load(path, weights_only=False)
    published["model"]["conv_block1.conv1.weight"][3, 0, 2, 2] = float("nan")
    torch.save(published, path)
    with pytest.raises(InputError, match=r"is not Cnn6_mAP.*weights that are not numbers"):
        build_pretrained(path)


class NumpyOnePickle:
    """The pickle module, naming numpy's globals as numpy 1 did."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if getattr(obj, "__module__", "") == "numpy._core.multiarray":
                self.write(pickle.GLOBAL + f"numpy.core.multiarray\n{obj.__name__}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

        dispatch = pickle._Pickler.dispatch | {type(lambda: 0): save_global, type(len): save_global}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", ["no path", "no file", {"model": {}}, {"model": Malicious()}])
def test_file_that_is_no_checkpoint(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, dict):
        torch.save(content, "bad.pth")
    with pytest.raises(InputError, match=r"is not Cnn6_mAP.*zenodo.*fetch that"):
        build_pretrained(None if content == "no path" else "bad.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_keeps_each_element_by_chance_and_the_mean(p):
    x = torch.ones(1001, 333, requires_grad=True)
    dropout = models.Dropout(p)
    y = dropout(x)
    kept = y != 0
    share = kept.float().mean().item()
    assert share == pytest.approx(1 - p, abs=4e-3)  # 4 standard deviations are 3.5e-3
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    neighbours = (kept[:, 1:] & kept[:, :-1]).float().mean().item()
    assert neighbours == pytest.approx((1 - p) ** 2, abs=6e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert dropout.eval()(x) is x
