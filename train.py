"""One trial: trains the network of a config on its data and reports every epoch.

It knows nothing of Ray. To run one:

    train(config, datasets.load(config), lambda row, snapshot: print(row))

config.py has the keys of a config.
"""

import copy
import math
import os
import time
import warnings

import torch
from torch import nn

import datasets
import dmel
import machine
import models
from config import InputError

FEATURE_MEMORY = 0.5  # share of a trial's free memory that the features of a fixed window may take
GPU_BATCH_BYTES = 2**26  # of features, where a GPU computes without gradients


def train(config, data, report, state=None, gpus=1):
    """Trains until max_epochs, or until patience epochs brought no lower validation loss.

    config: a Config. data: datasets.Data. state: what snapshot() gave after an epoch, to go on from
    there as if it had never stopped, with the max_epochs of this config. gpus: share of its GPU
    that is the trial's.

    report(row, snapshot) is called after each epoch. A row has training_iteration (epochs so far),
    loss, valid_loss (means over examples), valid_acc, best_epoch (that of the lowest validation
    loss), best_valid_loss, best_valid_acc, best_lambd_est (of that epoch), lambd_est (λ in samples,
    with its sign), energy (mean over training batches of the summed features), lacked_memory (see
    fixed_features), time_this_iter_s. snapshot() gives, as tensors and plain values, the history
    (all rows), best_net (the network to test) and, unless patience ran out, all that the trial's
    future depends on.

    Raises FloatingPointError where a loss or λ is not finite.
    """
    begin = time.perf_counter()
    torch.manual_seed(config.seed)
    net, loss_function, device = prepare(config)
    optimizer = make_optimizer(net, config)
    shuffle = torch.Generator().manual_seed(config.seed)
    random = generator_of(device)

    history = []
    best_net = None
    if state is not None:
        history = state["history"]
        best_net = state["best_net"]
        restore(state, net, optimizer, shuffle, random)

    data = data.to(device)
    large_batch = batch_without_gradients(net.spectrogram_layer, data.clips, config.batch_size)
    evaluation_batch = large_batch
    if has_convolutions(net):
        evaluation_batch = config.batch_size

    trained = net
    lacked_memory = False
    # A front end may have weights of its own, whatever config.trainable says of λ.
    if not any(weight.requires_grad for weight in net.spectrogram_layer.parameters()):
        features = fixed_features(data, net.spectrogram_layer, large_batch, gpus)
        if features is None:
            lacked_memory = True
        else:
            data = data._replace(clips=features)
            trained = BehindFeatures(net)

    def snapshot():
        result = {"history": history, "best_net": best_net}
        if not config.lost_patience(history[-1]):
            result["net"] = net.state_dict()
            result["optimizer"] = optimizer.state_dict()
            result["shuffle"] = shuffle.get_state()
            result["random"] = random.get_state()
        return result

    while not history or not config.is_finished(history[-1]):
        order = torch.randperm(len(data.splits["train"]), generator=shuffle).to(device)
        batches = data.splits["train"][order].split(config.batch_size)
        loss, energy = train_epoch(trained, loss_function, optimizer, data, batches)
        valid_loss, valid_acc = evaluate(
            trained, loss_function, data, data.splits["valid"], evaluation_batch
        )

        epoch = len(history) + 1
        lambd = net.spectrogram_layer.lambd.item()
        if not all(math.isfinite(value) for value in (loss, valid_loss, lambd)):
            raise FloatingPointError(
                f"epoch {epoch}: training loss {loss}, validation loss {valid_loss}, λ {lambd}; "
                f"config {config.model_dump(exclude_defaults=True)}"
            )

        row = {
            "training_iteration": epoch,
            "loss": loss,
            "valid_loss": valid_loss,
            "valid_acc": valid_acc,
            "lambd_est": lambd,
            "energy": energy,
            "lacked_memory": lacked_memory,
        }
        best = min([*history, row], key=lambda row: row["valid_loss"])  # the first of equal ones
        if best is row:
            best_net = copy.deepcopy(net.state_dict())
        row["best_epoch"] = best["training_iteration"]
        for key in ("valid_loss", "valid_acc", "lambd_est"):
            row[f"best_{key}"] = best[key]
        row["time_this_iter_s"] = time.perf_counter() - begin
        begin = time.perf_counter()

        history.append(row)
        report(row, snapshot)


def check(config):
    """Raises InputError where a Config cannot be trained, as far as that shows without its data."""
    datasets.check(config)
    with torch.device("meta"), warnings.catch_warnings():  # shapes without memory
        # Published weights are compared with these shapes, and not copied.
        warnings.filterwarnings("ignore", message=".*which is a no-op")
        models.build(config)


