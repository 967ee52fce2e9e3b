"""The networks: a front end with a trainable window × a classifier head, chosen by model_name from
MODELS.

A front end takes the config and gives a layer, with λ as its lambd, and its number of bands. A head
takes the number of frames, bands and classes and the config, and gives a module from features
(batch, 1, frames, bands) to logits.
"""

import re
from collections import OrderedDict
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

from config import InputError, complete, require
from datasets import DATASETS, PULSES_CLASSES
from dmel import DMEL, DifferentiableSpectrogram

DROPOUT = 0.2


class SpectrogramNet(nn.Module):
    """A spectrogram layer and the head that classifies its features, in bfloat16 where bf16 is
    True.
    """

    def __init__(self, spectrogram_layer, head, bf16=False):
        super().__init__()
        self.spectrogram_layer = spectrogram_layer
        self.head = head
        self.bf16 = bf16

    def forward(self, clips):
        """Clips, shape = (batch, time), to logits (batch, n_classes) and features (batch, 1, bands,
        frames).
        """
        features = self.spectrogram_layer(clips).unsqueeze(1)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            # Heads take time first: that is how PANNs are trained and how the layer's output lies
            # in memory.
            logits = self.head(features.transpose(-1, -2))
        return logits.to(features.dtype), features


def power_spectrogram(config):
    if config["optimized"]:
        raise InputError(
            f"config: {config['model_name']} needs optimized: False, its input cannot change size with λ."
        )
    arguments = {key: config[key] for key in ("hop_length", "init_lambd", "normalize_window")}
    return DifferentiableSpectrogram(**arguments), config["n_points"] + 1


def log_mel(config):
    require(config, config["model_name"], "resample_rate", "n_mels", "energy_normalize")
    same = (
        "n_mels",
        "hop_length",
        "init_lambd",
        "normalize_window",
        "optimized",
        "continuous",
        "zero_floor",
    )
    arguments = {key: config[key] for key in same}
    return DMEL(config["resample_rate"], log=config["energy_normalize"], **arguments), config[
        "n_mels"
    ]


def linear(frames, bands, n_classes, config, normalize=False, dropout=False):
    first = [BandNorm(bands)] * normalize + [Dropout(DROPOUT)] * dropout
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(frames * bands, n_classes))


def mlp(frames, bands, n_classes, config, hidden=128, dropout=False):
    between = [nn.ReLU()] + [Dropout(DROPOUT)] * dropout
    return nn.Sequential(
        nn.Flatten(), nn.Linear(frames * bands, hidden), *between, nn.Linear(hidden, n_classes)
    )


def convolution(frames, bands, n_classes, config):
    features = [nn.Conv2d(1, 32, kernel_size=5, padding="same"), nn.ReLU()]
    return nn.Sequential(*features, *mlp(frames, 32 * bands, n_classes, config, hidden=32))


class Cnn6(nn.Module):
    """Cnn6 of Kong et al., PANNs: Large-scale pretrained audio neural networks for audio pattern
    recognition, 2020.
    """

    def __init__(self, frames, bands, n_classes, config):
        super().__init__()
        if min(frames, bands) < 16:  # it halves them four times
            raise InputError(
                f"config: panns_cnn6 needs 16 or more of both: {frames} frames and n_mels = {bands}."
            )
        self.augment = config["augment"]
        self.bn1 = nn.BatchNorm2d(bands)
        for i, (before, after) in enumerate(pairwise([1, 64, 128, 256, 512]), start=1):
            convolution = nn.Conv2d(before, after, kernel_size=5, padding=2, bias=False)
            named = OrderedDict(
                conv1=convolution, bn1=nn.BatchNorm2d(after)
            )  # as in the published checkpoint
            block = nn.Sequential(named).extend(
                [nn.ReLU(inplace=True), nn.AvgPool2d(2), Dropout(DROPOUT)]
            )
            self.add_module(f"conv_block{i}", block)  # halves frames and bands
        self.dropout = Dropout(0.5)
        self.fc1 = nn.Linear(512, 512)
        self.fc_esc50 = nn.Linear(512, n_classes)
        for weight in (parameter for parameter in self.parameters() if parameter.ndim > 1):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc_esc50.bias)
        if config["pretrained"]:
            load_published(self, config["checkpoint_path"])

    def forward(self, x):
        x = self.bn1(x.transpose(1, 3)).transpose(1, 3)  # (batch, 1, frames, bands)
        if self.training and self.augment:  # up to 64 frames and 8 bands of each example are 0
            x = torchaudio.functional.mask_along_axis_iid(x, mask_param=64, mask_value=0.0, axis=2)
            x = torchaudio.functional.mask_along_axis_iid(x, mask_param=8, mask_value=0.0, axis=3)
        x = self.conv_block4(self.conv_block3(self.conv_block2(self.conv_block1(x))))
        x = x.mean(dim=3)  # (batch, 512, frames // 16)
        x = x.amax(dim=2) + x.mean(dim=2)  # (batch, 512)
        x = self.dropout(F.relu(self.fc1(self.dropout(x))))  # (batch, 512)
        return self.fc_esc50(x)


