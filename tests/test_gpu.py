"""On a GPU the numbers are the CPU's.

What runs on a GPU with -m gpu runs on the CPU without, so that the tests themselves are known to
work. Fake tensors find those that would lie on the wrong device.
"""

import copy
import io
import os
from types import SimpleNamespace
from unittest import mock

import conftest
import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import datasets
import dmel
import machine
import models
import predict_test
import search_spaces
import train
from benchmarks.measure import fresh_process
from config import parse

EXPERIMENTS = (search_spaces.time_frequency, search_spaces.audio_mnist, search_spaces.esc50)
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
on_cuda = [pytest.mark.gpu, with_cuda]
CUDA = pytest.param("cuda:0", marks=on_cuda)
DEVICES = ["cpu", CUDA]

# Relative: features that differ by 1e-5 leave a λ of esc50 that differs by 1e-3 after some steps.
AFTER_STEPS = 5e-3

FEATURE_BYTES = 129 * 129 * 4  # of a clip of time_frequency
MEL_LINEAR_NET = {  # of the clips of time_frequency, with dropout
    "model_name": "mel_linear_net",
    "n_mels": 16,
    "hop_length": 8,
    "resample_rate": 8000,
    "energy_normalize": True,
    "optimizer_name": "adam",
}


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


@pytest.mark.parametrize(
    ("expression", "hidden"),
    [
        ("", True),
        ("slow", True),
        ("not gpu", True),
        ("slow and not gpu", True),
        ("gpu", False),
        ("gpu and not slow", False),
    ],
)
def test_gpus_are_hidden_unless_asked_for(expression, hidden, monkeypatch):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # of the run that this test is in
    assert not torch.cuda.is_available()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))
    assert (os.environ["CUDA_VISIBLE_DEVICES"] == "") == hidden


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clips_need_it", [False, True])
@pytest.mark.parametrize("seconds", [0.010, 0.035, 0.300])
def test_layer_as_on_the_cpu(seconds, clips_need_it, device):
    clips = torch.randn(8, 40000)
    upstream = torch.linspace(-1, 1, 64)[:, None]  # the same in all frames
    outcomes = []
    for place in ("cpu", device):
        layer = dmel.DMEL(8000, n_mels=64, hop_length=80, init_lambd=8000 * seconds / 6).to(place)
        x = clips.to(place, copy=True).requires_grad_(clips_need_it)  # a leaf
        log_mel = layer(x)
        (log_mel * upstream.to(place)).mean().backward()
        outcome = [log_mel.cpu(), layer.lambd.grad.cpu()]
        if clips_need_it:
            outcome.append(x.grad.cpu())
        outcomes.append(outcome)

    for on_cpu, on_device in zip(*outcomes, strict=True):
        tolerance = 1e-3 * on_cpu.abs().max().item()
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_computes_in_float32_under_autocast(device):
    layer = dmel.DMEL(8000, n_mels=64, hop_length=80, init_lambd=46.7).to(device)
    clips = torch.randn(4, 8000, device=device)
    outcomes = []
    for enabled in (False, True):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            log_mel = layer(clips)
        log_mel.mean().backward()
        outcomes.append([log_mel.detach(), layer.lambd.grad])
        layer.lambd.grad = None
    for exact, under_autocast in zip(*outcomes, strict=True):
        assert under_autocast.dtype == torch.float32
        torch.testing.assert_close(under_autocast, exact)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_trials_that_share_a_gpu_and_their_test(device, project):
    """Through Ray; what they leave is read and tested where there is no GPU."""
    visible = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else "0"}
    flags = ["--num_cpus=4", "--cpus_per_trial=1", "--max_epochs=3"]
    output = project.run("main.py", "--name=tiny", *flags, **visible).stdout
    if device == "cpu":
        assert "No CUDA device: training on the CPU" in output
    else:
        assert "4 trials at a time" in output
    accuracies = []
    for environment in (visible, {"CUDA_VISIBLE_DEVICES": ""}):
        table = project.folder / "ray_results" / "tiny" / "tiny.csv"
        table.unlink(missing_ok=True)
        project.run("predict_test.py", "--dataset_name=tiny", **environment)
        accuracies.append(pd.read_csv(table)["test_accuracy"])
    assert len(accuracies[0]) == 4
    assert (accuracies[0] - accuracies[1]).abs().max() < 1.5 / 60  # one of 60 clips


