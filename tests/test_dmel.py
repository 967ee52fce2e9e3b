"""The layer: golden vectors, derivatives, an independent implementation, invariants, limits."""

import itertools
import math

import librosa
import numpy as np
import pytest
import torch
from conftest import golden
from torch import nn

import dmel
from dmel import (
    DMEL,
    LOG_FLOOR,
    DifferentiableSpectrogram,
    fft_size,
    gaussian_window,
    mel_filter_bank,
)

LAYERS = ["layer_esc50_10ms", "layer_esc50_35ms", "layer_esc50_300ms"]
LAYERS += ["layer_16k_40mels", "layer_negative_lambda", "layer_normalized"]
SPECTROGRAMS = ["spectrogram_128_short", "spectrogram_128_ref", "spectrogram_128_long"]


def clips(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def small_dmel(lambd=7.3, **arguments):
    defaults = {"sample_rate": 1000, "n_mels": 6, "hop_length": 20, "init_lambd": lambd}
    return DMEL(**(defaults | arguments)).double()


def gradients_of(features, sources):
    """Gradients in the sources of the features' sum, weighted by fixed random numbers."""
    upstream = clips(*features.shape, seed=1, dtype=features.dtype)
    return torch.autograd.grad((features * upstream).sum(), sources)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_golden_log_mel(name, dtype):
    tensors, meta = golden(name)
    keys = ("sample_rate", "n_mels", "hop_length", "f_min", "f_max", "normalize_window")
    layer = DMEL(init_lambd=meta["lambd"], **{key: meta[key] for key in keys})
    assert layer.n_fft == meta["n_fft"]

    # The logarithm checks the small bands too. In float64 the original's rounding shows in them.
    mel = tensors["mel"].squeeze(1).to(dtype)
    expected = (mel + LOG_FLOOR).log()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-5
    x = tensors["x"].to(dtype)
    log_mel = layer(x)
    assert log_mel.dtype == dtype
    assert (log_mel.detach() - expected).abs().max() < tolerance * expected.abs().max()

    (log_mel * tensors["upstream"].squeeze(1)).sum().backward()
    assert layer.lambd.grad.item() == pytest.approx(tensors["dlambd_logmel"].item(), rel=1e-3)

    layer.log = False
    assert (layer(x).detach() - mel).abs().max() < 1e-5 * mel.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTROGRAMS)
def test_golden_spectrogram(name, dtype):
    tensors, meta = golden(name)
    layer = DifferentiableSpectrogram(
        init_lambd=meta["lambd"],
        hop_length=meta["hop_length"],
        normalize_window=meta["normalize_window"],
    )

    expected = tensors["power"].squeeze(1).to(dtype)
    power = layer(tensors["x"].to(dtype))
    assert power.dtype == dtype
    assert (power.detach() - expected).abs().max() < 1e-5 * expected.abs().max()

    (power * tensors["upstream"].squeeze(1)).sum().backward()
    assert layer.lambd.grad.item() == pytest.approx(tensors["dlambd"].item(), rel=1e-3)


