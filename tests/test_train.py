"""One trial, without Ray: it learns, resumes, stops, keeps its best network."""

import contextlib
import copy
import io
import math

import pytest
import torch

import datasets
import dmel
import models
import search_spaces
import train
from config import InputError, parse

MEL = {
    "model_name": "mel_linear_net",
    "n_mels": 16,
    "hop_length": 8,
    "resample_rate": 8000,
    "energy_normalize": True,
}


def tiny_config(**changes):
    """A Config of time_frequency that trains in a moment."""
    config = search_spaces.time_frequency(4)
    config |= {"trainable": True, "init_lambd": 1.276, "seed": 0, "n_samples": 300}
    return parse(config | changes)


def run(config, state=None, stop_after=math.inf):
    """Trains; returns the reports of all epochs and the last snapshot, as read from a file."""
    reports = []
    snapshots = []

    class Stop(Exception):
        pass

    def report(metrics, snapshot):
        assert metrics["time_this_iter_s"] > 0
        reports.append({key: value for key, value in metrics.items() if key != "time_this_iter_s"})
        buffer = io.BytesIO()
        torch.save(snapshot(), buffer)
        buffer.seek(0)
        snapshots[:] = [torch.load(buffer, weights_only=True)]
        if len(reports) == stop_after:
            raise Stop

    with contextlib.suppress(Stop):
        train.train(config, datasets.load(config), report, state)
    return reports, snapshots[0]


@pytest.mark.parametrize("init_lambd", [1.276, 31.9])
def test_learns_and_moves_lambda_towards_the_best_window(init_lambd):
    reports, _ = run(tiny_config(init_lambd=init_lambd, n_samples=5000))
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"]
    assert reports[-1]["best_valid_acc"] > 0.8
    assert abs(reports[-1]["lambd_est"] - 6.38) < abs(init_lambd - 6.38)


def test_reports_of_every_epoch_follow_from_the_seed():
    first, _ = run(tiny_config(seed=1))
    again, _ = run(tiny_config(seed=1))
    other, _ = run(tiny_config(seed=2))
    assert first == again and first[0]["loss"] != other[0]["loss"]
    config = tiny_config()
    assert [config.is_finished(metrics) for metrics in first] == [False, False, False, True]
    assert [metrics["training_iteration"] for metrics in first] == [1, 2, 3, 4]
    best = min(first, key=lambda metrics: metrics["valid_loss"])
    for key in ("valid_loss", "valid_acc", "lambd_est"):
        assert first[-1][f"best_{key}"] == best[key]
    assert first[-1]["best_epoch"] == best["training_iteration"]


def test_means_are_over_examples_and_energy_over_batches():
    config = tiny_config(trainable=False, lr_model=0.0, max_epochs=1)
    (metrics,), _ = run(config)
    data = datasets.load(config)
    torch.manual_seed(0)
    net, loss_function = models.build(config)
    for part, name in (("train", "loss"), ("valid", "valid_loss")):
        logits, features = net(data.clips[data.splits[part]])
        expected = loss_function(logits, data.labels[data.splits[part]]).item()
        assert metrics[name] == pytest.approx(expected, rel=1e-5)
        if part == "train":  # 210 clips in batches of 128: two
            assert metrics["energy"] == pytest.approx(features.sum().item() / 2, rel=1e-4)


def test_dmel_and_baseline_of_one_seed_start_from_the_same_weights_and_batches(monkeypatch):
    seen = []

    def record(net, loss_function, optimizer, data, batches):
        head = net.net.head if isinstance(net, train.BehindFeatures) else net.head
        seen.append((head.state_dict(), batches))
        return 0.0, 0.0

    monkeypatch.setattr(train, "train_epoch", record)
    for trainable in (True, False):
        run(tiny_config(trainable=trainable, max_epochs=1))
    (weights, batches), (baseline_weights, baseline_batches) = seen
    assert all(torch.equal(weights[key], baseline_weights[key]) for key in weights)
    assert all(torch.equal(*pair) for pair in zip(batches, baseline_batches, strict=True))


KINDS = [{}, {**MEL, "optimizer_name": "adam"}]  # without dropout, and with it


@pytest.mark.parametrize("changes", KINDS)
def test_resumed_trial_equals_an_uninterrupted_one(changes):
    config = tiny_config(**changes)
    whole, end = run(config)
    first, state = run(config, stop_after=1)
    second, state = run(config, state, stop_after=2)
    rest, resumed_end = run(config, state)
    assert first + second + rest == whole
    assert_same_network(end, resumed_end)


