"""One trial: trains the network of a config on its data and reports every epoch. Knows nothing of Ray.

    config = {"dataset_name": "time_frequency", ...}
    train(config, datasets.load(config), lambda metrics, snapshot: print(metrics))

The keys of a config are those of config.py. From what snapshot() gives after an epoch, a trial goes on as if it had
never stopped, to the last bit.
"""

import copy
import math
import os
import sys
import time

import psutil
import torch

import datasets
import dmel
import models
from config import complete

FEATURE_MEMORY = 0.5  # share of a trial's free memory that the features of a fixed window may take
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def train(config, data, report, state=None):
    """Trains until max_epochs, or until patience epochs have passed without a lower validation loss.

    data: datasets.Data. state: what snapshot() gave after an epoch, to go on from there.
    report(row, snapshot) is called after each epoch. row: training_iteration (epochs so far), loss, valid_loss (means
    over examples), valid_acc, best_valid_loss, best_valid_acc (accuracy at the lowest loss), lambd_est, best_lambd_est
    (λ in samples, with its sign), energy (mean over training batches of the summed features), lacked_memory (for
    fixed_features), time_this_iter_s, finished. snapshot() gives, as tensors and plain values, config, history
    (all rows), finished, best_net (the network to test) and, until finished, all that the trial's future depends on.

    Raises FloatingPointError where a loss is not finite.
    """
    given, config = config, check(config)
    begin = time.perf_counter()
    torch.manual_seed(config["seed"])
    shuffle = torch.Generator().manual_seed(config["seed"])
    net, loss_function, device = prepare(config)
    optimizer = make_optimizer(net, config)
    data = data.to(device)
    kept = None if config["trainable"] else fixed_features(data, net.spectrogram_layer, config["batch_size"])
    lambd = net.spectrogram_layer.lambd
    history, stale_epochs, best, best_net = [], 0, {"best_valid_loss": math.inf}, None
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        history, stale_epochs, best, best_net = (state[key] for key in ("history", "stale_epochs", "best", "best_net"))
        shuffle.set_state(state["shuffle"])
        set_random_state(state["random"], device)
    finished = False

    def snapshot():
        result = {"config": given, "history": history, "finished": finished, "best_net": best_net}
        future = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "stale_epochs": stale_epochs,
            "best": best,
            "shuffle": shuffle.get_state(),
            "random": random_state(device),
        }
        return result if finished else result | future

    while not finished:
        train_indices = data.splits["train"]
        order = train_indices[torch.randperm(len(train_indices), generator=shuffle).to(device)]
        loss, energy = train_epoch(net, loss_function, optimizer, data, order.split(config["batch_size"]), kept)
        valid_loss, valid_acc = evaluate(net, loss_function, data, data.splits["valid"], config["batch_size"], kept)
        epoch = len(history) + 1
        if not (math.isfinite(loss) and math.isfinite(valid_loss)):
            raise FloatingPointError(
                f"epoch {epoch}: training loss {loss}, validation loss {valid_loss}, λ {lambd.item()}; config {given}"
            )
        stale_epochs += 1
        if valid_loss < best["best_valid_loss"]:
            best = {"best_valid_loss": valid_loss, "best_valid_acc": valid_acc, "best_lambd_est": lambd.item()}
            best_net = copy.deepcopy(net.state_dict())
            stale_epochs = 0
        finished = epoch == config["max_epochs"] or stale_epochs == config["patience"]
        row = {
            "training_iteration": epoch,
            "loss": loss,
            "valid_loss": valid_loss,
            "valid_acc": valid_acc,
            "lambd_est": lambd.item(),
            "energy": energy,
            "lacked_memory": not config["trainable"] and kept is None,
            "finished": finished,
            **best,
            "time_this_iter_s": time.perf_counter() - begin,
        }
        begin = time.perf_counter()
        history.append(row)
        report(row, snapshot)


def prepare(config):
    """The network of a config on its device, its loss function, and the device: the CPU where there is no CUDA device.

    Also sets for this process whether a GPU may round convolutions and products to TF32.
    """
    config = complete(config)
    device = torch.device(config["device"] if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config["tf32"]
    net, loss_function = models.build(config)
    # On a CPU convolutions are quicker with the channels last in memory.
    net.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format)
    return net, loss_function, device


def make_optimizer(net, config):
    """The optimizer with two groups: λ at its own learning rate, all other weights."""
    groups = dmel.parameter_groups(net, lr_lambd=config["lr_tf"])
    return OPTIMIZERS[config["optimizer_name"]](groups, lr=config["lr_model"], fused=True)


def train_epoch(net, loss_function, optimizer, data, batches, kept=None):
    """One step per batch of indices; returns the loss, mean over examples, and the features' sum, mean over batches.

    kept: see fixed_features.
    """
    net.train()
    total_loss = total_energy = torch.zeros((), device=data.clips.device)  # read once, at the end
    for batch in batches:
        logits, features = predict(net, data, batch, kept)
        loss = loss_function(logits, data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss = total_loss + loss.detach() * len(batch)
        total_energy = total_energy + features.detach().sum()
    return total_loss.item() / sum(map(len, batches)), total_energy.item() / len(batches)


def predict(net, data, batch, kept=None):
    """Logits and features of a batch of indices."""
    if kept is None:
        return net(data.clips.index_select(0, batch))
    return net.classify(kept.index_select(0, batch).transpose(-1, -2))


@torch.no_grad()
def fixed_features(data, layer, batch_size):
    """The layer's features of all that is trained and validated on, shape = (n, frames, bands), None without memory.

    A window that is not trained gives the same ones in every epoch.
    """
    device = data.clips.device
    n_features = len(data.clips) * layer(data.clips[:1]).numel()
    needed, allowed = n_features * data.clips.element_size(), FEATURE_MEMORY * own_memory(device)
    if needed > allowed:
        sizes = f"they need {needed / 2**20:.0f} MiB, a trial may take {allowed / 2**20:.0f} MiB for them"
        print(f"features are computed anew in every epoch: {sizes}", file=sys.stderr)
        return None
    features = None
    for part in ("train", "valid"):
        for batch in data.splits[part].split(batch_size):
            batch_features = layer(data.clips.index_select(0, batch)).transpose(-1, -2)
            if features is None:
                features = batch_features.new_empty(len(data.clips), *batch_features.shape[1:])
            features[batch] = batch_features
    return features


def own_memory(device):
    """Bytes that are free on a device for one of the trials at a time."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 4
    return psutil.virtual_memory().available * torch.get_num_threads() / os.cpu_count()


@torch.no_grad()
def evaluate(net, loss_function, data, indices, batch_size, kept=None):
    """Loss and accuracy (0..1), means over the examples of the given indices."""
    net.eval()
    total_loss = total_correct = torch.zeros((), device=data.clips.device)
    for batch in indices.split(batch_size):
        labels = data.labels[batch]
        logits, _ = predict(net, data, batch, kept)
        total_loss = total_loss + loss_function(logits, labels) * len(batch)
        total_correct = total_correct + (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(indices), total_correct.item() / len(indices)


def random_state(device):
    """State of the generator that dropout and masks draw from, for set_random_state."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state, device):
    """Takes back what random_state gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def check(config):
    """The complete config; raises InputError where it cannot be trained, as far as that shows without its data."""
    config = complete(config)
    datasets.check(config)
    with torch.device("meta"):  # shapes without memory
        models.build(config)
    return config
