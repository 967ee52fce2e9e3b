"""DMEL, the log-Mel spectrogram whose window length is a weight of the network.

    layer = DMEL(sample_rate=8000, n_mels=64, hop_length=80, init_lambd=8000 * 0.035 / 6)
    log_mel = layer(clips)       # (batch, time) -> (batch, n_mels, time // hop_length + 1)
    log_mel.sum().backward()     # fills layer.lambd.grad

    # λ gets a learning rate of its own, and no weight decay
    optimizer = torch.optim.AdamW(parameter_groups(network), lr=1e-4)

The window is a Gaussian whose standard deviation λ = |lambd|, in samples, is the one parameter of
the layer; the window is as long as six of them. This file needs torch alone and can be copied.

In the order of this file: 1. the method, which is equations 1 to 5 of the paper; 2. how it is
computed in blocks; 3. how values get their derivative; 4. FFT size and mel filters; 5. the two
layers; 6. what travels: the frozen layer, and parameter groups for an optimizer.

Source: Martinsson and Sandsten, "DMEL: The differentiable log-Mel spectrogram as a trainable layer
in neural networks", ICASSP 2024.

Licence: Apache-2.0.
"""
# mypy: disable-error-code="attr-defined, no-untyped-call"

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Power, in the clips' unit squared, that is added to a mel band before the logarithm.
LOG_FLOOR = 1e-10

# Neighbouring mel filters: the bins that they touch, and weights, shape = (bins, filters).
FilterGroup = tuple[slice, Tensor]


# 1. The method: equations 1 to 5 of the paper. The letters are
#
#     λ   standard deviation of the window, in samples
#     w   window, L samples                                                     equation 1
#     S   STFT of N points, shape = (clips, frames, N/2 + 1), complex           equation 2
#     P   power spectrogram, of the same shape                                  equation 3
#     M   mel spectrogram, shape = (clips, frames, n_mels)                      equation 4
#
# and the log-Mel spectrogram is ln(M + 1e-10), equation 5. The derivatives dw/dλ, dS/dλ, dP/dλ and
# dM/dλ are called dw, dS, dP and dM. features_and_derivative, below, puts the equations together.


