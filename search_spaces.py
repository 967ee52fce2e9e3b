"""The experiments: every function of this file is one, a Ray Tune search space for a number of
epochs.

Edit a value, or add a function of your own and run it by its name; config.py says what every key
means. Every value of a tune.grid_search is tried with every one of the others; tune.uniform,
tune.choice and the like draw one value per run and cell of the grid, which DMEL and baseline share.
"""

from ray import tune

SAMPLE_RATE = 8000  # Hz
WINDOW_SIGMAS = 6  # a window of l seconds has λ = SAMPLE_RATE · l / 6 samples
SIGMA_REF = 6.38  # samples, about sqrt(128 / π): a pulse is as wide in time as in frequency


def audio_mnist(max_epochs):
    return {
        "dataset_name": "audio_mnist",
        "resample_rate": SAMPLE_RATE,
        "n_points": 1 * SAMPLE_RATE,
        "model_name": "mel_linear_net",
        "n_mels": 64,
        "hop_length": SAMPLE_RATE // 100,  # 10 ms
        "energy_normalize": True,
        "optimized": True,
        "normalize_window": False,
        "augment": False,
        "pretrained": False,
        "init_lambd": tune.grid_search(
            [SAMPLE_RATE * seconds / WINDOW_SIGMAS for seconds in (0.010, 0.035, 0.300)]
        ),
        "trainable": tune.grid_search([True, False]),
        "optimizer_name": "adam",
        "lr_model": 1e-4,
        "lr_tf": 1.0,
        "batch_size": 64,
        "max_epochs": max_epochs,
        "patience": 100,
        "device": "cuda:0",
    }


def esc50(max_epochs):
    return {
        "dataset_name": "esc50",
        "resample_rate": SAMPLE_RATE,
        "n_points": 5 * SAMPLE_RATE,
        "model_name": "panns_cnn6",
        "n_mels": 64,
        "hop_length": SAMPLE_RATE // 100,  # 10 ms
        "energy_normalize": True,
        "optimized": True,
        "normalize_window": False,
        "augment": False,
        "pretrained": False,
        "init_lambd": tune.grid_search(
            [SAMPLE_RATE * seconds / WINDOW_SIGMAS for seconds in (0.010, 0.035, 0.300)]
        ),
        "trainable": tune.grid_search([True, False]),
        "optimizer_name": "adam",
        "lr_model": 1e-4,
        "lr_tf": 1.0,
        "batch_size": 32,
        "max_epochs": max_epochs,
        "patience": 100,
        "device": "cuda:0",
    }


def esc50_bfloat16(max_epochs):
    """esc50 for processors that compute quicker in bfloat16, see docs/performance.md."""
    return {**esc50(max_epochs), "bf16": True}


def time_frequency(max_epochs):
    return {
        "dataset_name": "time_frequency",
        "n_samples": 5000,
        "n_points": 128,
        "sigma_ref": SIGMA_REF,
        "noise_std": 0.5,
        "center_offset": False,
        "model_name": "linear_net",
        "hop_length": 1,
        "optimized": False,
        "normalize_window": False,
        "init_lambd": tune.grid_search([SIGMA_REF * factor for factor in (0.2, 1.0, 5.0)]),
        "trainable": tune.grid_search([True, False]),
        "optimizer_name": "sgd",
        "lr_model": 1e-3,
        "lr_tf": 1.0,
        "batch_size": 128,
        "max_epochs": max_epochs,
        "patience": 100,
        "device": "cuda:0",
    }


def audio_mnist_continuous(max_epochs):
    """Beyond the paper: does it help that the mel spectrogram does not jump where the FFT size
    doubles?
    """
    return {**audio_mnist(max_epochs), "continuous": True}


def audio_mnist_zero_floor(max_epochs):
    """Does λ settle where silence and padding are 0 to the network, and not -23?"""
    return {**audio_mnist(max_epochs), "zero_floor": True}


def audio_mnist_batch_norm(max_epochs):
    """Does it where the network's own batch norm takes the level away?"""
    return {**audio_mnist(max_epochs), "model_name": "mel_bn_linear_net"}


def audio_mnist_no_dropout(max_epochs):
    """Does it without dropout, which adds more noise to inputs that are further from 0?"""
    return {**audio_mnist(max_epochs), "model_name": "mel_plain_linear_net"}
