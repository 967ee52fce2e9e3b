"""DMEL, the log-Mel spectrogram whose window length is a weight of the network.

    layer = DMEL(sample_rate=8000, n_mels=64, hop_length=80, init_lambd=8000 * 0.035 / 6)
    log_mel = layer(clips)       # (batch, time) -> (batch, n_mels, time // hop_length + 1)
    log_mel.sum().backward()     # fills layer.lambd.grad
    torch.optim.AdamW(parameter_groups(network), lr=1e-4)    # λ at a learning rate of its own, and without decay

The window is a Gaussian whose standard deviation λ = |lambd|, in samples, is the one parameter of
the layer; the window is as long as six of them. This file needs torch alone and can be copied.
Source: Martinsson and Sandsten, "DMEL: The differentiable log-Mel spectrogram as a trainable layer
in neural networks", ICASSP 2024.
"""
# mypy: disable-error-code="attr-defined, no-any-return, no-untyped-call, untyped-decorator, var-
# annotated"

import functools
import math
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

WINDOW_SIGMAS = 6  # window length in standard deviations λ: l = 6λ
LOG_FLOOR = (
    1e-10  # added to a mel band before the logarithm; ONNX exporters take a scalar so small for 0
)
CONTINUOUS_N = 512  # FFT size whose filter sums continuous gives to filters of every size: that of 35 ms at 8 kHz
MEL_GROUPS = 4  # the filters of a group share one product over the bins they touch: a quarter of the dense work
CPU_BLOCK = (
    2**19
)  # samples of windowed frames that a thread works on at once: 2 MiB of float32 stay in its caches
GPU_BLOCK = 2**26  # enough for a whole batch: 256 MiB of float32
MEL_SCALES: dict[str, Any] = {  # from Hz to mel and back
    "htk": (
        lambda hz: 2595 * torch.log10(1 + hz / 700),
        lambda mel: 700 * (10 ** (mel / 2595) - 1),
    ),
    "slaney": (
        lambda hz: torch.where(
            hz < 1000, hz * 3 / 200, 15 + 27 * torch.log(hz / 1000) / math.log(6.4)
        ),
        lambda mel: torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27)),
    ),
}


def fft_size(lambd: Tensor | float, n_samples: int = 2**61) -> int:
    """FFT size N of the adaptive mode: the smallest power of two ≥ int(6λ), at most the one ≥
    2·n_samples of a clip.

    Reading λ, in samples, is the layer's one host-device synchronisation. Raises ValueError where λ
    is not finite.
    """
    value = abs(torch.as_tensor(lambd).item())
    if not math.isfinite(value):
        raise ValueError(
            f"lambd is {value}, so there is no window length: lower the learning rate of lambd."
        )
    support = int(
        min(torch.tensor(WINDOW_SIGMAS * value, dtype=torch.float32).item(), 2 * n_samples)
    )
    return 1 << max(1, (support - 1).bit_length())


