"""The networks: a front end with a trainable window × a classifier head, chosen from MODELS.

A front end takes the config and gives a layer, with λ as its lambd, and its number of bands. A head
takes the number of frames, bands and classes and the config, and gives a module from features
(batch, 1, frames, bands) to logits (batch, classes).
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

from config import InputError, hash_of_file, require
from datasets import n_classes
from dmel import DMEL, DifferentiableSpectrogram

DROPOUT = 0.2
CNN6_HALVINGS = 4  # of frames and bands, by its blocks


class SpectrogramNet(nn.Module):
    """A spectrogram layer and a head that classifies its features, in bfloat16 with bf16."""

    def __init__(self, spectrogram_layer, head, bf16=False):
        super().__init__()
        self.spectrogram_layer = spectrogram_layer
        self.head = head
        self.bf16 = bf16

    def forward(self, clips):
        """Clips (batch, time) to logits (batch, n_classes), features (batch, 1, bands, frames)."""
        features = self.spectrogram_layer(clips).unsqueeze(1)
        return self.classify(features.transpose(-1, -2)), features

    def classify(self, features):
        """Logits of features, shape = (batch, 1, frames, bands).

        Time comes first, as PANNs are trained and as the layer's output lies in memory.
        """
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.head(features)
        return logits.to(features.dtype)


# Front ends


def power_spectrogram(config):
    """A DifferentiableSpectrogram, and its number of bins."""
    if config.optimized:
        raise InputError(
            f"config: {config.model_name} needs optimized: False, its input cannot change size "
            "with λ."
        )
    layer = DifferentiableSpectrogram(
        hop_length=config.hop_length,
        init_lambd=config.init_lambd,
        normalize_window=config.normalize_window,
    )
    return layer, config.n_points + 1


def log_mel(config):
    """A DMEL, and its number of mel bands."""
    require(config, config.model_name, "resample_rate", "n_mels", "energy_normalize")
    layer = DMEL(
        sample_rate=config.resample_rate,
        n_mels=config.n_mels,
        hop_length=config.hop_length,
        init_lambd=config.init_lambd,
        normalize_window=config.normalize_window,
        log=config.energy_normalize,
        optimized=config.optimized,
        continuous=config.continuous,
        zero_floor=config.zero_floor,
    )
    return layer, config.n_mels


# Heads


def linear(frames, bands, n_classes, config, normalize=False, dropout=False):
    """One linear layer, behind batch norm and dropout where asked for."""
    layers = []
    if normalize:
        layers.append(BandNorm(bands))
    if dropout:
        layers.append(Dropout(DROPOUT))
    layers.append(nn.Flatten())
    layers.append(nn.Linear(frames * bands, n_classes))
    return nn.Sequential(*layers)


def mlp(frames, bands, n_classes, config, hidden=128, dropout=False):
    """One hidden layer, with dropout behind it where asked for."""
    layers = [nn.Flatten(), nn.Linear(frames * bands, hidden), nn.ReLU()]
    if dropout:
        layers.append(Dropout(DROPOUT))
    layers.append(nn.Linear(hidden, n_classes))
    return nn.Sequential(*layers)


def convolution(frames, bands, n_classes, config):
    """32 channels of 5 × 5 filters, and a hidden layer of 32."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=5, padding="same"),
        nn.ReLU(),
        *mlp(frames, 32 * bands, n_classes, config, hidden=32),
    )


class Cnn6(nn.Module):
    """Cnn6 of Kong et al., "PANNs: Large-scale pretrained audio neural networks", 2020."""

    def __init__(self, frames, bands, n_classes, config):
        super().__init__()
        smallest = 2**CNN6_HALVINGS
        if min(frames, bands) < smallest:
            raise InputError(
                f"config: panns_cnn6 needs {smallest} or more of both: {frames} frames and "
                f"n_mels = {bands}."
            )

        self.augment = config.augment
        self.bn1 = nn.BatchNorm2d(bands)
        channels = [1, 64, 128, 256, 512]
        for number, (before, after) in enumerate(pairwise(channels), start=1):
            self.add_module(f"conv_block{number}", conv_block(before, after))
        self.dropout = Dropout(0.5)
        self.fc1 = nn.Linear(512, 512)
        self.fc_esc50 = nn.Linear(512, n_classes)

        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc_esc50.bias)
        if config.pretrained:
            load_published(self, config.checkpoint_path, config.checkpoint_sha256)

    def forward(self, x):
        """Features, (batch, 1, frames, bands), to logits (batch, n_classes)."""
        x = self.bn1(x.transpose(1, 3)).transpose(1, 3)  # (batch, 1, frames, bands)
        if self.training and self.augment:  # up to 64 frames and 8 bands of each example are 0
            x = torchaudio.functional.mask_along_axis_iid(x, mask_param=64, mask_value=0.0, axis=2)
            x = torchaudio.functional.mask_along_axis_iid(x, mask_param=8, mask_value=0.0, axis=3)

        x = self.conv_block1(x)
        x = self.conv_block2(x)
        x = self.conv_block3(x)
        x = self.conv_block4(x)  # (batch, 512, frames // 16, bands // 16)

        x = x.mean(dim=3)  # (batch, 512, frames // 16)
        x = x.amax(dim=2) + x.mean(dim=2)  # (batch, 512)

        x = self.dropout(x)
        x = F.relu(self.fc1(x))  # (batch, 512)
        x = self.dropout(x)
        return self.fc_esc50(x)