def plain_power(x, lambd, hop_length, adaptive, normalize_window):
    """The power spectrogram by torch.stft and autograd, one clip at a time.

    Shape = (batch, bins, frames).
    """
    time = x.shape[-1]
    if adaptive:
        support = min(int(6 * abs(lambd.item())), 2 * time)
        n_fft = 2 ** math.ceil(math.log2(support))
        length = n_fft
    else:
        n_fft = 2 * time
        length = time

    n = torch.arange(length, dtype=x.dtype)
    window = torch.exp(-0.5 * ((n - length / 2) / lambd) ** 2)
    if normalize_window:
        window = window / window.square().sum().sqrt()

    spectra = []
    for clip in x:
        spectrum = torch.stft(
            clip - clip.mean(),
            n_fft,
            hop_length,
            length,
            window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        spectra.append(spectrum)
    return torch.stack(spectra).abs().square()


# Time, hop, λ, normalize_window: odd lengths, one frame, a window longer than the clip.
CASES = [
    (300, 20, 7.3, False),
    (301, 7, 7.3, True),
    (129, 1, -3.1, False),
    (50, 64, 2.2, True),
    (40, 10, 30.0, False),
]


@pytest.mark.parametrize(("time", "hop_length", "lambd", "normalize_window"), CASES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_equals_plain_stft_and_autograd(time, hop_length, lambd, normalize_window, adaptive):
    x = clips(3, time).requires_grad_()
    arguments = {"normalize_window": normalize_window, "optimized": adaptive}
    layers = {
        "power": DifferentiableSpectrogram(
            hop_length=hop_length, init_lambd=lambd, **arguments
        ).double(),
        "mel": small_dmel(lambd, hop_length=hop_length, log=False, **arguments),
        "log-mel": small_dmel(lambd, hop_length=hop_length, **arguments),
    }
    for kind, layer in layers.items():
        # λ as float32 holds it.
        reference_lambd = layer.lambd.detach().clone().requires_grad_()
        reference_x = x.detach().clone().requires_grad_()
        expected = plain_power(reference_x, reference_lambd, hop_length, adaptive, normalize_window)
        if kind != "power":
            n_fft = 2 * (expected.shape[-2] - 1)
            bank = librosa.filters.mel(
                sr=1000, n_fft=n_fft, n_mels=6, htk=True, norm=None, dtype=np.float64
            )
            expected = torch.from_numpy(bank) @ expected
        if kind == "log-mel":
            expected = (expected + LOG_FLOOR).log()

        actual = layer(x)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

        expected_gradients = gradients_of(expected, (reference_x, reference_lambd))
        in_x, in_lambd = gradients_of(actual, (x, layer.lambd))
        torch.testing.assert_close((in_x, in_lambd), expected_gradients, rtol=1e-7, atol=1e-7)

        # Another way computes it where the clips need no gradient.
        (in_lambd,) = gradients_of(layer(x.detach()), (layer.lambd,))
        torch.testing.assert_close(in_lambd, expected_gradients[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layer_class", [DifferentiableSpectrogram, DMEL])
def test_gradcheck(layer_class):
    arguments = {"hop_length": 9, "init_lambd": 3.3, "normalize_window": True}
    if layer_class is DMEL:
        arguments |= {"sample_rate": 1000, "n_mels": 3}
    layer = layer_class(**arguments).double()

    def features(x, lambd):
        return torch.func.functional_call(layer, {"lambd": lambd}, (x,))

    x = clips(2, 41).requires_grad_()
    lambd = torch.tensor(3.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features, (x, lambd), fast_mode=True)


def test_batch_equals_clip_by_clip_for_any_leading_dimensions():
    layer = small_dmel()
    batch = clips(2, 3, 333)
    expected = torch.stack([layer(clip) for clip in batch.flatten(0, 1)])
    torch.testing.assert_close(layer(batch), expected.reshape(2, 3, 6, 333 // 20 + 1))
    assert layer(batch[:0]).shape == (0, 3, 6, 17)


@pytest.mark.parametrize("block", [64, 1000, 5000])
def test_blocks_do_not_change_features_or_gradients(block, monkeypatch):
    def in_lambd():
        layer = small_dmel()
        log_mel = layer(clips(3, 400))
        return log_mel, *gradients_of(log_mel, (layer.lambd,))

    def in_lambd_and_clips():
        layer = small_dmel()
        x = clips(3, 400).requires_grad_()
        log_mel = layer(x)
        return log_mel, *gradients_of(log_mel, (layer.lambd, x))

    expected = in_lambd(), in_lambd_and_clips()
    monkeypatch.setattr(dmel, "CPU_BLOCK", block)
    torch.testing.assert_close((in_lambd(), in_lambd_and_clips()), expected)


def test_fft_size_doubles_where_the_original_doubles_it():
    # N by λ.
    sizes = {
        0.0: 2,
        0.2: 2,
        1.0: 8,
        10.82: 64,
        10.84: 128,
        21.49: 128,
        21.51: 256,
        42.82: 256,
        -42.84: 512,
    }
    for lambd, n_fft in sizes.items():
        assert fft_size(torch.tensor(lambd)) == n_fft, lambd


@pytest.mark.parametrize(("seconds", "n_fft"), [(0.010, 128), (0.035, 512), (0.300, 4096)])
def test_fft_size_of_the_windows_of_the_paper(seconds, n_fft):
    layer = DMEL(8000, n_mels=64, hop_length=80, init_lambd=8000 * seconds / 6)
    assert layer.n_fft == n_fft
    assert layer.window_length == pytest.approx(seconds)


@pytest.mark.parametrize(("lambd", "n_fft"), [(40.0, 256), (1e9, 2048), (1e38, 2048)])
def test_fft_size_is_bounded_by_the_clip(lambd, n_fft):
    assert fft_size(lambd, n_samples=1000) == n_fft


@pytest.mark.parametrize(("continuous", "low", "high"), [(False, 0.67, 0.72), (True, 0.0, 0.05)])
def test_continuous_takes_away_the_jump_where_the_fft_size_doubles(continuous, low, high):
    arguments = {"n_mels": 64, "hop_length": 80, "continuous": continuous}
    doubling = 257 / 6
    noise = torch.randn(16, 40000)
    before = DMEL(8000, init_lambd=doubling - 1e-3, **arguments)(noise)
    after = DMEL(8000, init_lambd=doubling + 1e-3, **arguments)(noise)
    assert low <= abs((after - before).mean().item()) < high


def test_zero_floor_adds_a_constant_and_silence_is_0():
    layer = small_dmel()
    from_zero = small_dmel(zero_floor=True)
    x = clips(2, 800)
    x[0, 400:] = 0
    torch.testing.assert_close(from_zero(x), layer(x) - math.log(1e-10))
    assert from_zero(torch.zeros(1, 800)).eq(0).all()
    assert gradients_of(from_zero(x), from_zero.lambd) == gradients_of(layer(x), layer.lambd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize_window", [False, True])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.filterwarnings("ignore:init_lambd")
def test_finite_for_every_finite_lambda(dtype, normalize_window, adaptive):
    arguments = {"hop_length": 20, "optimized": adaptive, "normalize_window": normalize_window}
    for lambd in (0.0, 1e-40, 1e-30, 1e-3, 0.2, 0.5, 1e4, 1e9, -1e-3, -3e38):
        power = DifferentiableSpectrogram(init_lambd=lambd, **arguments)
        log_mel = DMEL(1000, n_mels=6, init_lambd=lambd, **arguments)
        for time, layer in itertools.product((100, 101), (power, log_mel)):
            features = layer(clips(2, time, dtype=dtype))
            features.sum().backward()
            assert features.isfinite().all() and layer.lambd.grad.isfinite(), lambd


def test_window_at_zero_is_an_impulse_without_derivative():
    window, derivative = gaussian_window(torch.tensor(0.0), 8)
    assert window.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert derivative.tolist() == [0] * 8


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_lambda_that_is_not_finite(value):
    layer = small_dmel()
    nn.init.constant_(layer.lambd, value)
    with pytest.raises(ValueError, match=f"lambd is {abs(value)}, so there is no window length"):
        layer(clips(2, 300))


def test_lambda_that_is_not_a_number_shows_where_n_does_not_depend_on_it():
    layer = DifferentiableSpectrogram(hop_length=20, init_lambd=5.0)
    nn.init.constant_(layer.lambd, math.nan)
    assert layer(clips(2, 300)).isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_clip_that_is_not_finite_is_named_as_a_cause(value):
    layer = small_dmel()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = clips(2, 300)
    x[1, 7] = value
    layer(x).sum().backward()
    optimizer.step()
    causes = "look for clips that hold NaN or inf and for a loss or gradients that became so"
    with pytest.raises(ValueError, match=causes):
        layer(clips(2, 300))


@pytest.mark.parametrize("clips_need_it", [False, True])
def test_second_derivatives_in_lambda_are_refused(clips_need_it):
    def sum_of_squares(features):
        return features.square().sum()

    layer = small_dmel()
    x = clips(2, 300).requires_grad_(clips_need_it)
    # A sum's upstream gradient is constant, a square's is not: both must be refused.
    for loss in (torch.sum, sum_of_squares):
        (expected,) = torch.autograd.grad(loss(layer(x)), layer.lambd)
        (gradient,) = torch.autograd.grad(loss(layer(x)), layer.lambd, create_graph=True)
        # create_graph itself is allowed.
        torch.testing.assert_close(gradient, expected)
        with pytest.raises(RuntimeError, match="no second derivative in lambd"):
            torch.autograd.grad(gradient, layer.lambd)


@pytest.mark.parametrize("adaptive", [True, False])
def test_second_derivatives_with_the_clips_are_right(adaptive):
    layer = small_dmel(3.3, n_mels=3, hop_length=9, optimized=adaptive)
    x = clips(2, 31).requires_grad_()
    lambd = torch.tensor(3.3, dtype=torch.float64, requires_grad=True)

    def features(x, lambd):
        return torch.func.functional_call(layer, {"lambd": lambd}, (x,))

    assert torch.autograd.gradgradcheck(lambda x: features(x, lambd), (x,), fast_mode=True)

    def mixed(lambd):
        (gradient,) = torch.autograd.grad(features(x, lambd).square().sum(), x, create_graph=True)
        return gradient

    # d²/dx dλ, in λ once; then in the other order.
    assert torch.autograd.gradcheck(mixed, (lambd,), fast_mode=True)
    (gradient,) = torch.autograd.grad(features(x, lambd).square().sum(), lambd, create_graph=True)
    (other_way,) = torch.autograd.grad(gradient, x)
    (expected,) = torch.autograd.grad(mixed(lambd), lambd, torch.ones_like(x))
    torch.testing.assert_close(other_way.sum(), expected)


def test_autocast_computes_in_float32():
    layer = DMEL(1000, n_mels=6, hop_length=20, init_lambd=7.3, normalize_window=True)
    x = clips(2, 300, dtype=torch.float32).requires_grad_()
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
    with torch.no_grad():
        assert not small_dmel()(x).requires_grad

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(fixed(x).sum(), x)
    (expected,) = torch.autograd.grad(small_dmel()(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().sum() > 0


def test_training_works_after_inference_mode():
    dmel.mel_filters.cache_clear()
    layer = small_dmel()
    with torch.inference_mode():
        expected = layer(clips(2, 300))
    log_mel = layer(clips(2, 300).requires_grad_())
    log_mel.sum().backward()
    torch.testing.assert_close(log_mel.detach(), expected.clone())


def test_repr_tells_what_differs_from_the_defaults_and_the_window():
    lambd = -2 * 8000 * 0.035 / 6
    options = {"mel_scale": "slaney", "f_max": 3000.0}
    layer = DMEL(8000, n_mels=64, hop_length=80, init_lambd=lambd, **options)
    settings = "hop_length=80, sample_rate=8000, n_mels=64, f_max=3000.0, mel_scale='slaney'"
    assert repr(layer) == f"DMEL({settings}, lambd=-93.33 (70 ms))"
    whole = DifferentiableSpectrogram(hop_length=1, init_lambd=6.38, remove_mean=False)
    assert repr(whole) == "DifferentiableSpectrogram(hop_length=1, remove_mean=False, lambd=6.38)"


@pytest.mark.parametrize(
    ("sample_rate", "n_mels", "f_min", "f_max"), [(8000, 64, 0.0, None), (22050, 40, 20.0, 7600.0)]
)
@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize("mel_scale", ["htk", "slaney"])
@pytest.mark.filterwarnings("ignore:Empty filters")
def test_filters_are_those_of_librosa(sample_rate, n_mels, f_min, f_max, norm, mel_scale):
    for n_fft in (64, 512, 4096):
        bank = mel_filter_bank(n_fft, n_mels, sample_rate, f_min, f_max, norm, mel_scale)
        expected = librosa.filters.mel(
            sr=sample_rate,
            n_fft=n_fft,
            n_mels=n_mels,
            fmin=f_min,
            fmax=f_max,
            htk=mel_scale == "htk",
            norm=norm,
            dtype=np.float64,
        )
        tolerance = 1e-6 * bank.max().item()
        torch.testing.assert_close(bank, torch.from_numpy(expected).T, rtol=0, atol=tolerance)


def test_continuous_gives_filters_the_sums_they_have_at_512():
    layer = small_dmel(7.3, log=False, norm="slaney", continuous=True)
    power = DifferentiableSpectrogram(hop_length=20, init_lambd=7.3, optimized=True)(clips(2, 300))
    bank = mel_filter_bank(64, 6, 1000, 0.0, None, "slaney", "htk")
    fine = mel_filter_bank(2**15, 6, 1000, 0.0, None, "slaney", "htk")
    bank = bank * fine.sum(dim=0) * 512 / 2**15 / bank.sum(dim=0)
    torch.testing.assert_close(layer(clips(2, 300)), bank.T @ power)


def test_lambda_below_a_sample_is_warned_of(recwarn):
    small_dmel(1.0)
    assert not recwarn.list
    DMEL(8000, n_mels=4, hop_length=20, init_lambd=-0.035)
    DifferentiableSpectrogram(hop_length=20, init_lambd=0.0)
    assert len(recwarn) == 2
    for entry in recwarn:
        assert "is below 1: λ is in samples" in str(entry.message)
        assert entry.filename == __file__


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("n_mels", 0, "n_mels=0 must be a whole number, 1 or more"),
        ("n_mels", 6.5, "n_mels=6.5 must be a whole number, 1 or more"),
        ("hop_length", 0, "hop_length=0 must be a whole number, 1 or more"),
        ("hop_length", math.nan, "hop_length=nan must be a whole number, 1 or more"),
        ("hop_length", math.inf, "hop_length=inf must be a whole number, 1 or more"),
        ("hop_length", 80.5, "hop_length=80.5 must be a whole number, 1 or more"),
        ("init_lambd", math.nan, "init_lambd=nan"),
        ("f_min", 600.0, "f_min=600.0 < f_max=500"),
        ("f_max", 500.1, "f_max=500.1 <= sample_rate / 2 = 500 Hz"),
        ("norm", "area", "norm='area'"),
        ("mel_scale", "HTK", "mel_scale='HTK'"),
    ],
)
def test_wrong_arguments(key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_dmel(**{key: value})


def test_zero_floor_without_a_logarithm_is_refused():
    with pytest.raises(ValueError, match=r"zero_floor=True .* needs log=True"):
        small_dmel(zero_floor=True, log=False)


def test_whole_numbers_may_come_as_floats():
    layer = small_dmel(hop_length=20.0, n_mels=6.0)
    assert repr(layer) == repr(small_dmel(hop_length=20, n_mels=6))
    torch.testing.assert_close(layer(clips(2, 300)), small_dmel()(clips(2, 300)), rtol=0, atol=0)


@pytest.mark.parametrize("adaptive", [True, False])
def test_hop_length_of_a_spectrogram_is_a_whole_number(adaptive):
    arguments = {"init_lambd": 7.3, "optimized": adaptive}
    layer = DifferentiableSpectrogram(hop_length=20.0, **arguments)
    assert isinstance(layer.hop_length, int)
    expected = DifferentiableSpectrogram(hop_length=20, **arguments)
    torch.testing.assert_close(layer(clips(2, 300)), expected(clips(2, 300)), rtol=0, atol=0)
    for value in (80.5, 0.0, -20, math.nan):
        with pytest.raises(ValueError, match=f"^hop_length={value} must be a whole number, 1 or"):
            DifferentiableSpectrogram(hop_length=value, **arguments)


def test_only_the_sample_rate_may_come_without_its_name():
    with pytest.raises(TypeError, match="positional"):
        DMEL(8000, 80, 64, init_lambd=46.7)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 0), torch.zeros(()), torch.zeros(3, 5, dtype=torch.int16)]
)
def test_wrong_clips(x):
    with pytest.raises(ValueError, match="clips must be floating point"):
        small_dmel()(x)
