"""One trial: trains the network of a config on its data and reports every epoch. Knows nothing of Ray.

    config = {"dataset_name": "time_frequency", ...}
    train(config, datasets.load(config), lambda metrics, snapshot: print(metrics))

The keys of a config are those of search_spaces.KEYS, each with one value.
"""

import copy
import math

import torch

import models
from datasets import InputError

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
TRIAL_KEYS = ("batch_size", "max_epochs", "patience", "device")  # read here, beside those of networks and optimizers
PULSES_KEYS = ("n_samples", "n_points", "noise_std", "sigma_ref", "center_offset")


def train(config, data, report, state=None):
    """Trains until max_epochs, or until patience epochs have passed without a lower validation loss.

    data: datasets.Data. state: what snapshot() gave after an epoch, to go on from there.
    report(metrics, snapshot) is called after each epoch. metrics: loss, valid_loss (means over examples), valid_acc,
    best_valid_loss, best_valid_acc (accuracy at the lowest loss), lambd_est, best_lambd_est (λ in samples, with its
    sign), energy (mean over training batches of the summed features), finished. snapshot() gives all that the trial's
    future depends on, as tensors and numbers; its entry best_net is the network to test.

    Raises FloatingPointError where a loss is not finite.
    """
    device = choose_device(config)
    torch.manual_seed(config["seed"])
    shuffle = torch.Generator().manual_seed(config["seed"])
    net, loss_function = models.build(config)
    net.to(device)
    optimizer = make_optimizer(net, config)
    data = data.to(device)
    lambd = net.spectrogram_layer.lambd
    epoch, stale_epochs, best, best_net = 0, 0, {"best_valid_loss": math.inf}, None
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, stale_epochs, best, best_net = (state[key] for key in ("epoch", "stale_epochs", "best", "best_net"))
        shuffle.set_state(state["shuffle"])
        set_random_state(state["random"], device)

    def snapshot():
        return {
            "net": net.state_dict(),
            "best_net": best_net,
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "stale_epochs": stale_epochs,
            "best": best,
            "shuffle": shuffle.get_state(),
            "random": random_state(device),
        }

    while epoch < config["max_epochs"] and stale_epochs < config["patience"]:
        train_indices = data.splits["train"]
        order = train_indices[torch.randperm(len(train_indices), generator=shuffle).to(device)]
        loss, energy = train_epoch(net, loss_function, optimizer, data, order.split(config["batch_size"]))
        valid_loss, valid_acc = evaluate(net, loss_function, data, data.splits["valid"], config["batch_size"])
        epoch += 1
        if not (math.isfinite(loss) and math.isfinite(valid_loss)):
            raise FloatingPointError(
                f"epoch {epoch}: training loss {loss}, validation loss {valid_loss}, λ {lambd.item()}; config {config}"
            )
        stale_epochs += 1
        if valid_loss < best["best_valid_loss"]:
            best = {"best_valid_loss": valid_loss, "best_valid_acc": valid_acc, "best_lambd_est": lambd.item()}
            best_net = copy.deepcopy(net.state_dict())
            stale_epochs = 0
        metrics = {
            "loss": loss,
            "valid_loss": valid_loss,
            "valid_acc": valid_acc,
            "lambd_est": lambd.item(),
            "energy": energy,
            "finished": epoch == config["max_epochs"] or stale_epochs == config["patience"],
        }
        report(metrics | best, snapshot)


def choose_device(config):
    """The config's device, the CPU where there is no CUDA device."""
    return torch.device(config["device"] if torch.cuda.is_available() else "cpu")


def make_optimizer(net, config):
    """The optimizer with two groups: λ at its own learning rate, all other weights."""
    groups = [
        {"params": net.spectrogram_layer.parameters(), "lr": config["lr_tf"]},
        {"params": net.head.parameters(), "lr": config["lr_model"]},
    ]
    return OPTIMIZERS[config["optimizer_name"]](groups)


def train_epoch(net, loss_function, optimizer, data, batches):
    """One step per batch of indices; returns the loss, mean over examples, and the features' sum, mean over batches."""
    net.train()
    total_loss = total_energy = torch.zeros((), device=data.clips.device)  # read once, at the end
    for batch in batches:
        logits, features = net(data.clips[batch])
        loss = loss_function(logits, data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss = total_loss + loss.detach() * len(batch)
        total_energy = total_energy + features.detach().sum()
    return total_loss.item() / sum(map(len, batches)), total_energy.item() / len(batches)


@torch.no_grad()
def evaluate(net, loss_function, data, indices, batch_size):
    """Loss and accuracy (0..1), means over the examples of the given indices."""
    net.eval()
    total_loss = total_correct = torch.zeros((), device=data.clips.device)
    for batch in indices.split(batch_size):
        labels = data.labels[batch]
        logits, _ = net(data.clips[batch])
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
    """Raises InputError where a config cannot be trained, as far as that can be told without its data."""
    try:
        if config["optimizer_name"] not in OPTIMIZERS:
            raise InputError(f"config: optimizer_name '{config['optimizer_name']}' is not one of {list(OPTIMIZERS)}.")
        for key in TRIAL_KEYS + (PULSES_KEYS if config["dataset_name"] == "time_frequency" else ()):
            config[key]
        with torch.device("meta"):  # shapes without memory
            net, _ = models.build(config)
        make_optimizer(net, config)
    except KeyError as error:
        raise InputError(f"config: key {error} is missing: add it to the search space.") from None
    except ValueError as error:
        raise InputError(str(error)) from None