def gaussian_window(lambd: Tensor, length: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Equation 1: w[n] = exp(-((n - L/2) / λ)² / 2), and dw = w[n] · (n - L/2)² / λ³.

    lambd: one element, in samples; at 0 the window is an impulse at n = L/2, where that is a whole
    number. length: L. normalize divides the window by sqrt(Σ w²). Returns w and its derivative in
    lambd, shape = (L,) each.
    """
    n = torch.arange(length, dtype=lambd.dtype, device=lambd.device)
    squared_distance = (n - length / 2).square()
    if normalize:
        # A common factor cancels, so measure from the peak: the sum of squares is then never 0.
        squared_distance = squared_distance - squared_distance.min()

    # λ² could overflow, or vanish, so divide twice. Beyond 1500 w is 0 in float64 too.
    sigma = lambd.abs().clamp(min=torch.finfo(lambd.dtype).tiny)
    exponent = (squared_distance / sigma / sigma).clamp(max=1500.0)
    w = torch.exp(-exponent / 2)
    dw = w * exponent / torch.copysign(sigma, lambd)
    if normalize:
        return divided_by_norm(w, dw)
    return w, dw


def divided_by_norm(w: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """A window divided by its norm sqrt(Σ w²), and the derivative of that."""
    norm = w.square().sum().sqrt()
    w = w / norm
    dw = dw / norm
    # What changes w along itself changes its norm alone. Autocast does not round torch.dot.
    return w, dw - w * torch.dot(w, dw)


def stft(frames: Tensor, w: Tensor, n_fft: int) -> Tensor:
    """Equation 2: S, the STFT of frames, shape = (clips, frames, L), under the window w.

    It is linear in the window, so the STFT under dw is dS. Where N is longer than L, rfft adds the
    zeros behind the frame, not around it: that turns phases, and no power.
    """
    S: Tensor = torch.fft.rfft(frames * w, n_fft)
    return S


def power(S: Tensor) -> Tensor:
    """Equation 3: P = |S|², the squares of real and imaginary part added."""
    squares = torch.view_as_real(S).square()
    return squares[..., 0] + squares[..., 1]


def power_derivative(S: Tensor, dS: Tensor) -> Tensor:
    """Equation 3: dP = 2 Re(conj(S) · dS), twice the products of the parts added."""
    products = torch.view_as_real(S) * torch.view_as_real(dS)
    dP = products[..., 0] + products[..., 1]
    # In place, since one more array of this size takes a few per cent longer.
    dP *= 2
    return dP


def mel(P: Tensor, filters: list[FilterGroup]) -> Tensor:
    """Equation 4: M, the power in each mel filter. It is linear in P, so that of dP is dM."""
    return torch.cat([P[..., bins] @ weights for bins, weights in filters], dim=-1)


def log_mel(M: Tensor) -> Tensor:
    """Equation 5: ln(M + 1e-10)."""
    # A tensor, since exporters to ONNX take a number so small for 0.
    floor = M.new_full((1,), LOG_FLOOR)
    return torch.log(M + floor)


def log_mel_from_zero(M: Tensor) -> Tensor:
    """Equation 5 less its value where M = 0: ln(M + 1e-10) - ln(1e-10)."""
    return torch.log1p(M / LOG_FLOOR)


def log_mel_derivative(M: Tensor, dM: Tensor) -> Tensor:
    """Equation 5: dM / (M + 1e-10), with zero_floor too, since that subtracts a constant."""
    return dM / (M + LOG_FLOOR)


class Settings(NamedTuple):
    """What the equations need beside the clips and the window."""

    n_fft: int  # N
    length: int  # L, samples of a window
    hop_length: int  # samples from frame to frame
    remove_mean: bool  # of each clip
    filters: list[FilterGroup] | None = None  # None: up to equation 3
    log: bool = False  # False: up to equation 4
    zero_floor: bool = False


def features(frames: Tensor, w: Tensor, settings: Settings) -> Tensor:
    """P, M or the log-Mel spectrogram of frames, whichever the settings ask for."""
    S = stft(frames, w, settings.n_fft)
    P = power(S)
    if settings.filters is None:
        return P

    M = mel(P, settings.filters)
    if not settings.log:
        return M

    if settings.zero_floor:
        return log_mel_from_zero(M)
    return log_mel(M)


def features_and_derivative(
    frames: Tensor, w: Tensor, dw: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The same features and the derivative of each in λ, shapes as theirs."""
    S = stft(frames, w, settings.n_fft)
    dS = stft(frames, dw, settings.n_fft)

    P = power(S)
    dP = power_derivative(S, dS)
    if settings.filters is None:
        return P, dP

    M = mel(P, settings.filters)
    dM = mel(dP, settings.filters)
    if not settings.log:
        return M, dM

    if settings.zero_floor:
        return log_mel_from_zero(M), log_mel_derivative(M, dM)
    return log_mel(M), log_mel_derivative(M, dM)


# 2. How it is computed: in blocks of frames. What the equations leave on their way (windowed
# frames, S, dS, P, dP) then stays in the caches of the processor. For a whole batch of long windows
# it would be more than a gigabyte.

# Samples of windowed frames of a block, for each thread: 2 MiB of float32.
CPU_BLOCK = 2**19

# Samples of windowed frames of a block on a GPU, enough for a whole batch: 256 MiB of float32.
GPU_BLOCK = 2**26


def padded_clips(x: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """Clips as rows, without their means, between zeros: shape = (clips, time + L)."""
    clips = x.reshape(-1, x.shape[-1]).to(dtype)
    if settings.remove_mean:
        clips = clips - clips.mean(dim=-1, keepdim=True)
    half = settings.length // 2
    return nn.functional.pad(clips, (settings.length - half, half))


def frames_of(padded: Tensor, settings: Settings) -> Tensor:
    """Frames of padded clips, shape = (clips, frames, L). They overlap in memory: it is a view."""
    return padded.unfold(-1, settings.length, settings.hop_length)


def shaped_as_clips(values: Tensor, x: Tensor) -> Tensor:
    """Features, shape = (clips, frames, bands), as a layer gives them: (..., bands, frames)."""
    return values.reshape(*x.shape[:-1], *values.shape[1:]).transpose(-1, -2).to(x.dtype)


def blocks(frames: Tensor, settings: Settings) -> Iterator[tuple[slice, slice]]:
    """Ranges of clips and of frames, one block each: some whole clips, or a part of one.

    The parts of a clip are of equal size: a small last one would keep the threads less busy.
    """
    n_clips, n_frames, _ = frames.shape
    block_size = CPU_BLOCK * torch.get_num_threads() if frames.is_cpu else GPU_BLOCK
    # Two windowed frames, of w and of dw, for each frame.
    frames_per_block = max(1, block_size // (2 * settings.n_fft))

    clips_per_block = max(1, frames_per_block // n_frames)
    parts = math.ceil(n_frames / frames_per_block)
    frames_per_part = math.ceil(n_frames / parts)
    for clip in range(0, n_clips, clips_per_block):
        for frame in range(0, n_frames, frames_per_part):
            end = min(frame + frames_per_part, n_frames)
            yield slice(clip, clip + clips_per_block), slice(frame, end)


def empty_features(frames: Tensor, settings: Settings) -> Tensor:
    n_bands = settings.n_fft // 2 + 1
    if settings.filters is not None:
        n_bands = sum(weights.shape[1] for _, weights in settings.filters)
    return frames.new_empty(*frames.shape[:2], n_bands)


def features_in_blocks(frames: Tensor, w: Tensor, settings: Settings) -> Tensor:
    """The result of `features`, computed block by block."""
    values = empty_features(frames, settings)
    for block in blocks(frames, settings):
        values[block] = features(frames[block], w, settings)
    return values


def features_and_derivative_in_blocks(
    frames: Tensor, w: Tensor, dw: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The result of `features_and_derivative`, computed block by block."""
    values = empty_features(frames, settings)
    derivative = empty_features(frames, settings)
    for block in blocks(frames, settings):
        values[block], derivative[block] = features_and_derivative(frames[block], w, dw, settings)
    return values, derivative


# 3. How values get their derivative: autograd is told of those that are known already.


class KnownDerivative(torch.autograd.Function):
    """Values, as they are, tied to λ by their derivative in it, which has their shape.

    A derivative of None raises as soon as somebody asks for it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, derivative: Tensor | None, lambd: Tensor) -> Tensor:
        return values

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor
    ) -> None:
        _, derivative, lambd = inputs
        ctx.save_for_backward(derivative, lambd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        derivative, lambd = ctx.saved_tensors
        if derivative is None:
            raise RuntimeError(
                "DMEL has no second derivative in lambd: its first one cannot be differentiated "
                "in it."
            )

        # With create_graph=True the gradient depends on λ too, by the derivative, and how is not
        # known: tied so, a second derivative is refused and not taken for 0.
        derivative = KnownDerivative.apply(derivative, None, lambd)
        return None, None, torch.dot(gradient.flatten(), derivative.flatten())


class KnownFeatures(KnownDerivative):
    """The same for features, which whoever gets them may change in place."""

    @staticmethod
    def forward(values: Tensor, derivative: Tensor | None, lambd: Tensor) -> Tensor:
        # An input that is returned counts as a view of itself, and must not be changed in place.
        # This is another tensor with the same memory.
        return values.data


class RecomputedFeatures(torch.autograd.Function):
    """Features of padded clips that need a gradient themselves; the window w may need one too.

    The graph of a whole batch would take gigabytes, so none is kept: backward computes each block
    once more, under autograd.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, w: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(padded, w)
        ctx.settings = settings
        return features_in_blocks(frames_of(padded, settings), w, settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, w = ctx.saved_tensors
        settings: Settings = ctx.settings
        create_graph = torch.is_grad_enabled()
        of_padded = torch.zeros_like(padded)
        of_window = torch.zeros_like(w)

        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            for clips, frames in blocks(frames_of(padded, settings), settings):
                start = frames.start * settings.hop_length
                end = (frames.stop - 1) * settings.hop_length + settings.length
                part = padded[clips, start:end]
                values = features(frames_of(part, settings), w, settings)

                upstream = gradient[clips, frames]
                if w.requires_grad:
                    of_part, of_w = torch.autograd.grad(
                        values, (part, w), upstream, create_graph=create_graph
                    )
                    of_window += of_w
                else:
                    (of_part,) = torch.autograd.grad(
                        values, (part,), upstream, create_graph=create_graph
                    )
                of_padded[clips, start:end] += of_part
        return of_padded, of_window, None


def differentiable_features(
    padded: Tensor, w: Tensor, dw: Tensor, lambd: Tensor, settings: Settings
) -> Tensor:
    """Features of padded clips, tied to λ and to the clips where these need a gradient."""
    # Under torch.func requires_grad does not tell which tensors need a gradient. The question has
    # no public name; without it per-sample gradients in the clips fail, and jvp takes λ for fixed.
    under_func = torch._C._are_functorch_transforms_active()
    # Nor does it in forward mode, whose level is -1 outside of it, and has no public name either.
    in_forward_mode = getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0
    in_one_piece = under_func or in_forward_mode
    by_autograd = in_one_piece or padded.requires_grad
    frames = frames_of(padded, settings)

    values: Tensor
    if not by_autograd and torch.is_grad_enabled() and lambd.requires_grad:
        # λ is trained: the derivative of each value is computed beside it.
        values, derivative = features_and_derivative_in_blocks(frames, w, dw, settings)
        values = KnownFeatures.apply(values, derivative, lambd)
    elif not by_autograd:
        values = features_in_blocks(frames, w, settings)
    elif in_one_piece:
        values = features(frames, KnownDerivative.apply(w, dw, lambd), settings)
    else:
        values = RecomputedFeatures.apply(padded, KnownDerivative.apply(w, dw, lambd), settings)
    return values


# 4. What the layers choose by λ: the FFT size, and the mel filters of equation 4 that go with it.

# Window length l = 6λ, in standard deviations.
WINDOW_SIGMAS = 6

# Samples. No clip is longer, and twice as many are still a number of 64 bits.
LONGEST_CLIP = 2**61

# FFT size whose filter sums `continuous` gives to filters of every size: that of 35 ms at 8 kHz.
CONTINUOUS_N = 512

# FFT size of a grid of frequencies so fine that the sum of a filter grows with it.
FINE_N = 2**15

# Number of parts of the filter bank. Filters of a part share one product over the bins they touch,
# which is a quarter of the work of a product with all bins.
MEL_GROUPS = 4

MEL_SCALES = ("htk", "slaney")


def fft_size(lambd: Tensor | float, n_samples: int = LONGEST_CLIP) -> int:
    """FFT size N of the adaptive mode: the smallest power of two ≥ int(6λ).

    lambd is in samples. N is at least 2, and at most the smallest power of two ≥ 2·n_samples of a
    clip. Reading λ is the one time that the layer waits for its device. Raises ValueError where λ
    is not finite.
    """
    sigma = abs(torch.as_tensor(lambd).item())
    if not math.isfinite(sigma):
        raise ValueError(
            f"lambd is {sigma}, so there is no window length: look for clips that hold NaN or inf "
            "and for a loss or gradients that became so, or lower the learning rate of lambd."
        )

    support = torch.tensor(WINDOW_SIGMAS * sigma, dtype=torch.float32).item()
    support = int(min(support, 2 * n_samples))
    return 1 << max(1, (support - 1).bit_length())


def hz_to_mel(hz: Tensor, mel_scale: str) -> Tensor:
    if mel_scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)

    linear = hz * 3 / 200
    logarithmic = 15 + 27 * torch.log(hz / 1000) / math.log(6.4)
    return torch.where(hz < 1000, linear, logarithmic)


def mel_to_hz(mels: Tensor, mel_scale: str) -> Tensor:
    if mel_scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)

    linear = mels * 200 / 3
    logarithmic = 1000 * 6.4 ** ((mels - 15) / 27)
    return torch.where(mels < 15, linear, logarithmic)


def mel_filter_bank(
    n_fft: int,
    n_mels: int,
    sample_rate: int,
    f_min: float,
    f_max: float | None,
    norm: str | None,
    mel_scale: str,
) -> Tensor:
    """Triangular filters of equation 4, shape = (n_fft//2 + 1, n_mels), float64.

    Arguments are those of DMEL. Source: torchaudio.functional.melscale_fbanks, librosa.filters.mel.
    """
    nyquist = sample_rate // 2
    ends = torch.tensor([f_min, nyquist if f_max is None else f_max], dtype=torch.float64)
    first, last = hz_to_mel(ends, mel_scale)
    edges = mel_to_hz(torch.linspace(first, last, n_mels + 2, dtype=torch.float64), mel_scale)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]

    bins = torch.linspace(0, nyquist, n_fft // 2 + 1, dtype=torch.float64).unsqueeze(1)
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    bank = torch.minimum(rising, falling).clamp(min=0)
    if norm == "slaney":
        bank = bank * 2 / (high - low)
    return bank


@functools.lru_cache(maxsize=64)
def mel_filters(
    n_fft: int,
    n_mels: int,
    sample_rate: int,
    f_min: float,
    f_max: float | None,
    norm: str | None,
    mel_scale: str,
    continuous: bool,
    n_groups: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[FilterGroup]:
    """The filters of mel_filter_bank in n_groups groups, kept, since N rarely changes."""
    # The cache outlives the call, so it must hold plain tensors: those of inference mode cannot be
    # used in training, and those of nested transforms of torch.func end the next transform with an
    # internal error. Against these is _DisableFuncTorch, which has no public name.
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        bank = mel_filter_bank(n_fft, n_mels, sample_rate, f_min, f_max, norm, mel_scale)
        if continuous:
            # In a fine grid the sum of a filter grows as N. Give it what it would have at 512.
            fine = mel_filter_bank(FINE_N, n_mels, sample_rate, f_min, f_max, norm, mel_scale)
            wanted = CONTINUOUS_N * fine.sum(dim=0) / FINE_N
            sums = bank.sum(dim=0)
            bank = bank * torch.where(sums > 0, wanted / sums, 0.0)

        filters = []
        for group in bank.tensor_split(n_groups, dim=1):
            touched = group.any(dim=1).nonzero().flatten().tolist()
            bins = slice(touched[0], touched[-1] + 1) if touched else slice(0, 1)
            weights = group[bins].to(device, dtype).contiguous()
            filters.append((bins, weights))
    return filters


# 5. The layers.


def whole_number(value: float, name: str) -> int:
    """An argument that counts something, also where it comes as 80.0. Raises ValueError."""
    if not (value >= 1 and value % 1 == 0):
        raise ValueError(f"{name}={value} must be a whole number, 1 or more.")
    return int(value)


def wrong_clips(x: Tensor) -> ValueError:
    """What a layer raises where x is no clips."""
    return ValueError(
        f"clips must be floating point of shape (..., time), not {x.dtype} of {tuple(x.shape)}."
    )


class Layer(nn.Module):
    """What the layers and their frozen copies have in common: they stay in float32 or wider."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Layer":
        # A private method of nn.Module, through which half(), bfloat16() and to() pass. If it were
        # not overridden, a network that is cast to half precision would round λ, and lose steps
        # that are small beside it.
        def at_least_float32(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.itemsize < 4:
                return tensor.to(changed.device)
            return changed

        super()._apply(at_least_float32, recurse)
        return self

    def __prepare_scriptable__(self) -> "Layer":
        # torch.jit.script calls this first, and would otherwise fail with a page about types.
        raise RuntimeError(
            "torch.jit.script cannot read dmel.py: use torch.jit.trace on layer.frozen() instead."
        )


@dataclass(kw_only=True, eq=False, repr=False)
class DifferentiableSpectrogram(Layer):
    """Power spectrogram |STFT|² with a trainable Gaussian window, equations 1 to 3.

    Input shape = (..., time), floating point; output shape = (..., n_fft//2 + 1, time//hop_length +
    1), of its dtype, computed in float32 or wider. Frames are centred, with zeros beyond the clip's
    ends. Gradients flow to lambd and the clips, a second one in lambd raises RuntimeError.
    """

    # Step between frames, in samples.
    hop_length: int

    # λ to start from, in samples: sample_rate · l / 6 for a window of l seconds.
    init_lambd: float

    # True: window and FFT have the power of two that fits 6λ. False: the window is as long as the
    # clip, the FFT twice that.
    optimized: bool = False

    # Divide the window by sqrt(Σ w²).
    normalize_window: bool = False

    # Subtract the mean of each clip. Where clips are padded with zeros, subtract it before that and
    # pass False.
    remove_mean: bool = True

    def __post_init__(self) -> None:
        super().__init__()
        self._check_arguments()
        if abs(self.init_lambd) < 1:
            warnings.warn(
                f"init_lambd={self.init_lambd} is below 1: λ is in samples, "
                "sample_rate · seconds / 6.",
                stacklevel=3,
            )

        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.lambd = nn.Parameter(torch.empty((), dtype=dtype))
        self.reset_parameters()

    def _check_arguments(self) -> None:
        self.hop_length = whole_number(self.hop_length, "hop_length")
        if not math.isfinite(self.init_lambd):
            raise ValueError(f"init_lambd={self.init_lambd} must be finite.")

    def reset_parameters(self) -> None:
        """Sets λ to init_lambd, as is needed after to_empty."""
        nn.init.constant_(self.lambd, self.init_lambd)

    def forward(self, x: Tensor) -> Tensor:
        """Features of clips x, shapes as above.

        Raises ValueError where x is no clips, and with optimized=True where λ is not finite;
        RuntimeError in a trace.
        """
        if torch.compiler.is_dynamo_compiling():
            # torch.compile breaks its graph here, since N follows λ. As a decorator `disable` would
            # load the compiler with this file: two seconds, and an error for users without a name.
            eager: Callable[[Tensor], Tensor] = torch.compiler.disable(self._forward)
            return eager(x)
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError(
                "a trace would keep the FFT size of the present λ: trace layer.frozen() instead."
            )
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
            raise wrong_clips(x)

        dtype = torch.promote_types(x.dtype, torch.float32)
        lambd = self.lambd.to(dtype)
        settings = self._settings(x.shape[-1], MEL_GROUPS, x.device, lambd.dtype)
        w, dw = gaussian_window(lambd.detach(), settings.length, self.normalize_window)
        with torch.autocast(x.device.type, enabled=False):
            padded = padded_clips(x, settings, dtype)
            values = differentiable_features(padded, w, dw, lambd, settings)
        return shaped_as_clips(values, x)

    def _settings(
        self, n_samples: int, n_groups: int, device: torch.device, dtype: torch.dtype
    ) -> Settings:
        """Settings for clips of n_samples; filters in n_groups groups, for device and dtype."""
        if self.optimized:
            n_fft = fft_size(self.lambd, n_samples)
            length = n_fft
        else:
            n_fft = 2 * n_samples
            length = n_samples
        return Settings(n_fft, length, self.hop_length, self.remove_mean)

    def extra_repr(self) -> str:
        shown = []
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.name != "init_lambd" and value != argument.default:
                shown.append(f"{argument.name}={value!r}")

        present = "meta" if self.lambd.is_meta else f"{self.lambd.item():.4g}"
        return ", ".join([*shown, f"lambd={present}"])

    def frozen(self, n_samples: int | None = None) -> "Frozen":
        """The layer with the window of the present λ, for export: see Frozen.

        n_samples: length of the clips. Needed where optimized is False, as the window is as long,
        and then the features are the layer's for clips of that length alone. Otherwise it shortens
        N where they are short for it. Raises ValueError where it is missing.
        """
        if n_samples is not None:
            n_samples = whole_number(n_samples, "n_samples")
        elif self.optimized:
            n_samples = LONGEST_CLIP
        else:
            raise ValueError(
                "n_samples is missing: with optimized=False the window is as long as the clips."
            )

        settings = self._settings(n_samples, 1, self.lambd.device, self.lambd.dtype)
        w, _ = gaussian_window(self.lambd.detach(), settings.length, self.normalize_window)
        return Frozen(settings, w)


@dataclass(kw_only=True, eq=False, repr=False)
class DMEL(DifferentiableSpectrogram):
    """Log-Mel spectrogram with a trainable Gaussian window, equations 1 to 5.

    As DifferentiableSpectrogram; output shape = (..., n_mels, time//hop_length + 1). With
    optimized=True the gradient is 0 below λ ≈ 0.5: λ does not leave that range.
    """

    # Hz.
    sample_rate: int = field(kw_only=False)

    # Number of filters. Those that fall between two bins of a short FFT are empty: energy 0.
    n_mels: int

    # Hz, where the lowest filter begins.
    f_min: float = 0.0

    # Hz, where the highest filter ends. None: sample_rate // 2.
    f_max: float | None = None

    # ln(mel + 1e-10), not mel itself.
    log: bool = True

    # Subtract ln(1e-10) from log-Mels, so that silence and padding are 0 and not -23.
    zero_floor: bool = False

    optimized: bool = True

    # Scale the filters so that log-Mels do not jump by about ln 2 where the FFT size doubles.
    continuous: bool = False

    # None or "slaney", as torchaudio's.
    norm: str | None = None

    # "htk" or "slaney", as torchaudio's.
    mel_scale: str = "htk"

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.n_mels = whole_number(self.n_mels, "n_mels")
        f_max = self.sample_rate // 2 if self.f_max is None else self.f_max
        if not 0 <= self.f_min < f_max <= self.sample_rate / 2:
            raise ValueError(
                f"0 <= f_min={self.f_min} < f_max={f_max} <= sample_rate / 2 = "
                f"{self.sample_rate / 2:g} Hz must hold."
            )
        if self.norm not in (None, "slaney"):
            raise ValueError(f"norm={self.norm!r} must be None or 'slaney'.")
        if self.mel_scale not in MEL_SCALES:
            raise ValueError(f"mel_scale={self.mel_scale!r} must be 'htk' or 'slaney'.")
        if self.zero_floor and not self.log:
            raise ValueError("zero_floor=True is of the logarithm, and needs log=True.")

    @property
    def window_length(self) -> float:
        """Window length l = 6λ / sample_rate, in seconds."""
        return WINDOW_SIGMAS * abs(self.lambd.item()) / self.sample_rate

    @property
    def n_fft(self) -> int:
        """FFT size N of the adaptive mode for the present λ, unless the clip is short for it."""
        return fft_size(self.lambd)

    def _settings(
        self, n_samples: int, n_groups: int, device: torch.device, dtype: torch.dtype
    ) -> Settings:
        settings = super()._settings(n_samples, n_groups, device, dtype)
        filters = mel_filters(
            settings.n_fft,
            self.n_mels,
            self.sample_rate,
            self.f_min,
            self.f_max,
            self.norm,
            self.mel_scale,
            self.continuous,
            n_groups,
            device,
            dtype,
        )
        return settings._replace(filters=filters, log=self.log, zero_floor=self.zero_floor)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        if self.lambd.is_meta:
            return shown
        return f"{shown} ({1000 * self.window_length:.4g} ms)"


# 6. What travels to other programs and optimizers.


class Frozen(Layer):
    """A layer with a fixed window, as layer.frozen() gives it: equations 2 to 5 as plain operators.

    It is there for export and compilers: the layer itself chooses N by reading λ, which no graph
    can hold. Its features are the layer's for clips of more than N/4 samples, since the layer
    shortens N for shorter ones; where it was made for clips of n_samples, see layer.frozen.
    """

    window: Tensor
    weights: Tensor | None

    def __init__(self, settings: Settings, w: Tensor) -> None:
        super().__init__()
        # Window and weights are buffers, so that they move with the module and are in its state.
        # The weights are copied, since those of the cache belong to all layers.
        self.register_buffer("window", w)
        if settings.filters is None:
            self.register_buffer("weights", None)
        else:
            ((bins, weights),) = settings.filters
            self.first_bin, self.end_bin = bins.start, bins.stop
            self.register_buffer("weights", weights.clone())
        self.settings = settings._replace(filters=None)

    def forward(self, x: Tensor) -> Tensor:
        """Features of clips x, shapes as the layer's. Raises ValueError where they are integers."""
        if not x.is_floating_point():  # not of their shape, which may vary in a graph
            raise wrong_clips(x)

        settings = self.settings
        if self.weights is not None:
            bins = slice(self.first_bin, self.end_bin)
            settings = settings._replace(filters=[(bins, self.weights)])

        with torch.autocast(x.device.type, enabled=False):
            padded = padded_clips(x, settings, self.window.dtype)
            values = features(frames_of(padded, settings), self.window, settings)
        return shaped_as_clips(values, x)


def parameter_groups(
    network: nn.Module, lr_lambd: float = 1.0
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Parameter groups for an optimizer: λ of every layer, and all other parameters.

    They are there because λ is in samples: it needs steps of about one, lr_lambd, where weights
    need a thousandth, and weight decay would pull it to 0. lr_lambd is for optimizers whose step is
    about as long as the rate, such as Adam and AdamW: RMSprop begins with ten times the rate, and
    Adafactor takes it as a share of λ. Raises ValueError where no layer is.
    """
    # A dict keeps the order, and takes a layer once that the network holds under two names.
    lambds: dict[nn.Parameter, None] = {}
    for module in network.modules():
        if isinstance(module, DifferentiableSpectrogram):
            lambds[module.lambd] = None
    if not lambds:
        raise ValueError("the network has no layer of dmel.py, so there is no λ to train.")

    others = [parameter for parameter in network.parameters() if parameter not in lambds]
    return [
        {"params": list(lambds), "lr": lr_lambd, "weight_decay": 0.0},
        {"params": others},
    ]
