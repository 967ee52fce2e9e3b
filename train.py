"""One trial: trains the network of a config on its data and reports every epoch. Knows nothing of
Ray.

train(config, datasets.load(config), lambda row, snapshot: print(row)) runs one; config.py has the
keys of a config.
"""

import copy
import math
import os
import time

import psutil
import torch

import datasets
import dmel
import models
from config import complete

FEATURE_MEMORY = 0.5  # share of a trial's free memory that the features of a fixed window may take


def train(config, data, report, state=None):
    """Trains until max_epochs, or until patience epochs have passed without a lower validation
    loss.

    data: datasets.Data. state: what snapshot() gave after an epoch, to go on from there as if it
    had never stopped. report(row, snapshot) is called after each epoch. row: training_iteration
    (epochs so far), loss, valid_loss (means over examples), valid_acc, best_valid_loss,
    best_valid_acc (accuracy at the lowest loss), lambd_est, best_lambd_est (λ in samples, with its
    sign), energy (mean over training batches of the summed features), lacked_memory (for
    fixed_features), time_this_iter_s, finished. snapshot() gives, as tensors and plain values,
    config, history (all rows), finished, best_net (the network to test) and, until finished, all
    that the trial's future depends on. Raises FloatingPointError where a loss is not finite.
    """
    given, config = config, check(config)
    begin = time.perf_counter()
    torch.manual_seed(config["seed"])
    net, loss_function, device = prepare(config)
    optimizer = make_optimizer(net, config)
    data, trained = data.to(device), net
    features = (
        None
        if config["trainable"]
        else fixed_features(data, net.spectrogram_layer, config["batch_size"])
    )
    lacked_memory = not config["trainable"] and features is None
    if (
        features is not None
    ):  # the same in every epoch: the head trains on them in the place of clips
        data = data._replace(clips=features)
        trained = models.SpectrogramNet(
            lambda features: features.transpose(-1, -2), net.head, net.bf16
        )
    lambd = net.spectrogram_layer.lambd
    shuffle = torch.Generator().manual_seed(config["seed"])
    # Dropout and masks draw from the device's own generator.
    chance = (
        torch.cuda.default_generators[device.index or 0]
        if device.type == "cuda"
        else torch.default_generator
    )
    history, finished, best_net = [], False, None
    if state is not None:
        history, best_net = state["history"], state["best_net"]
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        shuffle.set_state(state["shuffle"])
        if len(state["random"]) == len(
            chance.get_state()
        ):  # otherwise it began on a device of another kind
            chance.set_state(state["random"])

    def snapshot():
        result = {"config": given, "history": history, "finished": finished, "best_net": best_net}
        if not finished:
            result |= {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
            result |= {"shuffle": shuffle.get_state(), "random": chance.get_state()}
        return result

    while not finished:
        order = torch.randperm(len(data.splits["train"]), generator=shuffle).to(device)
        batches = data.splits["train"][order].split(config["batch_size"])
        loss, energy = train_epoch(trained, loss_function, optimizer, data, batches)
        valid_loss, valid_acc = evaluate(
            trained, loss_function, data, data.splits["valid"], config["batch_size"]
        )
        epoch = len(history) + 1
        if not (math.isfinite(loss) and math.isfinite(valid_loss)):
            told = f"training loss {loss}, validation loss {valid_loss}, λ {lambd.item()}; config {given}"
            raise FloatingPointError(f"epoch {epoch}: {told}")
        row = {
            "training_iteration": epoch,
            "loss": loss,
            "valid_loss": valid_loss,
            "valid_acc": valid_acc,
        }
        row |= {"lambd_est": lambd.item(), "energy": energy, "lacked_memory": lacked_memory}
        history.append(row)
        best = min(history, key=lambda row: row["valid_loss"])  # the first of equal ones
        if best is row:
            best_net = copy.deepcopy(net.state_dict())
        finished = (
            epoch == config["max_epochs"]
            or epoch - best["training_iteration"] == config["patience"]
        )
        row |= {"finished": finished} | {
            f"best_{key}": best[key] for key in ("valid_loss", "valid_acc", "lambd_est")
        }
        row["time_this_iter_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        report(row, snapshot)


def prepare(config):
    """The network of a config on its device, its loss function, the device: the CPU where there is
    no CUDA device.
    """
    config = complete(config)
    device = torch.device(config["device"] if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config[
        "tf32"
    ]  # of this process
    net, loss_function = models.build(config)
    # On a CPU convolutions are quicker with the channels last in memory.
    net.to(
        device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format
    )
    return net, loss_function, device


def make_optimizer(net, config):
    """The optimizer with two groups: λ at its own learning rate, all other weights."""
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config["optimizer_name"]]
    return optimizer(
        dmel.parameter_groups(net, lr_lambd=config["lr_tf"]), lr=config["lr_model"], fused=True
    )


def train_epoch(net, loss_function, optimizer, data, batches):
    """One step per batch of indices; returns the loss, mean over examples, and the features' sum,
    mean over batches.
    """
    net.train()
    total_loss = total_energy = torch.zeros((), device=data.clips.device)  # read once, at the end
    for batch in batches:
        logits, features = net(data.clips.index_select(0, batch))
        loss = loss_function(logits, data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss = total_loss + loss.detach() * len(batch)
        total_energy = total_energy + features.detach().sum()
    return total_loss.item() / sum(map(len, batches)), total_energy.item() / len(batches)


@torch.no_grad()
def fixed_features(data, layer, batch_size):
    """The layer's features of all that is trained and validated on, shape = (n, frames, bands),
    None without memory.
    """
    first = layer(data.clips[:1]).transpose(-1, -2)
    if first.is_cuda:
        free = torch.cuda.mem_get_info(first.device)[0] / 4
    else:
        free = psutil.virtual_memory().available * torch.get_num_threads() / os.cpu_count()
    if len(data.clips) * first.nbytes > FEATURE_MEMORY * free:
        return None
    features = first.new_empty(len(data.clips), *first.shape[1:])
    for part in ("train", "valid"):
        for batch in data.splits[part].split(batch_size):
            features[batch] = layer(data.clips.index_select(0, batch)).transpose(-1, -2)
    return features


@torch.no_grad()
def evaluate(net, loss_function, data, indices, batch_size):
    """Loss and accuracy (0..1), means over the examples of the given indices."""
    net.eval()
    total_loss = total_correct = torch.zeros((), device=data.clips.device)
    for batch in indices.split(batch_size):
        labels = data.labels[batch]
        logits, _ = net(data.clips.index_select(0, batch))
        total_loss = total_loss + loss_function(logits, labels) * len(batch)
        total_correct = total_correct + (logits.argmax(dim=1) == labels).sum()
    return total_loss.item() / len(indices), total_correct.item() / len(indices)


def check(config):
    """The complete config; raises InputError where it cannot be trained, as far as that shows
    without its data.
    """
    config = complete(config)
    datasets.check(config)
    with torch.device("meta"):  # shapes without memory
        models.build(config)
    return config
