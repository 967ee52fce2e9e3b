"""The cost model behind the paper's complexity figure: one DMEL run against a search over fixed windows."""

import numpy as np

SAMPLE_RATE = 8000  # Hz
N_POINTS = 5 * SAMPLE_RATE  # samples of a clip
N_MELS = 128
HOP = 0.010 * SAMPLE_RATE  # samples
BEST_SECONDS = 0.035  # the window that DMEL walks to
STEP_SECONDS = 0.001  # that λ moves in a step of training


def cost_ratio(init_seconds, n_windows, c1):
    """Cost of a DMEL run from a window of init_seconds, divided by that of training n_windows fixed ones.

    c1 weighs the spectrogram, 1 - c1 the network behind it. The fixed windows lie evenly from two hops to 0.3 s.
    """
    n_steps = int(abs(init_seconds - BEST_SECONDS) / STEP_SECONDS)
    walked = np.linspace(init_seconds, BEST_SECONDS, n_steps) * SAMPLE_RATE
    fixed = np.linspace(2 * HOP, 0.3 * SAMPLE_RATE, n_windows)
    c2 = 1 - c1
    baseline = n_steps * (c1 * (N_POINTS * np.log(fixed)).sum() + c2 * (2 * N_MELS * N_POINTS / fixed).sum())
    dmel = c1 * N_POINTS / HOP * (walked * np.log(walked)).sum() + n_steps * c2 * N_MELS * N_POINTS / HOP
    return dmel / baseline