def prepare(config):
    """The network of a config on its device, its loss function, and the device.

    That is the CPU where there is no CUDA device. Raises InputError where torch cannot compute on
    the device.
    """
    device = torch.device(config.device if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if (device.index or 0) >= n_gpus:
            raise InputError(
                f"config: device = {device} is not on this machine, which has {n_gpus} of them: "
                "write cuda:0 in the search space, and run main.py again."
            )
        machine.check_gpu(device, config.bf16)
    # torch counts the CPUs of the machine, where a container or batch job may use a part of them.
    torch.set_num_threads(min(torch.get_num_threads(), machine.cpus()))
    torch.backends.cudnn.allow_tf32 = config.tf32  # of this process
    torch.backends.cuda.matmul.allow_tf32 = config.tf32

    net, loss_function = models.build(config)
    memory_format = torch.preserve_format
    if device.type == "cpu":
        memory_format = torch.channels_last  # there convolutions are quicker with it
    net.to(device, memory_format=memory_format)
    return net, loss_function, device


def make_optimizer(net, config):
    """The optimizer with two groups: λ at its own learning rate, all other weights."""
    os.environ.update(machine.torch_settings())
    groups = dmel.parameter_groups(net, lr_lambd=config.lr_tf)
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer_name]
    return optimizer(groups, lr=config.lr_model, fused=True)


def generator_of(device):
    """The generator that dropout and masks draw from: the device's own."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def restore(state, net, optimizer, shuffle, random):
    """Puts network, optimizer and generators where a snapshot left them, on whichever device."""
    net.load_state_dict(state["net"])

    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        for weight in group["params"]:
            # A fused step goes through raw memory, so its state needs the layout of the weight,
            # which is another one where the trial began on another kind of device.
            for name, value in optimizer.state[weight].items():
                if value.shape == weight.shape:
                    optimizer.state[weight][name] = torch.empty_like(weight).copy_(value)

    shuffle.set_state(state["shuffle"])
    if len(state["random"]) == len(random.get_state()):  # otherwise of another kind of device
        random.set_state(state["random"])


class BehindFeatures(nn.Module):
    """A SpectrogramNet that is given its layer's features, (batch, frames, bands), for clips."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, features):
        """Logits, shape = (batch, n_classes), and the features once more."""
        as_image = features.unsqueeze(2).transpose(1, 2)  # (batch, 1, frames, bands)
        return self.net.classify(as_image), features


def train_epoch(net, loss_function, optimizer, data, batches):
    """One step per batch of indices.

    Returns the loss, mean over examples, and the sum of the features, mean over batches.
    """
    net.train()
    # Read once, at the end: a GPU need not be waited for in between.
    total_loss = torch.zeros((), device=data.clips.device)
    total_energy = torch.zeros((), device=data.clips.device)

    for batch in batches:
        logits, features = net(data.clips.index_select(0, batch))
        loss = loss_function(logits, data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss = total_loss + loss.detach() * len(batch)
        total_energy = total_energy + features.detach().sum()

    n_examples = sum(len(batch) for batch in batches)
    return total_loss.item() / n_examples, total_energy.item() / len(batches)


@torch.no_grad()
def evaluate(net, loss_function, data, indices, batch_size):
    """Loss and accuracy (0..1), means over the examples of the given indices."""
    net.eval()
    total_loss = torch.zeros((), device=data.clips.device)
    total_correct = torch.zeros((), device=data.clips.device)

    for batch in indices.split(batch_size):
        labels = data.labels[batch]
        logits, _ = net(data.clips.index_select(0, batch))
        total_loss = total_loss + loss_function(logits, labels) * len(batch)
        total_correct = total_correct + (logits.argmax(dim=1) == labels).sum()

    return total_loss.item() / len(indices), total_correct.item() / len(indices)


@torch.no_grad()
def batch_without_gradients(layer, clips, batch_size):
    """How many clips a layer takes at a time without gradients, batch_size or more.

    On a GPU they are so many that their features fill GPU_BATCH_BYTES, since as many kernels start
    for a small batch as for a large one. A CPU keeps its batches: sums over others would round
    differently, and the kept numbers would move.
    """
    if not clips.is_cuda:
        return batch_size
    return max(batch_size, GPU_BATCH_BYTES // layer(clips[:1]).nbytes)


def has_convolutions(net):
    """Whether a network needs far more memory than the features that go into it.

    Each of the 64 channels of Cnn6's first block is as large as they are, 8 MB together for a clip
    of esc50, and trials share a GPU.
    """
    return any(isinstance(module, nn.Conv2d) for module in net.modules())


@torch.no_grad()
def fixed_features(data, layer, batch_size, gpus=1):
    """The layer's features of all that is trained and validated on, the same in every epoch.

    batch_size: clips at a time. gpus: share of its GPU that is the trial's.

    Returns (n, frames, bands) in the order of data.clips, where those of other parts are not
    filled, or None where that takes too much memory.
    """
    first = layer(data.clips[:1]).transpose(-1, -2)
    if first.is_cuda:
        free = machine.free_gpu_memory(first.device, gpus)
    else:
        free = machine.free_memory() * torch.get_num_threads() / machine.cpus()
    if len(data.clips) * first.nbytes > FEATURE_MEMORY * free:
        return None

    features = first.new_empty(len(data.clips), *first.shape[1:])
    for part in ("train", "valid"):
        for batch in data.splits[part].split(batch_size):
            features[batch] = layer(data.clips.index_select(0, batch)).transpose(-1, -2)
    return features
