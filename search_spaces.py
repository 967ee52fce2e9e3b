"""The experiments: every function of this file is one, a Ray Tune search space for a number of epochs.

    python main.py --name=time_frequency --max_epochs=1000

Edit a value, or add a function of your own and run it by its name. tune.grid_search([...]) tries every value, together
with every value of every other grid; tune.uniform, tune.choice and the like draw one per trial. --num_samples repeats
all of it.
"""

from ray import tune

from datasets import DATASETS, SAMPLE_RATE
from dmel import WINDOW_SIGMAS

WINDOW_SECONDS = (0.010, 0.035, 0.300)
SIGMA_REF = 6.38  # samples, about sqrt(128 / π): a pulse is as wide in time as in frequency
COMMON = {
    "normalize_window": False,
    "lr_tf": 1.0,
    "trainable": tune.grid_search([True, False]),
    "patience": 100,
    "device": "cuda:0",
}
RECORDINGS = {
    **COMMON,
    "n_mels": 64,
    "hop_length": SAMPLE_RATE // 100,  # 10 ms
    "energy_normalize": True,
    "optimized": True,
    "augment": False,
    "pretrained": False,
    "optimizer_name": "adam",
    "lr_model": 1e-4,
    "resample_rate": SAMPLE_RATE,
    "init_lambd": tune.grid_search([SAMPLE_RATE * seconds / WINDOW_SIGMAS for seconds in WINDOW_SECONDS]),
}


def audio_mnist(max_epochs):
    return {
        **RECORDINGS,
        "dataset_name": "audio_mnist",
        "model_name": "mel_linear_net",
        "batch_size": 64,
        "n_points": SAMPLE_RATE * DATASETS["audio_mnist"].clip_seconds,
        "max_epochs": max_epochs,
    }


def audio_mnist_continuous(max_epochs):
    """Beyond the paper: does it help that the mel spectrogram does not jump?"""
    return {**audio_mnist(max_epochs), "trainable": True, "continuous": True}


def audio_mnist_continuous_fixed(max_epochs):
    """Its baseline: how much comes from another scale of the mel spectrogram alone?"""
    return {**audio_mnist_continuous(max_epochs), "trainable": False}


def esc50(max_epochs):
    return {
        **RECORDINGS,
        "dataset_name": "esc50",
        "model_name": "panns_cnn6",
        "batch_size": 32,
        "n_points": SAMPLE_RATE * DATASETS["esc50"].clip_seconds,
        "max_epochs": max_epochs,
    }


def time_frequency(max_epochs):
    return {
        **COMMON,
        "dataset_name": "time_frequency",
        "model_name": "linear_net",
        "hop_length": 1,
        "optimized": False,
        "optimizer_name": "sgd",
        "lr_model": 1e-3,
        "batch_size": 128,
        "init_lambd": tune.grid_search([SIGMA_REF * factor for factor in (0.2, 1.0, 5.0)]),
        "n_points": 128,
        "n_samples": 5000,
        "noise_std": 0.5,
        "sigma_ref": SIGMA_REF,
        "center_offset": False,
        "max_epochs": max_epochs,
    }