def conv_block(before, after):
    """A block of Cnn6, which halves frames and bands; names as in the published checkpoint."""
    layers = OrderedDict(
        conv1=nn.Conv2d(before, after, kernel_size=5, padding=2, bias=False),
        bn1=nn.BatchNorm2d(after),
    )
    return nn.Sequential(layers).extend(
        [nn.ReLU(inplace=True), nn.AvgPool2d(2), Dropout(DROPOUT)],
    )


def one_hot_cross_entropy(logits, labels):
    """Binary cross entropy of sigmoid outputs against one-hot labels, mean over all of them."""
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, one_hot)


MODELS = {  # model_name: (front end, head, loss of logits and labels)
    "linear_net": (power_spectrogram, linear, F.cross_entropy),
    "bn_linear_net": (power_spectrogram, partial(linear, normalize=True), F.cross_entropy),
    "mlp_net": (power_spectrogram, mlp, F.cross_entropy),
    "conv_net": (power_spectrogram, convolution, F.cross_entropy),
    "mel_linear_net": (log_mel, partial(linear, dropout=True), F.cross_entropy),
    "mel_plain_linear_net": (log_mel, linear, F.cross_entropy),
    "mel_bn_linear_net": (
        log_mel,
        partial(linear, normalize=True, dropout=True),
        F.cross_entropy,
    ),
    "mel_mlp_net": (log_mel, partial(mlp, hidden=32, dropout=True), F.cross_entropy),
    "mel_conv_net": (log_mel, convolution, F.cross_entropy),
    "panns_cnn6": (log_mel, Cnn6, one_hot_cross_entropy),
}


def build(config):
    """The network of a Config and its loss function; InputError where it cannot be built."""
    if config.model_name not in MODELS:
        raise InputError(
            f"config: model_name '{config.model_name}' is not one of {', '.join(MODELS)}."
        )
    front_end, head, loss_function = MODELS[config.model_name]

    spectrogram_layer, bands = front_end(config)
    spectrogram_layer.lambd.requires_grad_(config.trainable)
    frames = config.n_points // config.hop_length + 1

    classifier = head(frames, bands, n_classes(config), config)
    return SpectrogramNet(spectrogram_layer, classifier, config.bf16), loss_function


def probabilities(config, logits):
    """Probabilities of the classes as the loss of the config's network means its logits.

    Shapes: (batch, n_classes). They are those of a softmax and add up to 1, but for networks of
    one_hot_cross_entropy, which give each class one of its own.
    """
    _, _, loss_function = MODELS[config.model_name]
    if loss_function is one_hot_cross_entropy:
        return logits.sigmoid()
    return logits.softmax(dim=1)


class Dropout(nn.Dropout):
    """nn.Dropout, on a CPU with a mask from 16 random bits per element: p = 0.2 is 0.199997.

    That takes a quarter of the time of torch's own, which draws a float for each element, and the
    kept results were trained with it.
    """

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)

        n_words = -(-x.numel() // 4)  # int64 words of four times 16 bits, rounded up
        words = torch.empty(n_words, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()]
        threshold = round(self.p * 2**16) - 2**15

        mask = torch.empty_like(x, requires_grad=False)
        in_memory_order = mask.as_strided((x.numel(),), (1,))
        torch.ge(bits, threshold, out=in_memory_order)
        return x * mask.div_(1 - self.p)


class BandNorm(nn.BatchNorm1d):
    """Batch norm over frequency bands, input and output shape = (batch, 1, frames, bands)."""

    def forward(self, x):
        bands_first = x.squeeze(1).transpose(1, 2)  # (batch, bands, frames)
        return super().forward(bands_first).transpose(1, 2).unsqueeze(1)


def load_published(net, path, sha256=None):
    """Fills a Cnn6 with the weights of the published AudioSet checkpoint, all but the classifier.

    path: the file. sha256: the hash it must have, where it is known. Raises InputError where it is
    another file.
    """
    # Beside the weights the file may hold numpy arrays and numbers of the authors' sampler, under
    # the names that numpy 1 gave to their types.
    numpy_globals = [np.ndarray, np.dtype]
    for code in "?bBhHiIlLqQefd":
        numpy_globals.append(type(np.dtype(code)))
    for function in (np._core.multiarray._reconstruct, np._core.multiarray.scalar):
        numpy_globals.append(function)
        numpy_globals.append((function, f"numpy.core.multiarray.{function.__name__}"))

    try:
        with torch.serialization.safe_globals(numpy_globals):
            published = torch.load(path or "", map_location="cpu", weights_only=True)["model"]

        weights = {}
        for key in net.state_dict():
            if "esc50" not in key:
                weights[key] = published[re.sub("^bn1", "bn0", key)]  # the input's batch norm
                if not weights[key].isfinite().all():
                    raise ValueError("it holds weights that are not numbers")
        net.load_state_dict(weights, strict=False)

        if sha256 is not None and hash_of_file(path) != sha256:
            raise ValueError("it is not the file that the experiment was begun with")
    except Exception as error:  # a file of something else can fail in every way
        raise InputError(
            f"config: checkpoint_path '{path}' is not Cnn6_mAP=0.343.pth of "
            f"https://zenodo.org/records/3987831 ({error!r:.300}): fetch that and name it."
        ) from None