@pytest.mark.parametrize("changes", KINDS)
def test_a_larger_budget_goes_on_as_if_it_had_been_there_from_the_start(changes):
    whole, end = run(tiny_config(**changes, max_epochs=6))
    first, state = run(tiny_config(**changes, max_epochs=3))
    assert tiny_config(max_epochs=3).is_finished(first[-1])
    rest, longer_end = run(tiny_config(**changes, max_epochs=6), state)
    assert [row["training_iteration"] for row in rest] == [4, 5, 6]
    assert first + rest == whole
    assert_same_network(end, longer_end)


def assert_same_network(end, other_end):
    for name, value in end["best_net"].items():
        assert torch.equal(value, other_end["best_net"][name])


def test_what_ended_by_patience_is_finished_at_any_budget_and_keeps_its_best_network_alone():
    config = tiny_config(lr_model=0.0, trainable=False, patience=2, max_epochs=10)
    reports, state = run(config)
    assert state.keys() == {"history", "best_net"} and len(reports) == 3
    assert config.model_copy(update={"max_epochs": 1000}).is_finished(reports[-1])
    with_budget, state = run(tiny_config(max_epochs=2))
    assert {"net", "optimizer", "shuffle", "random"} < state.keys()
    assert not tiny_config(max_epochs=3).is_finished(with_budget[-1])


def test_a_trial_that_began_on_another_kind_of_device_goes_on():
    config = tiny_config()
    _, state = run(config, stop_after=1)
    state["random"] = state["random"][:16]  # a GPU's generator has a state of 16 bytes
    reports, _ = run(config, state)
    assert len(reports) == 3 and config.is_finished(reports[-1])


def cnn6_after_one_step(memory_format):
    """A network with Cnn6's layout on a device, its optimizer, and the weights' gradients."""
    changes = {"trainable": True, "init_lambd": 46.7, "seed": 0, "n_points": 4000}
    config = parse(search_spaces.esc50(2) | changes)
    torch.manual_seed(0)
    net, loss_function = models.build(config)
    net.to(memory_format=memory_format)
    optimizer = train.make_optimizer(net, config)
    return net, optimizer, lambda: step(net, optimizer, loss_function)


