"""DMEL, the log-Mel spectrogram whose window length is a weight of the network.

    layer = DMEL(sample_rate=8000, n_mels=64, hop_length=80, init_lambd=8000 * 0.035 / 6)
    log_mel = layer(clips)       # (batch, time) -> (batch, n_mels, time // hop_length + 1)
    log_mel.sum().backward()     # fills layer.lambd.grad

The window is a Gaussian whose standard deviation λ = |lambd|, in samples, is the one parameter of the layer; the window
is as long as six of them. lambd moves by whole samples while other weights move by thousandths, so give it a learning
rate of its own (1.0 in the paper): torch.optim.Adam([{"params": layer.parameters(), "lr": 1.0}, {"params": ...}]).

This file needs torch and torchaudio only and can be copied into another project.

Source: Martinsson and Sandsten, "DMEL: The differentiable log-Mel spectrogram as a trainable layer in neural networks",
ICASSP 2024, doi 10.1109/ICASSP48485.2024.10446816.
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

WINDOW_SIGMAS = 6  # window length in standard deviations λ: l = 6λ
LOG_FLOOR = 1e-10  # added to a mel band before the logarithm
CONTINUOUS_N = 512  # FFT size whose filter sums continuous gives to filters of every size: that of 35 ms at 8 kHz
MEL_GROUPS = 4  # the filters of a group share one product over the bins they touch: a quarter of the dense work
CPU_BLOCK = 2**19  # samples of windowed frames that a thread works on at once: 2 MiB of float32 stay in its caches
GPU_BLOCK = 2**26  # enough for a whole batch: 256 MiB of float32


def fft_size(lambd, n_samples=None):
    """FFT size N of the adaptive mode: the smallest power of two ≥ int(6λ), computed in float32.

    lambd: λ in samples, tensor of one element or float; reading it is the layer's one host-device synchronisation.
    n_samples: clip length; N is kept within [2, smallest power of two ≥ 2·n_samples], without it only N ≥ 2 holds.
    Raises ValueError where λ is not finite. Source: the paper's software; the bounds are ours.
    """
    value = abs(torch.as_tensor(lambd).item())
    if not math.isfinite(value):
        raise ValueError(f"lambd is {value}, so there is no window length: lower the learning rate of lambd.")
    support = torch.tensor(WINDOW_SIGMAS * value, dtype=torch.float32).item()
    if n_samples is not None:
        support = min(support, 2 * n_samples)
    return 1 << max(1, (int(min(support, 2.0**62)) - 1).bit_length())


def gaussian_window(lambd, length, normalize=False):
    """Gaussian window w[n] = exp(-((n - length/2) / λ)² / 2) and its derivative with respect to lambd.

    lambd: tensor of one element, in samples; only its absolute value λ matters. Returns two tensors, shape = (length,),
    of lambd's dtype and device, finite for every finite lambd: at λ = 0 the window is the impulse at n = length/2 and
    the derivative is 0. normalize divides the window by sqrt(Σ w²).
    """
    n = torch.arange(length, dtype=lambd.dtype, device=lambd.device)
    squared_distance = (n - length / 2).square()
    if normalize:  # a common factor cancels, so measure from the peak: the sum below is then never 0
        squared_distance = squared_distance - squared_distance.min()
    sigma = lambd.abs().clamp(min=torch.finfo(lambd.dtype).tiny)
    exponent = (squared_distance / sigma / sigma).clamp(max=1500.0)  # exp(-750) is 0 in float64 too
    window = torch.exp(-exponent / 2)
    derivative = torch.sign(lambd) * (window * exponent / sigma)
    if normalize:
        norm = window.square().sum().sqrt()
        window = window / norm
        derivative = derivative / norm - window * (window @ derivative) / norm
    return window, derivative


@functools.lru_cache(maxsize=64)
def mel_filters(n_fft, n_mels, sample_rate, f_min, f_max, continuous, dtype, device):
    """The HTK mel filter bank, cut into groups of neighbouring filters, for interleaved real and imaginary parts.

    Returns a list of (first, last, weights), one per group: weights, shape = (last - first, filters of the group),
    apply to entries first..last of _spectral_products, where every bin has two entries of the same weight. Filters
    without a bin, as short windows have them, stay 0. sample_rate, f_min and f_max in Hz. continuous: see DMEL.
    """

    def filter_bank(n_fft):
        return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate)

    with warnings.catch_warnings(), torch.inference_mode(False):  # no inference tensors in the cache
        warnings.filterwarnings("ignore", message="At least one mel filterbank has all zero values")
        bank = filter_bank(n_fft)
        if continuous:  # in a fine grid a filter's sum grows as the FFT size
            sums, fine = bank.sum(dim=0), filter_bank(2**15).sum(dim=0) / 2**15
            bank = bank * torch.where(sums > 0, CONTINUOUS_N * fine / sums, 0.0)
        groups = []
        for filters in bank.tensor_split(MEL_GROUPS, dim=1):
            bins = filters.any(dim=1).nonzero()
            first, last = (bins.min().item(), bins.max().item() + 1) if len(bins) else (0, 1)
            weights = filters[first:last].repeat_interleave(2, dim=0)
            groups.append((2 * first, 2 * last, weights.to(device, dtype)))
    return groups


def _spectral_products(frames, windows, n_fft, windowed=None):
    """Products of the spectra under each window with the spectrum S under the first: |S|² and Re(conj(S)·dS/dλ).

    frames: shape = (clips, frames, length). windows: shape = (1 or 2, length). Returns shape = (clips, frames, windows,
    2·(n_fft//2 + 1)): the products of the real and those of the imaginary parts interleaved, still to be added.
    windowed: a buffer for the windowed frames, 0 beyond length; without it autograd can follow.
    """
    if windowed is None:
        parts = torch.view_as_real(torch.fft.rfft(frames.unsqueeze(-2) * windows, n_fft)).flatten(-2)
        return parts * parts[..., :1, :]
    torch.mul(frames.unsqueeze(-2), windows, out=windowed[..., : frames.shape[-1]])
    parts = torch.view_as_real(torch.fft.rfft(windowed, n_fft)).flatten(-2)
    parts[..., 1:, :] *= parts[..., :1, :]  # in place: what a block works on has to stay in the caches
    parts[..., 0, :].square_()
    return parts


def _features(products, filters, log, out=(None, None)):
    """Features, shape = (clips, frames, bands), and, with a second window of 2·dw/dλ, their derivative in λ, in a list.

    out: the tensors to write them to; without them new memory is used and autograd can follow.
    """
    if filters is None:
        parts = zip(products[..., ::2].unbind(-2), products[..., 1::2].unbind(-2), out, strict=False)
        return [torch.add(real, imaginary, out=target) for real, imaginary, target in parts]
    rows = products.flatten(0, -2)
    bands = torch.cat([rows[:, first:last] @ weights for first, last, weights in filters], dim=-1)
    bands = bands.unflatten(0, products.shape[:-1]).unbind(-2)
    if not log:
        return [torch.mul(band, 1, out=target) for band, target in zip(bands, out, strict=False)]
    floored = bands[0] + LOG_FLOOR
    derivatives = [torch.div(band, floored, out=target) for band, target in zip(bands[1:], out[1:], strict=False)]
    return [torch.log(floored, out=out[0]), *derivatives]


class _BlockwiseFeatures(torch.autograd.Function):
    """Features of padded clips, computed in blocks of frames, with the exact derivative in lambd.

    Where lambd needs a gradient, forward takes a second STFT, with the window's derivative, and keeps the derivative of
    every feature: d|S|²/dλ = 2 Re(conj(S)·dS/dλ). Where the clips need one, backward computes the blocks once more.
    """

    @staticmethod
    def forward(ctx, padded, lambd, length, n_fft, hop_length, normalize_window, filters, log):
        window, window_derivative = gaussian_window(lambd, length, normalize_window)
        keeps_derivative = ctx.needs_input_grad[1]
        windows = torch.stack([window, 2 * window_derivative]) if keeps_derivative else window.unsqueeze(0)
        frames = padded.unfold(-1, length, hop_length)  # a view: shape = (clips, frames, length)
        n_bands = n_fft // 2 + 1 if filters is None else sum(weights.shape[1] for _, _, weights in filters)
        features = padded.new_empty(*frames.shape[:2], n_bands)
        derivative = torch.empty_like(features) if keeps_derivative else None

        blocks = _blocks(frames, n_fft * len(windows))
        largest = max((frames[block].shape[:2].numel() for block in blocks), default=0)
        windowed = (padded.new_empty if length == n_fft else padded.new_zeros)(largest, len(windows), n_fft)
        for block in blocks:
            shape = frames[block].shape[:2]
            workspace = windowed[: shape.numel()].unflatten(0, shape)
            products = _spectral_products(frames[block], windows, n_fft, workspace)
            _features(products, filters, log, [kept[block] for kept in (features, derivative) if kept is not None])

        ctx.save_for_backward(padded if ctx.needs_input_grad[0] else None, lambd, derivative)
        ctx.window, ctx.geometry, ctx.projection = window, (length, n_fft, hop_length), (filters, log)
        return features

    @staticmethod
    def backward(ctx, gradient):
        padded, lambd, derivative = ctx.saved_tensors
        padded_gradient = lambd_gradient = None
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                per_clip = torch.linalg.vecdot(gradient.flatten(1), derivative.flatten(1))
                lambd_gradient = per_clip.sum().reshape(lambd.shape)
            if ctx.needs_input_grad[0]:
                padded_gradient = _padded_gradient(padded, gradient, ctx.window, *ctx.geometry, *ctx.projection)
        if torch.is_grad_enabled():  # create_graph=True: what follows is right as long as nobody differentiates it
            sources = [tensor for tensor in (gradient, padded, lambd) if tensor is not None]
            padded_gradient = padded_gradient if padded_gradient is None else _Once.apply(padded_gradient, *sources)
            lambd_gradient = lambd_gradient if lambd_gradient is None else _Once.apply(lambd_gradient, *sources)
        return padded_gradient, lambd_gradient, None, None, None, None, None, None


def _blocks(frames, frame_size):
    """Slices (clips, frames) that cut frames, shape = (clips, frames, length), into blocks, a frame of frame_size."""
    n_clips, n_frames, _ = frames.shape
    block = CPU_BLOCK * torch.get_num_threads() if frames.device.type == "cpu" else GPU_BLOCK
    per_block = max(1, block // frame_size)
    clip_step = max(1, per_block // n_frames)
    frame_step = math.ceil(n_frames / math.ceil(n_frames / per_block))  # equal blocks, not a small last one
    return [
        (slice(clip, clip + clip_step), slice(frame, frame + frame_step))
        for clip in range(0, n_clips, clip_step)
        for frame in range(0, n_frames, frame_step)
    ]


def _padded_gradient(padded, gradient, window, length, n_fft, hop_length, filters, log):
    """Gradient with respect to the padded clips, shape as theirs: each block is computed again under autograd."""
    result = torch.zeros_like(padded)
    for clips, frames in _blocks(padded.unfold(-1, length, hop_length), 2 * n_fft):
        block_gradient = gradient[clips, frames]
        start = frames.start * hop_length
        samples = slice(start, start + (block_gradient.shape[1] - 1) * hop_length + length)
        with torch.enable_grad():
            segment = padded[clips, samples].detach().requires_grad_()
            products = _spectral_products(segment.unfold(-1, length, hop_length), window.unsqueeze(0), n_fft)
            (features,) = _features(products, filters, log)
        result[clips, samples] += torch.autograd.grad(features, segment, block_gradient)[0]
    return result


class _Once(torch.autograd.Function):
    """The identity on a gradient, with the tensors it came from, that refuses to be differentiated."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("DMEL gives first derivatives only: its gradient cannot be differentiated again.")


def _transform(x, layer, filters_of, log):
    """What both layers do: clips, shape = (..., time), to features, shape = (..., bands, time//hop_length + 1)."""
    lambd, hop_length = layer.lambd, layer.hop_length
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"clips must be floating point of shape (..., time), not {x.dtype} of {tuple(x.shape)}.")
    if not torch.is_grad_enabled():  # or the derivative would be computed in vain
        x, lambd = x.detach(), lambd.detach()
    with torch.autocast(x.device.type, enabled=False):
        clips = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        time = clips.shape[-1]
        n_fft = fft_size(lambd, time) if layer.optimized else 2 * time
        length = n_fft if layer.optimized else time
        # torch.stft pads n_fft/2 zeros on both sides and centres a short window in its frame of n_fft points. A power
        # spectrum does not depend on where in the frame the window lies, so only the window's own points are taken.
        left = n_fft // 2 - (n_fft - length) // 2
        padded = F.pad(clips - clips.mean(dim=-1, keepdim=True), (left, length - left))
        window = (lambd.to(clips.dtype), length, n_fft, hop_length, layer.normalize_window)
        features = _BlockwiseFeatures.apply(padded, *window, filters_of(n_fft, clips), log)
    return features.reshape(*x.shape[:-1], *features.shape[1:]).transpose(-1, -2)


def _check_layer(hop_length, init_lambd):
    if hop_length < 1:
        raise ValueError(f"hop_length must be 1 sample or more, not {hop_length}.")
    if not math.isfinite(init_lambd):
        raise ValueError(f"init_lambd must be a finite number of samples, not {init_lambd}.")


class DifferentiableSpectrogram(nn.Module):
    """Power spectrogram |STFT|² with a trainable Gaussian window.

    Input shape = (..., time), floating point; output shape = (..., n_fft//2 + 1, time//hop_length + 1). Frames are
    centred, with zeros beyond the clip's ends; the mean of each clip is removed first. Computed in float32, for float64
    clips in float64. Gradients flow to lambd and to the clips; a second derivative raises RuntimeError.

    hop_length: step between frames, in samples. init_lambd: λ to start from, in samples, any finite number.
    optimized: False for the whole-signal mode, a window as long as the clip in an FFT of twice that, so that the shape
    of the output does not depend on λ; True for the adaptive mode, see fft_size.
    normalize_window: divide the window by sqrt(Σ w²).

    Below λ ≈ 0.5 the window is an impulse and the gradient 0: λ does not leave that range again.
    """

    def __init__(self, hop_length, init_lambd, optimized=False, normalize_window=False):
        super().__init__()
        _check_layer(hop_length, init_lambd)
        self.hop_length, self.optimized, self.normalize_window = hop_length, optimized, normalize_window
        self.lambd = nn.Parameter(torch.tensor(float(init_lambd)))

    def forward(self, x):
        """Power spectrogram of clips x, shapes as above."""
        return _transform(x, self, lambda n_fft, clips: None, log=False)

    def extra_repr(self):
        return f"hop_length={self.hop_length}, lambd={self.lambd.item():.4g}, optimized={self.optimized}"


class DMEL(nn.Module):
    """Log-Mel spectrogram with a trainable Gaussian window.

    Input shape = (..., time), floating point; output shape = (..., n_mels, time//hop_length + 1). Frames are centred,
    with zeros beyond the clip's ends; the mean of each clip is removed first. Computed in float32, for float64 clips in
    float64. Gradients flow to lambd and to the clips; a second derivative raises RuntimeError.

    sample_rate: Hz. n_mels: number of HTK mel filters, between f_min and f_max in Hz (default: sample_rate // 2).
    hop_length: step between frames, in samples.
    init_lambd: λ to start from, in samples, any finite number; sample_rate · l / 6 for a window of l seconds.
    normalize_window: divide the window by sqrt(Σ w²). log: True for ln(mel + 1e-10), False for mel itself.
    optimized: True for the adaptive mode, where window and FFT are the power of two that fits 6λ, see fft_size; False
    for a window as long as the clip in an FFT of twice that, which costs far more.
    continuous: scale each filter so that its response to white noise is the same at every FFT size; without it the
    log-Mel jumps by about ln 2 where the size doubles.

    Filters that fall between two bins of a short FFT are empty: their energy is 0. Below λ ≈ 0.5 the window is an
    impulse and the gradient 0: λ does not leave that range again.
    """

    def __init__(
        self,
        sample_rate,
        n_mels,
        hop_length,
        init_lambd,
        f_min=0.0,
        f_max=None,
        normalize_window=False,
        log=True,
        optimized=True,
        continuous=False,
    ):
        super().__init__()
        _check_layer(hop_length, init_lambd)
        if n_mels < 1:
            raise ValueError(f"n_mels must be 1 or more, not {n_mels}.")
        f_max = float(sample_rate // 2) if f_max is None else float(f_max)
        if not 0 <= f_min < f_max:
            raise ValueError(f"f_min must be at least 0 and below f_max, not {f_min} and {f_max} Hz.")
        self.sample_rate, self.n_mels, self.hop_length = sample_rate, n_mels, hop_length
        self.f_min, self.f_max = float(f_min), f_max
        self.normalize_window, self.log, self.optimized, self.continuous = normalize_window, log, optimized, continuous
        self.lambd = nn.Parameter(torch.tensor(float(init_lambd)))

    @property
    def window_length(self):
        """Window length l = 6λ / sample_rate, in seconds."""
        return WINDOW_SIGMAS * abs(self.lambd.item()) / self.sample_rate

    @property
    def n_fft(self):
        """FFT size N of the adaptive mode for the present λ, where the clip is long enough for it."""
        return fft_size(self.lambd)

    def forward(self, x):
        """Log-Mel spectrogram of clips x, shapes as above."""
        return _transform(x, self, self._filters, self.log)

    def _filters(self, n_fft, clips):
        settings = (self.n_mels, self.sample_rate, self.f_min, self.f_max, self.continuous)
        return mel_filters(n_fft, *settings, clips.dtype, clips.device)

    def extra_repr(self):
        return (
            f"sample_rate={self.sample_rate}, n_mels={self.n_mels}, hop_length={self.hop_length}, "
            f"lambd={self.lambd.item():.4g} ({1000 * self.window_length:.4g} ms)"
        )