def one_hot_cross_entropy(logits, labels):
    """Binary cross entropy of sigmoid outputs against one-hot labels, mean over batch and classes."""
    return F.binary_cross_entropy_with_logits(
        logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    )


MODELS = {  # model_name: (front end, head, loss of logits and labels)
    "linear_net": (power_spectrogram, linear, F.cross_entropy),
    "bn_linear_net": (power_spectrogram, partial(linear, normalize=True), F.cross_entropy),
    "mlp_net": (power_spectrogram, mlp, F.cross_entropy),
    "conv_net": (power_spectrogram, convolution, F.cross_entropy),
    "mel_linear_net": (log_mel, partial(linear, dropout=True), F.cross_entropy),
    "mel_plain_linear_net": (log_mel, linear, F.cross_entropy),
    "mel_bn_linear_net": (log_mel, partial(linear, normalize=True, dropout=True), F.cross_entropy),
    "mel_mlp_net": (log_mel, partial(mlp, hidden=32, dropout=True), F.cross_entropy),
    "mel_conv_net": (log_mel, convolution, F.cross_entropy),
    "panns_cnn6": (log_mel, Cnn6, one_hot_cross_entropy),
}


def build(config):
    """The network of a config and its loss function; raises InputError where it cannot be built."""
    config = complete(config)
    if config["model_name"] not in MODELS:
        raise InputError(
            f"config: model_name '{config['model_name']}' is not one of {', '.join(MODELS)}."
        )
    front_end, head, loss_function = MODELS[config["model_name"]]
    spectrogram_layer, bands = front_end(config)
    spectrogram_layer.lambd.requires_grad_(config["trainable"])
    frames = config["n_points"] // config["hop_length"] + 1
    dataset = DATASETS.get(config["dataset_name"])  # None: the drawn one
    head = head(frames, bands, dataset.n_classes if dataset else PULSES_CLASSES, config)
    return SpectrogramNet(spectrogram_layer, head, config["bf16"]), loss_function


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU 16 random bits per element draw the mask, a quarter of the time that
    torch's own takes.
    """

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = (
            torch.empty(-(-x.numel() // 4), dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)
        )
        mask = torch.empty_like(x, requires_grad=False)  # filled in the order of memory
        torch.ge(
            bits[: x.numel()],
            round(self.p * 2**16) - 2**15,
            out=mask.as_strided((x.numel(),), (1,)),
        )
        return x * mask.div_(1 - self.p)


class BandNorm(nn.BatchNorm1d):
    """Batch norm over frequency bands, input and output shape = (batch, 1, frames, bands)."""

    def forward(self, x):
        return super().forward(x.squeeze(1).transpose(1, 2)).transpose(1, 2).unsqueeze(1)


def load_published(net, path):
    """Fills a Cnn6 with the weights of the published AudioSet checkpoint at path, all but the
    classifier.
    """
    # Beside the weights the file may hold numpy arrays and numbers of the authors' sampler, under
    # numpy 1's names.
    numpy_globals = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    for function in (np._core.multiarray._reconstruct, np._core.multiarray.scalar):
        numpy_globals += [function, (function, f"numpy.core.multiarray.{function.__name__}")]
    try:
        with torch.serialization.safe_globals(numpy_globals):
            published = torch.load(path or "", map_location="cpu", weights_only=True)["model"]
        weights = {
            key: published[re.sub("^bn1", "bn0", key)]
            for key in net.state_dict()
            if "esc50" not in key
        }
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("it holds weights that are not numbers")
        net.load_state_dict(weights, strict=False)
    except Exception as error:  # a file of something else can fail in every way
        reason = f"'{path}' is not Cnn6_mAP=0.343.pth of https://zenodo.org/records/3987831 ({error!r:.300})"
        raise InputError(f"config: checkpoint_path {reason}: fetch that and name it.") from None
