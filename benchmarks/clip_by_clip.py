"""What the sections compare with: the original software's way, every clip alone.

A plain STFT under autograd, with a mel filter bank built for each clip; an epoch takes single clips
out of a DataLoader with two worker processes and copies the features of every batch to the CPU's
memory.
"""

import time

import torch
import torchaudio
from torch import nn

import train
from dmel import DMEL, fft_size


class ClipByClip(nn.Module):
    """What a layer of dmel.py computes, the original's way."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.lambd = layer.lambd

    def forward(self, clips):
        return torch.stack([self.one(clip) for clip in clips])

    def one(self, clip):
        layer = self.layer
        has_filters = isinstance(layer, DMEL)
        if has_filters:
            length = fft_size(self.lambd, len(clip))
            n_fft = length
        else:
            length = len(clip)
            n_fft = 2 * length

        n = torch.arange(length, device=clip.device)
        window = torch.exp(-(((n - length / 2) / self.lambd) ** 2) / 2)
        spectrum = torch.stft(
            clip - clip.mean(),
            n_fft,
            layer.hop_length,
            length,
            window,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.abs().square()
        if not has_filters:
            return power

        filters = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1,
            layer.f_min,
            layer.f_max or layer.sample_rate // 2,
            layer.n_mels,
            layer.sample_rate,
        )
        return torch.log(filters.to(clip.device).t() @ power + 1e-10)


def prepare(config):
    """train.prepare, with the layer put in that goes clip by clip."""
    net, loss_function, device = train.prepare(config)
    net.to(memory_format=torch.contiguous_format)
    net.spectrogram_layer = ClipByClip(net.spectrogram_layer)
    return net, loss_function, device


def epoch_seconds(config, data):
    """Seconds of an epoch, training and validation."""
    net, loss_function, device = prepare(config)
    optimizer = train.make_optimizer(net, config)
    start = time.perf_counter()
    for part in ("train", "valid"):
        is_training = part == "train"
        examples = torch.utils.data.TensorDataset(data.clips, data.labels)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(examples, data.splits[part].tolist()),
            config.batch_size,
            shuffle=is_training,
            num_workers=2,
            multiprocessing_context="fork",
        )
        net.train(is_training)
        with torch.set_grad_enabled(is_training):
            for batch, labels in loader:
                logits, features = net(batch.to(device))
                loss = loss_function(logits, labels.to(device))
                if is_training:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                features.detach().cpu().clone()
                loss.item()
    return time.perf_counter() - start
