"""Classifies recordings by a trained network of an experiment.

    python classify.py --experiment=audio_mnist clip.wav another.flac

Prints the likeliest classes of each file, by the network with the highest validation accuracy among
those with a trained window. Files are of any sample rate and format that libsndfile reads; they are
resampled, and cut or padded with zeros, as the recordings were that the network was trained on.

Exit code: 1 where a file could not be used, which was said, and the others were classified.
"""

import argparse
import os
import sys

import datasets
from config import InputError, run
from recordings import read_recording
from results import Experiment
from trained import BEST, network_in, read_trained


def main():
    parser = argparse.ArgumentParser(
        description="Classify recordings by a trained network of an experiment."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="recordings")
    parser.add_argument("--experiment", required=True, help="the experiment: --name of main.py")
    parser.add_argument(
        "--results", default="ray_results", help="folder or URI of results (ray_results)"
    )
    parser.add_argument(
        "--trial", default=BEST, help="a trial's key (best: by its validation accuracy)"
    )
    parser.add_argument("--top", type=int, default=5, help="classes of each file to print (5)")
    parser.add_argument(
        "--data_base_dir",
        default="data",
        help="folder of audio_mnist/ and esc50/, which names the classes (data)",
    )
    args = parser.parse_args()
    if args.top < 1:
        raise InputError(f"--top={args.top} must be 1 or more.")

    experiment = Experiment(args.results, args.experiment)
    state = read_trained(experiment, args.trial)
    config = state["config"]
    if config.dataset_name == "time_frequency":
        raise InputError(
            f"{args.experiment} is trained on pulses that are drawn, and classifies no recordings: "
            "name an experiment on recordings."
        )
    datasets.check(config)
    net = network_in(experiment, state)
    classes = state.get("classes") or datasets.class_names(config, args.data_base_dir)

    milliseconds = window_length(net, config)
    print(f"{args.experiment}, trial {config.key}: window of {milliseconds:.1f} ms")
    n_refused = 0
    for path in args.files:
        try:
            clip = read_clip(path, config)
        except ValueError as reason:
            print(f"classify.py: {path}: {reason}: left out", file=sys.stderr)
            n_refused += 1
            continue
        print(path)
        for name, probability in likeliest(net, config, clip, classes)[: args.top]:
            print(f"  {probability:.4f}  {name}")
    if n_refused:
        sys.exit(1)


def window_length(net, config):
    """Length of a network's window, 6λ, in ms."""
    from dmel import WINDOW_SIGMAS  # here and below, as for --help: torch takes seconds

    lambd = abs(net.spectrogram_layer.lambd.item())
    return 1000 * WINDOW_SIGMAS * lambd / config.resample_rate


def read_clip(path, config):
    """A recording as the config's network takes it, shape = (n_points,) float32.

    Raises ValueError, with the reason, where it cannot be used.
    """
    if not os.path.exists(path):
        raise ValueError("there is no such file")
    samples, _ = read_recording(path, config.resample_rate)
    clip = datasets.DATASETS[config.dataset_name].fit(samples, config.n_points)
    if clip.min() == clip.max():
        raise ValueError("it is silent")
    return clip


def likeliest(net, config, clip, classes):
    """(name, probability) of each class, the likeliest first."""
    import torch

    import models

    with torch.no_grad():
        logits, _ = net(torch.from_numpy(clip)[None])
    probabilities = models.probabilities(config, logits)[0].tolist()
    pairs = zip(classes, probabilities, strict=True)
    return sorted(pairs, key=lambda pair: pair[1], reverse=True)


if __name__ == "__main__":
    run(main)
