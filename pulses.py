"""time_frequency: Gaussian pulses, apart in time or in frequency, for which the best window is known."""

import numpy as np


def draw_pulses(config):
    """Draws n_samples noisy pulses of three classes: one pulse, two apart in time, two apart in frequency.

    The best window to tell them apart is sigma_ref, the width of a pulse. All is drawn from config's seed. Returns
    clips, shape = (n_samples, n_points) float32, and labels, shape = (n_samples,) int64. Times and widths are in
    samples, frequencies in cycles per sample. Source: the paper's synthetic experiment.
    """
    random = np.random.default_rng(config["seed"])
    n, n_points, sigma = config["n_samples"], config["n_points"], config["sigma_ref"]
    time_max, frequency_max = n_points / 5, 0.1
    time_min, frequency_min = sigma, sigma / (2 * n_points)
    scale_max = 2 * time_max / (6 * sigma) + 1

    labels = random.integers(3, size=n)
    time = np.full((n, 1), n_points / 2)
    frequency = np.full((n, 1), 0.25)
    if config["center_offset"]:
        time += random.uniform(-time_max, time_max, (n, 1))
        frequency += random.uniform(-frequency_max, frequency_max, (n, 1))

    # Two pulses for everyone, shape = (n, 2); class 0 leaves out the second.
    side = np.array([-1.0, 1.0])
    one, apart_in_time, apart_in_frequency = (labels[:, None] == label for label in range(3))
    time = time + apart_in_time * side * random.uniform(time_min, time_max, (n, 1))
    frequency = frequency + apart_in_frequency * side * random.uniform(frequency_min, frequency_max, (n, 1))
    wider, narrower = random.uniform(1, scale_max, (n, 1)), random.uniform(1 / scale_max, 1, (n, 1))
    width = sigma * np.where(one, np.where(random.random((n, 1)) < 0.5, wider, narrower), 1.0)
    present = np.concatenate([np.ones((n, 1)), 1.0 - one], axis=1)
    phase = random.uniform(0, 2 * np.pi, (n, 2))

    k = np.arange(n_points)
    envelope = np.exp(-0.5 * ((k - time[..., None]) / width[..., None]) ** 2)  # (n, 2, n_points)
    carrier = np.sin(2 * np.pi * frequency[..., None] * k + phase[..., None])
    pulses = envelope / envelope.max(-1, keepdims=True) * carrier / carrier.max(-1, keepdims=True)
    pulses -= pulses.mean(-1, keepdims=True)
    clips = random.uniform(0.5, 1, (n, 1)) * (present[..., None] * pulses).sum(axis=1)
    clips += config["noise_std"] * random.random((n, n_points))
    clips -= clips.mean(-1, keepdims=True)
    return clips.astype(np.float32), labels.astype(np.int64)