def without_dropout():
    """A context without it: each kind of device draws masks of its own."""
    return mock.patch.object(models.Dropout, "forward", lambda self, x: x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("space", EXPERIMENTS)
def test_training_step_as_on_the_cpu(space, device):
    """λ and the loss of two steps."""
    outcomes = []
    for place in ("cpu", device):
        config = config_of(space, device=place)
        torch.manual_seed(0)
        clips = torch.randn(4, config.n_points)
        net, loss_function, place = train.prepare(config)
        optimizer = train.make_optimizer(net, config)
        data = datasets.Data(clips, torch.arange(4) % 3, {}).to(place)
        with without_dropout():
            batches = torch.arange(4, device=place).split(2)
            loss, energy = train.train_epoch(net, loss_function, optimizer, data, batches)
        outcomes.append([loss, energy, net.spectrogram_layer.lambd.item()])
    assert outcomes[1] == pytest.approx(outcomes[0], rel=AFTER_STEPS)


def trained(config, data, state=None):
    """Rows of the epochs that are trained, and the last snapshot, as results.py reads it."""
    rows = []
    snapshots = []

    def report(row, snapshot):
        rows.append(row)
        snapshots.append(snapshot)

    train.train(config, data, report, copy.deepcopy(state))
    content = io.BytesIO()
    torch.save(snapshots[-1](), content)
    content.seek(0)
    return rows, torch.load(content, map_location="cpu", weights_only=True)


def numbers(rows):
    return [[row["loss"], row["valid_loss"], row["lambd_est"]] for row in rows]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda:0", "cpu", marks=on_cuda),
        pytest.param("cpu", "cuda:0", marks=on_cuda),
        pytest.param("cuda:0", "cuda:0", marks=on_cuda),
    ],
)
@pytest.mark.parametrize("space", [search_spaces.time_frequency, search_spaces.esc50])
def test_a_trial_goes_on_where_it_began_and_elsewhere(space, first, second):
    n_points = 128
    if space is search_spaces.esc50:
        n_points = 2560
    changes = {"optimizer_name": "adam", "n_points": n_points, "batch_size": 4}
    config = config_of(space, **changes, device="cpu", max_epochs=3)
    splits = {"train": torch.arange(8), "valid": torch.arange(8, 12)}
    data = datasets.Data(torch.randn(12, n_points), torch.arange(12) % 3, splits)

    with without_dropout():
        expected, _ = trained(config, data)
        begun = config.model_copy(update={"device": first, "max_epochs": 1})
        begin, state = trained(begun, data)
        rest, _ = trained(config.model_copy(update={"device": second}), data, state)
    assert [row["training_iteration"] for row in begin + rest] == [1, 2, 3]
    for row, expected_row in zip(numbers(begin + rest), numbers(expected), strict=True):
        assert row == pytest.approx(expected_row, rel=AFTER_STEPS)


@pytest.mark.parametrize("device", DEVICES)
def test_a_snapshot_restores_the_masks_of_dropout(device):
    config = config_of(
        search_spaces.time_frequency, **MEL_LINEAR_NET, n_samples=300, device=device, max_epochs=3
    )
    data = datasets.load(config)
    whole, _ = trained(config, data)
    _, state = trained(config.model_copy(update={"max_epochs": 1}), data)
    rest, _ = trained(config, data, state)
    for row, expected_row in zip(numbers(rest), numbers(whole[1:]), strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4)

    state["random"] = torch.Generator(device).manual_seed(1).get_state()
    with_other_masks, _ = trained(config, data, state)
    assert numbers(with_other_masks)[0] != pytest.approx(numbers(whole)[1], rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, MEL_LINEAR_NET])
def test_fixed_features(changes, device, monkeypatch):
    config = config_of(
        search_spaces.time_frequency, **changes, trainable=False, n_samples=300, device=device
    )
    net, _, place = train.prepare(config)
    layer = net.spectrogram_layer
    data = datasets.load(config).to(place)
    features = train.fixed_features(data, layer, batch_size=64)
    assert features.device == data.clips.device
    for part in ("train", "valid"):
        indices = data.splits[part]
        with torch.no_grad():
            expected = layer(data.clips[indices]).transpose(-1, -2)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(features[indices], expected, rtol=1e-5, atol=tolerance)

    # They may take half of a trial's share of the free memory, which here is as much as they take:
    # on a GPU the share of the GPU, otherwise of the machine, one of four trials.
    n_cpus = 4 * torch.get_num_threads()
    monkeypatch.setattr(machine, "cpus", lambda: n_cpus)
    monkeypatch.setattr(machine, "free_memory", lambda: 4 * features.nbytes)
    assert train.fixed_features(data, layer, batch_size=64, gpus=1e-9) is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", [1, -1])