def gaussian_window(lambd: Tensor, length: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Gaussian window w[n] = exp(-((n - length/2) / λ)² / 2) and its derivative in lambd, shape =
    (length,) each.

    lambd: one element, in samples; at 0 the window is an impulse at n = length/2. normalize divides
    by sqrt(Σ w²).
    """
    squared_distance = (
        torch.arange(length, dtype=lambd.dtype, device=lambd.device) - length / 2
    ).square()
    if (
        normalize
    ):  # a common factor cancels, so measure from the peak: the sum below is then never 0
        squared_distance = squared_distance - squared_distance.min()
    sigma = lambd.abs().clamp(min=torch.finfo(lambd.dtype).tiny)
    exponent = (squared_distance / sigma / sigma).clamp(max=1500.0)  # exp(-750) is 0 in float64 too
    window = torch.exp(exponent / -2)
    derivative = window * exponent / torch.copysign(sigma, lambd)
    if normalize:
        norm = window.square().sum().sqrt()
        window, derivative = window / norm, derivative / norm
        derivative = derivative - window * torch.dot(
            window, derivative
        )  # autocast leaves dot alone
    return window, derivative


def mel_filter_bank(
    n_fft: int, n_mels: int, rate: int, f_min: float, f_max: Any, norm: Any, mel_scale: str
) -> Tensor:
    """Triangular filters, shape = (n_fft//2 + 1, n_mels), float64; arguments as DMEL's. Source:
    torchaudio, librosa.
    """
    to_mel, to_hz = MEL_SCALES[mel_scale]
    first, last = to_mel(
        torch.tensor([f_min, rate // 2 if f_max is None else f_max], dtype=torch.float64)
    )
    edges = to_hz(torch.linspace(first, last, n_mels + 2, dtype=torch.float64))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = torch.linspace(0, rate // 2, n_fft // 2 + 1, dtype=torch.float64).unsqueeze(1)
    bank = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(
        min=0
    )
    return bank * 2 / (high - low) if norm == "slaney" else bank


@functools.lru_cache(maxsize=64)
def mel_filters(
    n_fft: int, continuous: bool, n_groups: int, target: Any, *settings: Any
) -> tuple[Any, Any]:
    """mel_filter_bank(n_fft, *settings) in groups: (first, last) and weights, shape = (last -
    first, filters), each.
    """
    ranges, weights = [], []
    with torch.inference_mode(False), torch._C._DisableFuncTorch():  # plain tensors for the cache
        bank = mel_filter_bank(n_fft, *settings)
        if continuous:  # in a fine grid a filter's sum grows as the FFT size
            sums, fine = bank.sum(dim=0), mel_filter_bank(2**15, *settings).sum(dim=0) / 2**15
            bank = bank * torch.where(sums > 0, CONTINUOUS_N * fine / sums, 0.0)
        for filters in bank.tensor_split(n_groups, dim=1):
            bins = filters.any(dim=1).nonzero().flatten().tolist() or [0]
            ranges.append(
                (2 * bins[0], 2 * bins[-1] + 2)
            )  # of products in features_of, two of each bin
            weights.append(filters[bins[0] : bins[-1] + 1].repeat_interleave(2, dim=0).to(*target))
    return ranges, weights


# What turns clips into features beside the window. ranges, weights: of mel_filters, empty where
# there are none.
Settings = namedtuple(
    "Settings", "n_fft length hop_length remove_mean ranges weights log zero_floor"
)


def features_of(
    frames: Tensor, windows: Tensor, settings: Settings, memory: Any = None
) -> list[Tensor]:
    """Features of frames under a window w and, where windows holds 2·dw/dλ too, their derivative in
    λ.

    Shapes: frames (clips, frames, length), windows (1 or 2, length), results (clips, frames,
    bands). memory is reused.
    """
    windowed = torch.mul(
        frames, windows[:, None, None], out=None if memory is None else memory.resize_(0)
    )
    spectra = torch.fft.rfft(windowed, settings.n_fft)  # (windows, clips, frames, bins)
    parts = torch.view_as_real(spectra).flatten(-2)  # real and imaginary parts interleaved
    # The terms of |S|² and of 2 Re(conj(S)·dS/dλ), still to be added, in the memory that windowed
    # no longer needs.
    products = parts * parts[:1] if memory is None else parts
    for part in parts.unbind()[::-1] if memory is not None else ():  # in place, S itself last
        part *= parts[0]
    if settings.ranges:
        groups = zip(settings.ranges, settings.weights, strict=True)
        bands = torch.cat(
            [products[..., first:last] @ weights for (first, last), weights in groups], dim=-1
        )
    else:
        bands = products[..., ::2] + products[..., 1::2]
    values, *derivatives = bands.unbind()
    if not settings.log:
        return [values, *derivatives]
    floored = values + (
        values.new_full((1,), LOG_FLOOR) if torch.compiler.is_compiling() else LOG_FLOOR
    )
    derivatives = [derivative.div_(floored) for derivative in derivatives]
    return [(values / LOG_FLOOR).log1p_() if settings.zero_floor else floored.log_(), *derivatives]


def blocks(frames: Tensor, n_fft: int) -> Iterator[tuple[slice, slice]]:
    """Parts of (clips, frames) whose transforms stay in the caches; of equal size, not with a small
    last one.
    """
    n_clips, n_frames, _ = frames.shape
    per_block = max(
        1, (CPU_BLOCK * torch.get_num_threads() if frames.is_cpu else GPU_BLOCK) // (2 * n_fft)
    )
    frame_step = math.ceil(n_frames / math.ceil(n_frames / per_block))
    clip_step = max(1, per_block // n_frames)
    for clip in range(0, n_clips, clip_step):
        for frame in range(0, n_frames, frame_step):
            yield slice(clip, clip + clip_step), slice(frame, min(frame + frame_step, n_frames))


def in_blocks(frames: Tensor, windows: Tensor, settings: Settings) -> list[Tensor]:
    """features_of, block by block, all in one piece of memory."""
    n_bands = sum(weights.shape[1] for weights in settings.weights) or settings.n_fft // 2 + 1
    results = [frames.new_empty(*frames.shape[:2], n_bands) for _ in windows]
    memory = frames.new_empty(0)
    for block in blocks(frames, settings.n_fft):
        for result, values in zip(
            results, features_of(frames[block], windows, settings, memory), strict=True
        ):
            result[block] = values
    return results


class _Known(torch.autograd.Function):
    """Values whose derivative in lambd, shape as theirs, is known; where it is None, asking for it
    raises.
    """

    generate_vmap_rule = True
    forward = staticmethod(lambda values, derivative, lambd: values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        derivative, lambd = ctx.saved_tensors
        if derivative is None:
            raise RuntimeError(
                "DMEL has no second derivative in lambd: its first one cannot be differentiated in it."
            )
        derivative = _Known.apply(derivative, None, lambd)  # for create_graph=True
        return None, None, torch.dot(gradient.flatten(), derivative.flatten())


class _Recomputed(torch.autograd.Function):
    """Features of padded clips without a graph: backward computes each block once more."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, windows: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(padded, windows)
        ctx.settings = settings
        return in_blocks(
            padded.unfold(-1, settings.length, settings.hop_length), windows, settings
        )[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (padded, windows), again = ctx.saved_tensors, torch.is_grad_enabled()
        n_fft, length, hop_length, *_ = ctx.settings
        of_padded, of_windows = torch.zeros_like(padded), torch.zeros_like(windows)
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            for clips, rows in blocks(gradient, n_fft):
                part = clips, slice(rows.start * hop_length, (rows.stop - 1) * hop_length + length)
                sources = [padded[part], windows] if windows.requires_grad else [padded[part]]
                features = features_of(
                    sources[0].unfold(-1, length, hop_length), windows, ctx.settings
                )
                gradients = torch.autograd.grad(
                    features, sources, [gradient[clips, rows]], create_graph=again
                )
                of_padded[part] += gradients[0]
                of_windows += sum(gradients[1:])
        return of_padded, of_windows, None


def transform(
    x: Tensor, settings: Settings, window: Tensor, derivative: Any = None, lambd: Any = None
) -> Tensor:
    """Features of clips x, shapes as the layer's, tied to lambd and to the clips where these need a
    gradient.

    window, derivative: of gaussian_window; without derivative the window is a constant, and the
    rest can be exported.
    """
    with torch.autocast(x.device.type, enabled=False):
        clips = x.reshape(-1, x.shape[-1]).to(window.dtype)
        clips = clips - clips.mean(dim=-1, keepdim=True) if settings.remove_mean else clips
        padded = nn.functional.pad(clips, ((settings.length + 1) // 2, settings.length // 2))
        frames = padded.unfold(
            -1, settings.length, settings.hop_length
        )  # a view, (clips, frames, length)
        if derivative is None:
            features = features_of(frames, window.unsqueeze(0), settings)[0]
        elif torch._C._are_functorch_transforms_active():  # torch.func hides what needs a gradient
            features = features_of(
                frames, _Known.apply(window, derivative, lambd).unsqueeze(0), settings
            )[0]
        elif padded.requires_grad:
            features = _Recomputed.apply(
                padded, _Known.apply(window, derivative, lambd).unsqueeze(0), settings
            )
        elif torch.is_grad_enabled() and lambd.requires_grad:
            features = _Known.apply(
                *in_blocks(frames, torch.stack([window, 2 * derivative]), settings), lambd
            )
        else:
            features = in_blocks(frames, window.unsqueeze(0), settings)[0]
    return features.reshape(*x.shape[:-1], *features.shape[1:]).transpose(-1, -2).to(x.dtype)


@dataclass(kw_only=True, eq=False, repr=False)
class DifferentiableSpectrogram(nn.Module):
    """Power spectrogram |STFT|² with a trainable Gaussian window.

    Input shape = (..., time), floating point; output shape = (..., n_fft//2 + 1, time//hop_length +
    1), of its dtype, computed in float32 or wider. Frames are centred, with zeros beyond the clip's
    ends. Gradients flow to lambd and the clips, a second one in lambd raises RuntimeError. Below λ
    ≈ 0.5 the gradient is 0: λ does not leave that range.
    """

    hop_length: int  # step between frames, in samples
    init_lambd: float  # λ to start from, in samples: sample_rate · l / 6 for a window of l seconds
    optimized: bool = False  # window and FFT size: True: the power of two that fits 6λ; False: the clip's, twice that
    normalize_window: bool = False  # divide the window by sqrt(Σ w²)
    remove_mean: bool = (
        True  # of each clip; where they are padded with zeros, subtract it before and pass False
    )

    def __post_init__(self) -> None:
        super().__init__()
        if self.hop_length < 1 or not math.isfinite(self.init_lambd):
            raise ValueError(
                f"hop_length={self.hop_length} must be 1 or more, init_lambd={self.init_lambd} finite."
            )
        if abs(self.init_lambd) < 1:
            unit = "λ is in samples, sample_rate · seconds / 6"
            warnings.warn(
                f"init_lambd={self.init_lambd} is below 1: {unit}.",
                stacklevel=3 + isinstance(self, DMEL),
            )
        self.lambd = nn.Parameter(
            torch.empty((), dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets λ to init_lambd, as is needed after to_empty."""
        nn.init.constant_(self.lambd, self.init_lambd)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Features of clips x, shapes as above. Raises ValueError where x is no clips or λ not
        finite.
        """
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            raise RuntimeError(
                "a trace would keep the FFT size of the present λ: trace layer.frozen() instead."
            )
        if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"clips must be floating point of shape (..., time), not {x.dtype} of {tuple(x.shape)}."
            )
        lambd = self.lambd.to(torch.promote_types(x.dtype, torch.float32))
        settings = self._settings(x.shape[-1], MEL_GROUPS, x.device, lambd.dtype)
        return transform(
            x,
            settings,
            *gaussian_window(lambd.detach(), settings.length, self.normalize_window),
            lambd,
        )

    def frozen(self, n_samples: int | None = None) -> "Frozen":
        """The layer with the window of the present λ, for export. n_samples: clip length, with
        optimized=False.
        """
        if not self.optimized and n_samples is None:
            raise ValueError(
                "n_samples is missing: with optimized=False the window is as long as the clips."
            )
        settings = self._settings(n_samples or 2**61, 1, self.lambd.device, self.lambd.dtype)
        return Frozen(
            settings,
            gaussian_window(self.lambd.detach(), settings.length, self.normalize_window)[0],
        )

    def extra_repr(self: Any) -> str:
        shown = [
            f.name
            for f in fields(self)
            if f.name != "init_lambd" and getattr(self, f.name) != f.default
        ]
        present = "meta" if self.lambd.is_meta else f"{self.lambd.item():.4g}"
        if isinstance(self, DMEL) and not self.lambd.is_meta:
            present += f" ({1000 * self.window_length:.4g} ms)"
        return ", ".join(
            [*(f"{name}={getattr(self, name)!r}" for name in shown), f"lambd={present}"]
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Stays in float32 where a network is cast to half precision: there λ could not move.
        return nn.Module._apply(
            self, lambda t: new if (new := fn(t)).itemsize >= 4 else t.to(new.device), recurse
        )

    def _settings(self, n_samples: int, n_groups: int, *target: Any) -> Settings:
        length = fft_size(self.lambd, n_samples) if self.optimized else n_samples
        n_fft = length if self.optimized else 2 * length
        return Settings(
            n_fft, length, self.hop_length, self.remove_mean, (), (), log=False, zero_floor=False
        )


@dataclass(kw_only=True, eq=False, repr=False)
class DMEL(DifferentiableSpectrogram):
    """Log-Mel spectrogram: a DifferentiableSpectrogram and mel filters; output (..., n_mels,
    time//hop_length + 1).
    """

    sample_rate: int = field(kw_only=False)  # Hz
    n_mels: int  # number of filters; those that fall between two bins of a short FFT are empty, their energy is 0
    f_min: float = 0.0  # Hz
    f_max: float | None = None  # Hz; None: sample_rate // 2
    log: bool = True  # ln(mel + 1e-10), not mel itself
    zero_floor: bool = (
        False  # subtract ln(1e-10) from it, so that silence and padding are 0, not -23
    )
    optimized: bool = True
    continuous: bool = False  # scale the filters so that log-Mels do not jump by about ln 2 where the FFT size doubles
    norm: str | None = None  # None or "slaney", as torchaudio's
    mel_scale: str = "htk"  # "htk" or "slaney", as torchaudio's

    def __post_init__(self) -> None:
        super().__post_init__()
        f_max = self.sample_rate // 2 if self.f_max is None else self.f_max
        if self.n_mels < 1 or not 0 <= self.f_min < f_max <= self.sample_rate / 2:
            told = f"n_mels={self.n_mels} must be 1 or more, 0 <= f_min={self.f_min} < f_max={f_max} <= sample_rate / 2"
            raise ValueError(f"{told} = {self.sample_rate / 2:g} Hz.")
        if self.norm not in (None, "slaney") or self.mel_scale not in MEL_SCALES:
            raise ValueError(
                f"norm={self.norm!r}: None or 'slaney'; mel_scale={self.mel_scale!r}: 'htk' or 'slaney'."
            )

    @property
    def window_length(self) -> float:
        """Window length l = 6λ / sample_rate, in seconds."""
        return WINDOW_SIGMAS * abs(self.lambd.item()) / self.sample_rate

    @property
    def n_fft(self) -> int:
        """FFT size N of the adaptive mode for the present λ, where the clip is long enough for it."""
        return fft_size(self.lambd)

    def _settings(self, n_samples: int, n_groups: int, *target: Any) -> Settings:
        settings = super()._settings(n_samples, n_groups, *target)
        bank = self.n_mels, self.sample_rate, self.f_min, self.f_max, self.norm, self.mel_scale
        ranges, weights = mel_filters(settings.n_fft, self.continuous, n_groups, target, *bank)
        return settings._replace(
            ranges=ranges, weights=weights, log=self.log, zero_floor=self.zero_floor
        )


class Frozen(nn.Module):
    """A layer with a fixed window. Only clips of N/4 samples or fewer differ: the layer itself
    shortens N for them.
    """

    _apply: Any = DifferentiableSpectrogram._apply

    def __init__(self, settings: Settings, window: Tensor) -> None:
        super().__init__()
        self.settings = settings._replace(weights=())  # one group or none
        self.register_buffer("window", window)
        self.register_buffer("weights", settings.weights[0] if settings.weights else None)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Features of clips x, shapes as the layer's."""
        return transform(x, self.settings._replace(weights=[self.weights]), self.window)


def parameter_groups(network: nn.Module, lr_lambd: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: λ of every layer, at lr_lambd and without weight decay,
    and all else.
    """
    lambds = dict.fromkeys(
        m.lambd for m in network.modules() if isinstance(m, DifferentiableSpectrogram)
    )
    if not lambds:
        raise ValueError("the network has no layer of dmel.py, so there is no λ to train.")
    others = [parameter for parameter in network.parameters() if parameter not in lambds]
    return [{"params": [*lambds], "lr": lr_lambd, "weight_decay": 0.0}, {"params": others}]
