"""The layer: golden vectors, derivatives, an independent implementation, invariants, limits."""

import copy
import json
import math
import shutil
import subprocess
import sys

import librosa
import numpy as np
import pytest
import torch
import torchaudio
from conftest import ROOT, shared

import dmel
from dmel import DMEL, LOG_FLOOR, DifferentiableSpectrogram, fft_size, gaussian_window, mel_filter_bank

GOLDEN_LAYERS = ("esc50_10ms", "esc50_35ms", "esc50_300ms", "16k_40mels", "negative_lambda", "normalized")
GOLDEN_SPECTROGRAMS = ("128_short", "128_ref", "128_long")


def clips(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_dmel(lambd=7.3, **arguments):
    return DMEL(**{"sample_rate": 1000, "n_mels": 6, "hop_length": 20, "init_lambd": lambd} | arguments).double()


def golden(name):
    arrays = np.load(shared(f"golden/{name}.npz"))
    tensors = {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files if key != "meta"}
    return tensors, json.loads(str(arrays["meta"]))


def assert_close_to_largest(actual, expected, tolerance):
    error = (actual.detach() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOLDEN_LAYERS)
def test_golden_layer(name, dtype):
    tensors, meta = golden(f"layer_{name}")
    layer = DMEL(
        meta["sample_rate"],
        n_mels=meta["n_mels"],
        hop_length=meta["hop_length"],
        init_lambd=meta["lambd"],
        f_min=meta["f_min"],
        f_max=meta["f_max"],
        normalize_window=meta["normalize_window"],
    )
    assert layer.n_fft == meta["n_fft"]
    expected = tensors["mel"].squeeze(1).to(dtype)
    log_mel = layer(tensors["x"].to(dtype))
    assert log_mel.dtype == dtype
    # The logarithm checks the small bands too. There the original's float32 rounding shows beside float64.
    assert_close_to_largest(log_mel, (expected + LOG_FLOOR).log(), 1e-5 if dtype == torch.float32 else 3e-5)
    (log_mel * tensors["upstream"].squeeze(1)).sum().backward()
    assert layer.lambd.grad.item() == pytest.approx(tensors["dlambd_logmel"].item(), rel=1e-3)
    layer.log = False
    assert_close_to_largest(layer(tensors["x"].to(dtype)), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOLDEN_SPECTROGRAMS)
def test_golden_spectrogram(name, dtype):
    tensors, meta = golden(f"spectrogram_{name}")
    layer = DifferentiableSpectrogram(
        hop_length=meta["hop_length"], init_lambd=meta["lambd"], normalize_window=meta["normalize_window"]
    )
    power = layer(tensors["x"].to(dtype))
    assert_close_to_largest(power, tensors["power"].squeeze(1).to(dtype), 1e-5)
    (power * tensors["upstream"].squeeze(1)).sum().backward()
    assert layer.lambd.grad.item() == pytest.approx(tensors["dlambd"].item(), rel=1e-3)


def plain_power(x, lambd, hop_length, adaptive, normalize_window):
    """The power spectrogram by torch.stft and autograd, one clip at a time: shape = (batch, bins, frames)."""
    time = x.shape[-1]
    support = min(int(6 * abs(lambd.item())), 2 * time)
    n_fft = 2 ** math.ceil(math.log2(support)) if adaptive else 2 * time
    length = n_fft if adaptive else time
    window = torch.exp(-0.5 * ((torch.arange(length, dtype=x.dtype) - length / 2) / lambd) ** 2)
    if normalize_window:
        window = window / window.square().sum().sqrt()
    centred = x - x.mean(dim=-1, keepdim=True)
    stft = [
        torch.stft(clip, n_fft, hop_length, length, window, center=True, pad_mode="constant", return_complex=True)
        for clip in centred
    ]
    return torch.stack(stft).abs().square()


CASES = [  # time, hop, λ, normalize_window; odd lengths, one frame, a window longer than the clip
    (300, 20, 7.3, False),
    (301, 7, 7.3, True),
    (129, 1, -3.1, False),
    (50, 64, 2.2, True),
    (40, 10, 30.0, False),
]


@pytest.mark.parametrize(("time", "hop_length", "lambd", "normalize_window"), CASES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_equals_plain_stft_and_autograd(time, hop_length, lambd, normalize_window, adaptive):
    x, reference_x = clips(3, time).requires_grad_(), clips(3, time).requires_grad_()
    arguments = {"normalize_window": normalize_window, "optimized": adaptive}
    layers = (
        DifferentiableSpectrogram(hop_length=hop_length, init_lambd=lambd, **arguments).double(),
        small_dmel(lambd, hop_length=hop_length, log=False, **arguments),
        small_dmel(lambd, hop_length=hop_length, **arguments),
    )
    for kind, layer in zip(("power", "mel", "log-mel"), layers, strict=True):
        reference_lambd = torch.tensor(lambd, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            reference_lambd.copy_(layer.lambd)  # λ as float32 holds it
        expected = plain_power(reference_x, reference_lambd, hop_length, adaptive, normalize_window)
        if kind != "power":
            n_fft = 2 * (expected.shape[-2] - 1)
            bank = librosa.filters.mel(sr=1000, n_fft=n_fft, n_mels=6, htk=True, norm=None, dtype=np.float64)
            expected = torch.from_numpy(bank) @ expected
        if kind == "log-mel":
            expected = (expected + LOG_FLOOR).log()
        actual = layer(x)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        upstream = clips(*expected.shape, seed=1)
        gradients = torch.autograd.grad((actual * upstream).sum(), (x, layer.lambd))
        expected_gradients = torch.autograd.grad((expected * upstream).sum(), (reference_x, reference_lambd))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("normalize_window", [False, True])
@pytest.mark.parametrize("layer_class", [DifferentiableSpectrogram, DMEL])
@pytest.mark.parametrize("adaptive", [True, False])
def test_gradcheck(layer_class, adaptive, normalize_window):
    arguments = {"hop_length": 9, "init_lambd": 3.3, "optimized": adaptive, "normalize_window": normalize_window}
    if layer_class is DMEL:
        arguments |= {"sample_rate": 1000, "n_mels": 3}
    layer = layer_class(**arguments).double()

    def features(x, lambd):
        return torch.func.functional_call(layer, {"lambd": lambd}, (x,))

    lambd = torch.tensor(3.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(features, (clips(2, 41).requires_grad_(), lambd.requires_grad_()), fast_mode=True)


def test_batch_equals_clip_by_clip_for_any_leading_dimensions():
    layer = small_dmel()
    batch = clips(2, 3, 333)
    log_mel = layer(batch)
    assert log_mel.shape == (2, 3, 6, 333 // 20 + 1)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(layer(batch[i, j]), log_mel[i, j])
    assert layer(batch[:0]).shape == (0, 3, 6, 17)


@pytest.mark.parametrize("block", [64, 1000, 5000])
def test_blocks_do_not_change_features_or_gradients(block, monkeypatch):
    def outcome():
        layer, x = small_dmel(), clips(3, 400).requires_grad_()
        log_mel = layer(x)
        gradients = torch.autograd.grad((log_mel * clips(*log_mel.shape, seed=1)).sum(), (x, layer.lambd))
        return log_mel, *gradients

    expected = outcome()
    monkeypatch.setattr(dmel, "CPU_BLOCK", block)
    for actual_part, expected_part in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(actual_part, expected_part)


def test_shift_by_one_hop_shifts_the_frames():
    signal = torch.zeros(800, dtype=torch.float64)
    signal[300:500] = clips(200)
    signal -= signal.mean()  # equal means: shifting in zeros would change it otherwise
    layer = small_dmel(log=False)
    mel, shifted = layer(signal), layer(signal.roll(20))
    torch.testing.assert_close(shifted[:, 5:35], mel[:, 4:34])
    assert not torch.allclose(shifted[:, 15:25], mel[:, 15:25])


def test_amplitude_scales_energy_by_its_square():
    x, layer = clips(2, 300), small_dmel(log=False)
    torch.testing.assert_close(layer(3 * x), 9 * layer(x))


@pytest.mark.parametrize("normalize_window", [False, True])
def test_sign_of_lambd_only_turns_the_gradient(normalize_window):
    x = clips(2, 300)
    positive, negative = (small_dmel(lambd, normalize_window=normalize_window) for lambd in (7.3, -7.3))
    log_mels = positive(x), negative(x)
    torch.testing.assert_close(*log_mels)
    for log_mel in log_mels:
        (log_mel * clips(*log_mel.shape, seed=1)).sum().backward()
    torch.testing.assert_close(positive.lambd.grad, -negative.lambd.grad)
    assert positive.lambd.grad != 0


@pytest.mark.parametrize(
    ("lambd", "n_fft"),
    [
        *[(0.0, 2), (0.2, 2), (1.0, 8), (10.82, 64), (10.84, 128), (21.49, 128), (21.51, 256), (42.82, 256)],
        *[(42.84, 512), (-42.84, 512), (8000 * 0.010 / 6, 128), (8000 * 0.035 / 6, 512), (8000 * 0.3 / 6, 4096)],
    ],
)
@pytest.mark.filterwarnings("ignore:init_lambd")
def test_fft_size_doubles_where_the_original_doubles_it(lambd, n_fft):
    assert fft_size(lambd) == fft_size(torch.tensor(lambd)) == n_fft
    assert DMEL(8000, n_mels=64, hop_length=80, init_lambd=lambd).n_fft == n_fft


@pytest.mark.parametrize("doubling", [257 / 6, 513 / 6])
@pytest.mark.parametrize(("continuous", "low", "high"), [(False, 0.67, 0.72), (True, 0.0, 0.05)])
def test_continuous_takes_away_the_jump_where_the_fft_size_doubles(doubling, continuous, low, high):
    noise = torch.randn(16, 40000)
    before, after = (
        DMEL(8000, n_mels=64, hop_length=80, init_lambd=lambd, continuous=continuous)(noise)
        for lambd in (doubling - 1e-3, doubling + 1e-3)
    )
    assert low <= abs((after - before).mean().item()) < high


@pytest.mark.parametrize("lambd", [13.3, 46.7, 400.0])
def test_continuous_only_scales_each_band(lambd):
    clips = torch.randn(2, 8000)
    scale = DMEL(8000, n_mels=64, hop_length=80, init_lambd=lambd, log=False, continuous=True)(clips) / DMEL(
        8000, n_mels=64, hop_length=80, init_lambd=lambd, log=False
    )(clips)
    scale = scale.nan_to_num(1.0)  # empty bands
    torch.testing.assert_close(scale, scale[:1, :, :1].expand_as(scale), rtol=1e-4, atol=0)
    if lambd == 46.7:  # the FFT size that it starts from: filters of many bins keep their sums
        torch.testing.assert_close(scale[0, 32:, 0], torch.ones(32), rtol=0.1, atol=0)


def test_zero_floor_adds_a_constant_and_silence_is_0():
    clips, upstream = torch.randn(2, 800), torch.randn(2, 64, 11)
    clips[0, 400:] = 0
    layers = [DMEL(8000, n_mels=64, hop_length=80, init_lambd=13.3, zero_floor=on) for on in (False, True)]
    log_mel, from_zero = (layer(clips) for layer in layers)
    torch.testing.assert_close(from_zero, log_mel - math.log(1e-10), rtol=0, atol=1e-5)
    gradients = [
        torch.autograd.grad((upstream * y).sum(), layer.lambd)[0]
        for layer, y in zip(layers, (log_mel, from_zero), strict=True)
    ]
    assert gradients[0] == gradients[1]
    assert layers[1](torch.zeros(1, 800)).eq(0).all()


def test_fft_size_is_bounded_by_the_clip():
    assert fft_size(1e9, 1000) == 2048
    assert fft_size(1e38, 1024) == 2048
    assert fft_size(40.0, 1000) == 256


def test_window_length_is_six_standard_deviations():
    assert DMEL(8000, n_mels=64, hop_length=80, init_lambd=-8000 * 0.035 / 6).window_length == pytest.approx(0.035)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize_window", [False, True])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("time", [100, 101])
@pytest.mark.filterwarnings("ignore:init_lambd")
def test_finite_for_every_finite_lambda(dtype, normalize_window, adaptive, time):
    for lambd in (0.0, 1e-40, 1e-30, 1e-3, 0.2, 0.5, 1e4, 1e9, 3e38, -1e-3, -3e38):
        arguments = {"optimized": adaptive, "normalize_window": normalize_window}
        for layer in (
            DMEL(1000, n_mels=6, hop_length=20, init_lambd=lambd, **arguments),
            DifferentiableSpectrogram(hop_length=20, init_lambd=lambd, **arguments),
        ):
            features = layer(clips(2, time, dtype=dtype))
            features.sum().backward()
            assert features.isfinite().all(), lambd
            assert layer.lambd.grad.isfinite(), lambd


def test_window_at_zero_is_an_impulse_without_derivative():
    window, derivative = gaussian_window(torch.tensor(0.0), 8)
    assert window.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert derivative.tolist() == [0] * 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lambda_that_is_not_finite(value):
    layer, whole = small_dmel(), DifferentiableSpectrogram(hop_length=20, init_lambd=5.0)
    with torch.no_grad():
        layer.lambd.fill_(value)
        whole.lambd.fill_(math.nan)
    with pytest.raises(ValueError, match="no window length"):
        layer(clips(2, 300))
    assert whole(clips(2, 300)).isnan().any()


@pytest.mark.parametrize("clips_need_it", [False, True])
def test_second_derivatives_in_lambda_are_refused(clips_need_it):
    layer, x = small_dmel(), clips(2, 300).requires_grad_(clips_need_it)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.lambd)
    # A sum's upstream gradient is constant, a square's is not: both must be refused.
    for reduce in (torch.sum, lambda features: features.square().sum()):
        (gradient,) = torch.autograd.grad(reduce(layer(x)), layer.lambd, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative in lambd"):
            torch.autograd.grad(gradient, layer.lambd)
    torch.testing.assert_close(gradient, plain)  # create_graph itself is allowed and right


@pytest.mark.parametrize("adaptive", [True, False])
def test_second_derivatives_with_the_clips_are_right(adaptive):
    layer = small_dmel(3.3, n_mels=3, hop_length=9, optimized=adaptive)
    x, lambd = clips(2, 31).requires_grad_(), torch.tensor(3.3, dtype=torch.float64, requires_grad=True)

    def features(x, lambd):
        return torch.func.functional_call(layer, {"lambd": lambd}, (x,))

    assert torch.autograd.gradgradcheck(lambda x: features(x, lambd), (x,), fast_mode=True)

    def mixed(lambd):
        (gradient,) = torch.autograd.grad(features(x, lambd).square().sum(), x, create_graph=True)
        return gradient

    assert torch.autograd.gradcheck(mixed, (lambd,), fast_mode=True)  # d²/dx dλ, in λ once
    (gradient,) = torch.autograd.grad(features(x, lambd).square().sum(), lambd, create_graph=True)
    (other_way,) = torch.autograd.grad(gradient, x)
    upstream = torch.autograd.grad(mixed(lambd), lambd, torch.ones_like(x))[0]
    torch.testing.assert_close(other_way.sum(), upstream)


def test_autocast_computes_in_float32():
    layer, x = DMEL(1000, n_mels=6, hop_length=20, init_lambd=7.3), clips(2, 300, dtype=torch.float32).requires_grad_()
    expected = layer(x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), (layer.lambd, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_mel = layer(x)
        gradients = torch.autograd.grad(log_mel.square().sum(), (layer.lambd, x))
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert log_mel.dtype == torch.float32
    torch.testing.assert_close(log_mel, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_gradients_only_for_what_needs_them():
    x = clips(2, 300)
    fixed = small_dmel()
    fixed.lambd.requires_grad_(False)
    assert not fixed(x).requires_grad
    (gradient,) = torch.autograd.grad(fixed(x.requires_grad_()).sum(), x)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not small_dmel()(x).requires_grad


def test_training_works_after_inference_mode():
    layer = small_dmel(n_mels=5)
    with torch.inference_mode():
        expected = layer(clips(2, 300))
    log_mel = layer(clips(2, 300).requires_grad_())
    log_mel.sum().backward()
    torch.testing.assert_close(log_mel.detach(), expected.clone())


def test_copies_and_state():
    layer = small_dmel()
    assert list(layer.state_dict()) == ["lambd"]
    torch.testing.assert_close(copy.deepcopy(layer)(clips(300)), layer(clips(300)))


def test_repr_tells_what_differs_from_the_defaults_and_the_window():
    layer = DMEL(8000, n_mels=64, hop_length=80, init_lambd=8000 * 0.035 / 6, mel_scale="slaney", f_max=3000.0)
    with torch.no_grad():
        layer.lambd.neg_().mul_(2)
    settings = "hop_length=80, sample_rate=8000, n_mels=64, f_max=3000.0, mel_scale='slaney'"
    assert repr(layer) == f"DMEL({settings}, lambd=-93.33 (70 ms))"
    whole = DifferentiableSpectrogram(hop_length=1, init_lambd=6.38, remove_mean=False)
    assert repr(whole) == "DifferentiableSpectrogram(hop_length=1, remove_mean=False, lambd=6.38)"


BANKS = [(8000, 64, 0.0, None), (16000, 40, 20.0, 7600.0), (22050, 128, 0.0, 11025.0), (48000, 80, 50.0, 14000.0)]


@pytest.mark.parametrize(("sample_rate", "n_mels", "f_min", "f_max"), BANKS)
@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize("mel_scale", ["htk", "slaney"])
@pytest.mark.parametrize("n_fft", [64, 512, 4096])
@pytest.mark.filterwarnings("ignore:Empty filters", "ignore:At least one mel filterbank")
def test_filters_are_those_of_torchaudio_and_librosa(sample_rate, n_mels, f_min, f_max, norm, mel_scale, n_fft):
    bank = mel_filter_bank(n_fft, n_mels, sample_rate, f_min, f_max, norm, mel_scale)
    top, is_htk = f_max or sample_rate / 2, mel_scale == "htk"
    of_librosa = librosa.filters.mel(
        sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=top, htk=is_htk, norm=norm, dtype=np.float64
    )
    try:
        torch.set_default_dtype(torch.float64)  # in float32 torchaudio's own rounding is 1e-5
        of_torchaudio = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, f_min, top, n_mels, sample_rate, norm, mel_scale
        )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(bank, torch.from_numpy(of_librosa).T, rtol=0, atol=1e-6 * bank.max().item())
    torch.testing.assert_close(bank, of_torchaudio, rtol=0, atol=1e-6 * bank.max().item())


@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize("mel_scale", ["htk", "slaney"])
@pytest.mark.parametrize("continuous", [False, True])
def test_filters_of_the_layer(norm, mel_scale, continuous):
    layer = small_dmel(7.3, log=False, norm=norm, mel_scale=mel_scale, continuous=continuous)
    power = DifferentiableSpectrogram(hop_length=20, init_lambd=7.3, optimized=True)(clips(2, 300))
    bank = mel_filter_bank(64, 6, 1000, 0.0, None, norm, mel_scale)
    if continuous:  # the sums of filters at 512, as they are in a fine grid
        fine = mel_filter_bank(2**15, 6, 1000, 0.0, None, norm, mel_scale).sum(dim=0) * 512 / 2**15
        bank = bank * fine / bank.sum(dim=0)
    torch.testing.assert_close(layer(clips(2, 300)), bank.T @ power)


def test_mean_may_stay():
    """Clips of two lengths in one batch: subtract the mean, pad with zeros, and leave the layer's own out."""
    layer, as_it_is = small_dmel(), small_dmel(remove_mean=False)
    long, short = clips(300) + 0.7, clips(200, seed=1) - 0.4
    batch = torch.stack([long - long.mean(), torch.nn.functional.pad(short - short.mean(), (0, 100))])
    log_mel = as_it_is(batch)
    torch.testing.assert_close(log_mel[0], layer(long))
    torch.testing.assert_close(log_mel[1, :, :8], layer(short)[:, :8])  # frames that do not reach beyond its end
    padded = torch.nn.functional.pad(short, (0, 100))
    assert (layer(padded)[:, :8] - layer(short)[:, :8]).abs().max() > 0.1
    assert (as_it_is(padded)[:, :8] - layer(short)[:, :8]).abs().max() > 0.1


@pytest.mark.parametrize("init_lambd", [0.035, -0.035, 0.0])
def test_lambda_below_a_sample_is_warned_of(init_lambd):
    for layer_class, arguments in ((DMEL, {"sample_rate": 8000, "n_mels": 4}), (DifferentiableSpectrogram, {})):
        with pytest.warns(UserWarning, match="is below 1: λ is in samples") as warned:
            layer_class(hop_length=20, init_lambd=init_lambd, **arguments)
        assert [entry.filename for entry in warned] == [__file__]


def test_no_warning_from_one_sample_on(recwarn):
    small_dmel(1.0)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_mels": 0}, "n_mels=0"),
        ({"hop_length": 0}, "hop_length=0"),
        ({"init_lambd": math.nan}, "init_lambd=nan"),
        ({"f_min": 600.0}, "f_min=600.0 < f_max=500"),
        ({"f_min": -1.0}, "f_min=-1.0"),
        ({"f_max": 500.1}, r"f_max=500.1 <= sample_rate / 2 = 500 Hz"),
        ({"norm": "area"}, "norm='area'"),
        ({"mel_scale": "HTK"}, "mel_scale='HTK'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_dmel(**{"lambd": arguments.pop("init_lambd", 7.3), **arguments})


def test_only_the_sample_rate_may_come_without_its_name():
    with pytest.raises(TypeError, match="positional"):
        DMEL(8000, 80, 64, init_lambd=46.7)
    with pytest.raises(TypeError, match="positional"):
        DifferentiableSpectrogram(80, init_lambd=46.7)


@pytest.mark.parametrize("x", [torch.zeros(3, 0), torch.zeros(()), torch.zeros(3, 5, dtype=torch.int16)])
def test_wrong_clips(x):
    with pytest.raises(ValueError, match="clips must be floating point"):
        small_dmel()(x)


def test_file_stands_on_its_own(tmp_path):
    shutil.copy(ROOT / "dmel.py", tmp_path)
    code = (
        "import sys, torch, dmel; layer = dmel.DMEL(8000, n_mels=8, hop_length=80, init_lambd=40.0);"
        "layer(torch.randn(2, 800)).sum().backward();"
        "assert not {'torchaudio', 'ray', 'librosa', 'pandas', 'datasets', 'models'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