def test_fft_size_that_changes_in_training(direction, device):
    """λ crosses the boundary at 42.83, up and down: N is 256 below it and 512 above."""
    outcomes = []
    for place in ("cpu", device):
        config = config_of(
            search_spaces.audio_mnist, init_lambd=42.83 - 3 * direction, device=place
        )
        torch.manual_seed(0)
        net, _, place = train.prepare(config)
        layer = net.spectrogram_layer
        optimizer = train.make_optimizer(net, config)
        clips = torch.randn(4, config.n_points).to(place)
        sizes = []
        lambds = []
        for _ in range(6):
            # The power of all bands grows with the window.
            (-direction * layer(clips).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append(layer.n_fft)
            lambds.append(layer.lambd.item())
        assert sizes == sorted(sizes, reverse=direction < 0)
        assert set(sizes) == {256, 512}
        outcomes.append([*sizes, *lambds])
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_accuracy_as_on_the_cpu(device):
    """Of the test split, by predict_test.py: to one clip, which may lie between two classes."""
    config = config_of(search_spaces.time_frequency, n_samples=1000, max_epochs=6, device=device)
    _, state = trained(config, datasets.load(config))
    accuracies = []
    for place in ("cpu", device):
        elsewhere = config.model_copy(update={"device": place})
        predictions = predict_test.predict(elsewhere, state["best_net"], None, ["0", "1", "2"])
        accuracies.append(predict_test.accuracy_of(predictions))
    assert accuracies[0] > 0.5  # chance is a third
    assert abs(accuracies[0] - accuracies[1]) < 1.5 / 200


def tf32_flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def product_and_flags(device, tf32):
    """A product of matrices on the device of a trial, and torch's flags as the trial sets them."""
    config = config_of(search_spaces.time_frequency, device=device, tf32=tf32)
    _, _, place = train.prepare(config)
    factors = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).to(place)
    return (factors[0] @ factors[1]).cpu(), tf32_flags()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_tf32_is_of_the_process_that_asks_for_it(device):
    exact, flags = product_and_flags(device, tf32=False)
    assert flags == (False, False)
    with fresh_process() as pool:
        rounded, flags = pool.submit(product_and_flags, device, tf32=True).result()
    assert flags == (True, True)
    assert tf32_flags() == (False, False)

    error = (rounded - exact).abs().max() / exact.abs().max()
    rounds = device != "cpu" and torch.cuda.get_device_capability()[0] >= machine.AMPERE
    assert error < 1e-2
    assert (error > 1e-5) == rounds


class SaysCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU, as do those that are made from it."""

    is_cuda = True


def batch_sizes(module, function, *arguments):
    """Clips in each call of a module by a function, and what the function returned."""
    sizes = []
    handle = module.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    result = function(*arguments)
    handle.remove()
    return sizes, result


@pytest.mark.parametrize(
    ("model_name", "batch_size", "on_cpu", "on_gpu"),
    [
        ("linear_net", 10, [10, 10, 10], [25, 5]),
        ("linear_net", 30, [30], [30]),  # never smaller ones than those of training
        ("conv_net", 10, [10, 10, 10], [10, 10, 10]),
    ],
)
def test_a_gpu_evaluates_in_larger_batches(model_name, batch_size, on_cpu, on_gpu, monkeypatch):
    changes = {"n_samples": 300, "model_name": model_name, "batch_size": batch_size}
    config = config_of(search_spaces.time_frequency, **changes)
    data = datasets.load(config)
    monkeypatch.setattr(train, "GPU_BATCH_BYTES", 25 * FEATURE_BYTES)
    evaluate = train.evaluate
    sizes = []

    def recorded(net, *arguments):
        sizes_of_call, outcome = batch_sizes(net, evaluate, net, *arguments)
        sizes.append(sizes_of_call)
        return outcome

    monkeypatch.setattr(train, "evaluate", recorded)
    outcomes = []
    for clips in (data.clips, data.clips.as_subclass(SaysCuda)):
        history, _ = trained(config, data._replace(clips=clips))
        outcomes.append([history[-1]["valid_loss"], history[-1]["valid_acc"]])
    assert sizes == [on_cpu, on_gpu]
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-5)


def test_a_gpu_computes_fixed_features_in_larger_batches(monkeypatch):
    config = config_of(search_spaces.time_frequency, n_samples=100, trainable=False, batch_size=30)
    data = datasets.load(config)
    on_gpu = data._replace(clips=data.clips.as_subclass(SaysCuda))
    monkeypatch.setattr(train, "GPU_BATCH_BYTES", 50 * FEATURE_BYTES)
    monkeypatch.setattr(machine, "free_gpu_memory", lambda device, gpus: 2**40)
    fixed_features = train.fixed_features
    sizes = []
    features = []

    def recorded(data, layer, *arguments):
        sizes_of_call, result = batch_sizes(layer, fixed_features, data, layer, *arguments)
        sizes.append(sizes_of_call)
        features.append(result)
        return result

    monkeypatch.setattr(train, "fixed_features", recorded)
    trained(config, data)
    trained(config, on_gpu)
    assert sizes == [[1, 30, 30, 10, 10], [1, 50, 20, 10]]  # 70 to train, 10 to validate
    expected, found = features
    for part in ("train", "valid"):
        indices = data.splits[part]
        torch.testing.assert_close(found[indices].as_subclass(torch.Tensor), expected[indices])
