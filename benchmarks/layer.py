"""The sections that measure the layer alone."""

import functools
import importlib.metadata
import sys
from pathlib import Path

import psutil
import torch
import torchaudio
from torch import nn

import datasets
from benchmarks.clip_by_clip import ClipByClip
from benchmarks.measure import (
    first_config,
    forward_backward,
    fresh_process,
    medians,
    recordings_of,
)
from config import read_search_space
from datasets import SAMPLE_RATE
from dmel import CPU_BLOCK, DMEL, GPU_BLOCK, WINDOW_SIGMAS, DifferentiableSpectrogram

WINDOW_SECONDS = (0.010, 0.035, 0.300)  # the paper's
HOP_LENGTH = 80
N_MELS = 64
DSTFT_VERSION = "3.0.0"
SETTINGS = {"sample_rate": SAMPLE_RATE, "n_mels": N_MELS, "hop_length": HOP_LENGTH}


def layer(args):
    """Layer, 32 clips of 5 s, forward and backward in λ, ms"""
    n_clips = 2 if args.tiny else 32
    for seconds in WINDOW_SECONDS:
        clips = torch.randn(n_clips, 5 * SAMPLE_RATE, device=args.device)
        dmel = make_layer(seconds, args.device)
        library = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=dmel.n_fft, hop_length=HOP_LENGTH, n_mels=N_MELS
        ).to(args.device)

        # As many FFTs as forward and backward take, in blocks of the layer's size.
        n_ffts = 2 * n_clips * (clips.shape[1] // HOP_LENGTH + 1)
        size = CPU_BLOCK if clips.is_cpu else GPU_BLOCK
        block_size = max(1, min(n_ffts, size // dmel.n_fft))
        block = torch.randn(block_size, dmel.n_fft, device=args.device)

        ours, standin, forward, ffts = medians(
            args,
            forward_backward(dmel, clips),
            forward_backward(ClipByClip(dmel), clips),
            functools.partial(library, clips),
            functools.partial(ffts_of, block, n_ffts // block_size),
        )
        yield {
            "window": f"{1000 * seconds:.0f} ms (FFT {dmel.n_fft})",
            "DMEL": ours,
            "clip by clip": standin,
            "ratio": f"{standin / ours:.1f}×",
            "torchaudio, forward alone": forward,
            "its ratio": f"{forward / ours:.2f}×",
            "the FFTs alone": ffts,
        }


def ffts_of(block, n_blocks):
    for _ in range(n_blocks):
        torch.fft.rfft(block)


def make_layer(seconds, device, **options):
    init_lambd = SAMPLE_RATE * seconds / WINDOW_SIGMAS
    return DMEL(**SETTINGS, init_lambd=init_lambd, **options).to(device)


def dstft(args):
    """Power spectrogram beside that of dstft (`pip install --no-deps dstft==3.0.0`, window_mode
    "constant"), 32 clips of 5 s, forward and backward in the window length, ms
    """
    if not has_dstft():
        print(
            f"dstft: left out, as that package is not there in version {DSTFT_VERSION}: "
            f"`pip install --no-deps dstft=={DSTFT_VERSION}`.",
            file=sys.stderr,
        )
        return

    n_clips = 2 if args.tiny else 32
    for seconds in WINDOW_SECONDS:
        clips = torch.randn(n_clips, 5 * SAMPLE_RATE, device=args.device)
        log_mel = make_layer(seconds, args.device)
        spectrogram = DifferentiableSpectrogram(
            hop_length=HOP_LENGTH,
            init_lambd=log_mel.init_lambd,
            optimized=True,
            remove_mean=False,
        ).to(args.device)
        other = PowerOfDstft(log_mel.n_fft, SAMPLE_RATE * seconds, clips)

        ours_of_mel, ours, theirs = medians(
            args,
            forward_backward(log_mel, clips),
            forward_backward(spectrogram, clips),
            forward_backward(other, clips),
        )
        yield {
            "window": f"{1000 * seconds:.0f} ms (FFT {log_mel.n_fft})",
            "DifferentiableSpectrogram": ours,
            "dstft": theirs,
            "ratio": f"{theirs / ours:.1f}×",
            "DMEL": ours_of_mel,
        }


def has_dstft():
    try:
        return importlib.metadata.version("dstft") == DSTFT_VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


class PowerOfDstft(nn.Module):
    """The power spectrogram of dstft, its one trained parameter under the name of ours."""

    def __init__(self, n_fft, win_length, clips):
        """win_length: in samples, to start from. clips: those to come, or others as long."""
        from dstft import DSTFT

        super().__init__()
        self.dstft = DSTFT(
            n_fft=n_fft,
            win_length=win_length,
            win_length_min=1.0,
            hop_length=HOP_LENGTH,
            window_mode="constant",
            magnitude_power=2.0,
        ).to(clips.device)
        self.dstft.initialize(clips)
        (self.lambd,) = [weight for weight in self.dstft.parameters() if weight.requires_grad]

    def forward(self, clips):
        spectrogram, _ = self.dstft(clips)
        return spectrogram


def memory(args):
    """Memory of forward and backward beyond input and output, 32 clips of 5 s, window 300 ms"""
    n_clips = 2 if args.tiny else 32
    for name, of_clips in (("DMEL", False), ("clip by clip", False), ("DMEL", True)):
        with fresh_process() as pool:  # where nothing is left over from before
            n_bytes = pool.submit(extra_memory, name, of_clips, n_clips, args.device).result()
        yield {
            "way": name,
            "gradient of": "λ and the clips" if of_clips else "λ",
            "MiB": n_bytes / 2**20,
        }


def extra_memory(name, of_clips, n_clips, device):
    """Bytes at the peak of forward and backward, beyond clips, features and their gradients."""
    way = make_layer(0.300, device)
    if name != "DMEL":
        way = ClipByClip(way)

    # Libraries load and threads start here; on a short clip, as memory that it frees is not counted
    # when used again.
    features = way(torch.randn(1, SAMPLE_RATE // 2, device=device, requires_grad=of_clips))
    features.backward(torch.randn_like(features))

    clips = torch.randn(n_clips, 5 * SAMPLE_RATE, device=device, requires_grad=of_clips)
    n_frames = clips.shape[1] // HOP_LENGTH + 1
    upstream = torch.randn(N_MELS, n_frames, device=device).expand(n_clips, -1, -1)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start the peak anew
        before = psutil.Process().memory_info().rss

    features = way(clips)
    features.backward(upstream)

    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])

    outputs = features.nbytes
    if of_clips:
        outputs += clips.grad.nbytes
    return peak - before - outputs


def scaling(args):
    """Layer, forward and backward, as the work grows"""
    n_clips, clip_seconds = (4, 1) if args.tiny else (16, 5)
    window = 0.035
    cells = []
    for factor in (1, 2, 4, 8):
        cells.append((factor * n_clips, clip_seconds, window))
    for factor in (1, 2, 4, 8):
        cells.append((n_clips, factor * clip_seconds, window))
    for seconds in (0.010, 0.035, 0.070, 0.150, 0.300, 0.600):
        cells.append((n_clips, clip_seconds, seconds))

    for n, length, seconds in cells:
        dmel = make_layer(seconds, args.device)
        clips = torch.randn(n, length * SAMPLE_RATE, device=args.device)
        (ours,) = medians(args, forward_backward(dmel, clips))
        samples = n * (length * SAMPLE_RATE // HOP_LENGTH + 1) * dmel.n_fft
        yield {
            "clips": n,
            "seconds": length,
            "window": f"{1000 * seconds:.0f} ms (FFT {dmel.n_fft})",
            "ms": ours,
            "ns per sample of a frame": 1e6 * ours / samples,
        }


@torch.no_grad()
def jumps(args):
    """Change of the log-Mel where the FFT size doubles: white noise, pure tones in the band where
    they are strongest
    """
    time_axis = torch.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    noise = torch.randn(2 if args.tiny else 64, len(time_axis))
    frequencies = torch.linspace(60, 3900, 97)[:, None]
    tones = torch.sin(2 * torch.pi * frequencies * time_axis)

    for n_fft in (128, 256, 512, 1024):
        doubling = (n_fft + 1) / WINDOW_SIGMAS
        for continuous in (False, True):
            below = DMEL(**SETTINGS, init_lambd=doubling - 1e-3, continuous=continuous)
            above = DMEL(**SETTINGS, init_lambd=doubling + 1e-3, continuous=continuous)
            of_bands = (above(noise) - below(noise)).mean(dim=(0, 2))

            before = below(tones).mean(dim=2)
            after = above(tones).mean(dim=2)
            strongest = before.argmax(dim=1, keepdim=True)
            of_tones = (after - before).gather(1, strongest)
            yield {
                "λ": f"{doubling:.2f}",
                "FFT": f"{n_fft} to {2 * n_fft}",
                "continuous": str(continuous),
                "noise, mean over bands": f"{of_bands.mean():.3f}",
                "noise, largest of a band": f"{of_bands.abs().max():.3f}",
                "tones, largest": f"{of_tones.abs().max():.3f}",
            }


@torch.no_grad()
def levels(args):
    """Root mean square of the log-Mel of audio_mnist's training clips; dropout of 0.2 makes noise
    of half of it
    """
    config = first_config(read_search_space("audio_mnist", 1))
    data = datasets.load(config, recordings_of(config, args))
    clips = data.clips[data.splits["train"]]
    for seconds in (0.010, 0.020, 0.035, 0.070, 0.150, 0.300, 0.500):
        row = {"window": f"{1000 * seconds:.0f} ms"}
        for name, zero_floor in (("default", False), ("zero_floor", True)):
            log_mel = make_layer(seconds, "cpu", zero_floor=zero_floor)(clips)
            row[name] = f"{log_mel.square().mean().sqrt():.2f}"
        yield row


SECTIONS = (layer, dstft, memory, scaling, jumps, levels)