def step(net, optimizer, loss_function):
    """One step on a fixed batch, without dropout, so that both networks see the same."""
    clips = torch.randn(4, 4000, generator=torch.Generator().manual_seed(1))
    logits, _ = net.eval()(clips)
    optimizer.zero_grad()
    loss_function(logits, torch.arange(4)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("saved_in", "continued_in"),
    [
        (torch.contiguous_format, torch.channels_last),  # begun on a GPU, continued on a CPU
        (torch.channels_last, torch.contiguous_format),
    ],
)
def test_state_takes_the_layout_of_its_weight(saved_in, continued_in):
    """A fused step that read its state in another order would be off by the learning rate."""
    net, optimizer, next_step = cnn6_after_one_step(saved_in)
    next_step()
    state = {
        "net": {name: value.clone() for name, value in net.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "shuffle": torch.Generator().get_state(),
        "random": torch.Generator().get_state(),
    }

    other, other_optimizer, other_next_step = cnn6_after_one_step(continued_in)
    train.restore(state, other, other_optimizer, torch.Generator(), torch.Generator())
    for weight in other.parameters():
        for value in other_optimizer.state[weight].values():
            assert value.shape != weight.shape or value.stride() == weight.stride()

    next_step()
    other_next_step()
    weights = dict(net.named_parameters())
    other_weights = dict(other.named_parameters())
    torch.testing.assert_close(weights, other_weights, rtol=1e-4, atol=2e-5)


def test_patience_ends_a_trial_and_the_best_network_is_kept():
    # Far too fast, so that it gets worse.
    config = tiny_config(lr_model=50.0, lr_tf=0.01, max_epochs=40, patience=3)
    reports, state = run(config)
    best = min(range(len(reports)), key=lambda epoch: reports[epoch]["valid_loss"])
    assert len(reports) == best + 1 + 3 < 40
    for key in ("valid_loss", "valid_acc", "lambd_est"):
        assert reports[-1][f"best_{key}"] == reports[best][key]
    for key in ("valid_loss", "lambd_est"):
        assert reports[best][key] != reports[-1][key]
    net, loss_function = models.build(config)
    net.load_state_dict(state["best_net"])
    data = datasets.load(config)
    loss, accuracy = train.evaluate(net, loss_function, data, data.splits["valid"], batch_size=7)
    assert loss == pytest.approx(reports[best]["valid_loss"], rel=1e-4)
    assert accuracy == pytest.approx(reports[best]["valid_acc"])


def test_an_equal_validation_loss_is_no_lower_one():
    reports, _ = run(tiny_config(lr_model=0.0, trainable=False, max_epochs=10, patience=3))
    assert len(reports) == 4 and len({metrics["valid_loss"] for metrics in reports}) == 1


def test_evaluation_is_without_dropout():
    config = tiny_config(**MEL)
    net, loss_function, _ = train.prepare(config)
    data = datasets.load(config)
    indices = data.splits["valid"]
    with torch.no_grad():
        expected = loss_function(net.eval()(data.clips[indices])[0], data.labels[indices]).item()
    for _ in range(2):
        loss, _ = train.evaluate(net.train(), loss_function, data, indices, batch_size=7)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_front_end_with_a_weight_of_its_own_is_trained_in_a_baseline_too(monkeypatch):
    """Its features change, so they are not computed once."""
    front_end, head, loss_function = models.MODELS["linear_net"]

    class Louder(dmel.DifferentiableSpectrogram):
        def forward(self, x):
            return super().forward(x) * self.gain

    def louder(config):
        layer, bands = front_end(config)
        layer.__class__ = Louder
        layer.gain = torch.nn.Parameter(torch.tensor(1.0))
        return layer, bands

    monkeypatch.setitem(models.MODELS, "louder_net", (louder, head, loss_function))
    _, state = run(tiny_config(model_name="louder_net", trainable=False))
    assert state["net"]["spectrogram_layer.gain"] != 1
    assert state["net"]["spectrogram_layer.lambd"] == pytest.approx(tiny_config().init_lambd)


def test_optimizer_groups():
    config = tiny_config(lr_tf=0.3, lr_model=0.07)
    net, _ = models.build(config)
    lambd_group, rest = train.make_optimizer(net, config).param_groups
    assert lambd_group["lr"] == 0.3 and lambd_group["params"] == [net.spectrogram_layer.lambd]
    assert rest["lr"] == 0.07 and len(rest["params"]) == len(list(net.parameters())) - 1
    assert lambd_group["momentum"] == lambd_group["weight_decay"] == 0


def test_loss_that_is_not_finite_ends_the_trial_with_epoch_and_config():
    with pytest.raises(FloatingPointError, match=r"epoch 1: .*'lr_model': 1e\+38"):
        run(tiny_config(lr_model=1e38, trainable=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimized": True}, "optimized: False"),
        ({"dataset_name": "audio_mnist"}, "'resample_rate' is missing: audio_mnist needs it"),
        ({"model_name": "mel_linear_net"}, "'resample_rate' is missing: mel_linear_net needs it"),
    ],
)
def test_check_refuses_what_cannot_be_trained(changes, message):
    with pytest.raises(InputError, match=message):
        train.check(tiny_config(**changes))


@pytest.mark.parametrize("changes", [{}, {**MEL, "optimized": True, "optimizer_name": "adam"}])
def test_kept_features_of_a_fixed_window_change_no_number(changes, monkeypatch):
    config = tiny_config(trainable=False, init_lambd=6.38, batch_size=64, **changes)
    outcomes = []
    dimensions = []  # of what each epoch is trained on: clips have 2, features 3
    train_epoch = train.train_epoch

    def record(net, loss_function, optimizer, data, batches):
        dimensions.append(data.clips.ndim)
        return train_epoch(net, loss_function, optimizer, data, batches)

    monkeypatch.setattr(train, "train_epoch", record)
    for share in (train.FEATURE_MEMORY, 0):
        monkeypatch.setattr(train, "FEATURE_MEMORY", share)
        outcomes.append(run(config))
    (kept, kept_state), (anew, anew_state) = outcomes
    assert dimensions == [3] * 4 + [2] * 4
    for kept_row, row in zip(kept, anew, strict=True):
        assert row == kept_row | {"lacked_memory": True} and not kept_row["lacked_memory"]
        assert row["lambd_est"] == pytest.approx(6.38)
    torch.testing.assert_close(kept_state["best_net"], anew_state["best_net"], rtol=0, atol=0)


def test_tf32_is_off_unless_asked_for():
    for changes in ({"tf32": True}, {}):
        train.prepare(tiny_config(**changes))
        assert torch.backends.cudnn.allow_tf32 == bool(changes)
        assert torch.backends.cuda.matmul.allow_tf32 == bool(changes)


def test_bf16_rounds_the_network_and_not_the_features():
    clips = torch.randn(8, 128)
    outputs = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        net, _, _ = train.prepare(tiny_config(bf16=bf16))
        outputs.append(net(clips))
    (logits, features), (rounded, same) = outputs
    assert rounded.dtype == torch.float32 and torch.equal(features, same)
    assert not torch.equal(logits, rounded)
    torch.testing.assert_close(logits, rounded, rtol=0.05, atol=0.05 * logits.abs().max().item())
