"""Measures the layer, the epochs and the grid beside the usual way of doing the same.

Layer, memory and epoch, about a minute:

    python -m benchmarks

The layer as the work grows and as λ grows, and the level of the log-Mel:

    python -m benchmarks scaling jumps
    python -m benchmarks levels --data_dir=data

The layer beside dstft, which the requirements do not have; without it the section is left out:

    python -m pip install --no-deps dstft==3.0.0
    python -m benchmarks dstft

Training: epochs, the cost of a DMEL run over that of a search among 10 fixed windows with nothing
cached, and the operators of a training step, which are the same on every machine:

    python -m benchmarks epoch cost --experiments audio_mnist esc50 --data_dir=data
    python -m benchmarks operators

Recordings for training, and trials through Ray:

    python -m benchmarks prepare --clips 30000
    python -m benchmarks start copies grid

What interruptions cost (lost must be 0), and 30,000 synthetic recordings, in ten minutes each:

    python -m benchmarks faults --minutes 10
    python -m benchmarks voices DIR

On a GPU:

    python -m benchmarks layer step epoch grid --experiments audio_mnist esc50 --complete

To be run from the repository root, all in one run on one machine. Prints Markdown tables; --output
names a JSON file for the same, with versions and hardware. Times are medians after a warm-up, the
compared ones taken in turns; compare only numbers of one run. "Clip by clip" stands in for the
original software, see clip_by_clip.py. Epochs are training and validation, with λ held at its
initial value. All of them keep freed memory for later, as trials of main.py do (MEMORY).
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from benchmarks import faults, layer, preparing, training, trials, voices
from cluster import MEMORY
from config import InputError, whole_file
from results import provenance
from summary import markdown_table

PROGRAM = "python -m benchmarks"
MODULES = (layer, training, preparing, trials, faults)
DEFAULT_SECTIONS = ("layer", "memory", "epoch")

SECTIONS = {}
for module in MODULES:
    for function in module.SECTIONS:
        SECTIONS[function.__name__] = function


def text(value):
    """A cell of a table: numbers with three digits, or whole where they have more."""
    if not isinstance(value, float):
        return str(value)
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def section(name):
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(SECTIONS)}")
    return name


def run():
    if sys.argv[1:2] == ["voices"]:
        voices.main(sys.argv[2:])
    else:
        measure()


def measure():
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device=cuda: there is no CUDA device here.")

    command = ["-m", "benchmarks", *sys.argv[1:]]
    if not MEMORY.items() <= os.environ.items():
        # It holds from the start of a process: all ways are measured so.
        environment = os.environ | MEMORY | {"PYTHONWARNINGS": "ignore"}
        os.execve(sys.executable, [sys.executable, *command], environment)

    report = provenance()
    report["command"] = shlex.join(["python", *command])
    report["device"] = args.device
    report["threads"] = torch.get_num_threads()
    report["sections"] = {}

    for name in [*args.section, *args.sections] or DEFAULT_SECTIONS:
        title = " ".join(SECTIONS[name].__doc__.split())  # in one line
        rows = list(SECTIONS[name](args))
        if not rows:  # it said why
            continue
        cells = [[text(value) for value in row.values()] for row in rows]
        table = markdown_table(list(rows[0]), cells)
        print(f"{title}\n\n{table}\n", flush=True)

        report["sections"][name] = {"title": title, "rows": rows}
        if args.output:
            content = json.dumps(report, indent=2, ensure_ascii=False)
            with whole_file(args.output) as file:
                file.write(content.encode() + b"\n")


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Measure the layer, the epochs and the grid."
    )
    parser.add_argument(
        "section", nargs="*", type=section, help=f"layer memory epoch, or of {' '.join(SECTIONS)}"
    )
    parser.add_argument("--sections", nargs="+", type=section, default=[], help="the same")
    parser.add_argument(
        "--experiments", nargs="+", default=["time_frequency"], help="for epoch, cost and grid"
    )
    parser.add_argument(
        "--clips", type=int, default=3000, help="number of recordings for prepare (3000)"
    )
    parser.add_argument(
        "--data_dir", default="data", help="folder of audio_mnist/ and esc50/ (data)"
    )
    parser.add_argument(
        "--complete",
        action="store_true",
        help="repeat recordings up to the complete dataset's number",
    )
    parser.add_argument(
        "--epochs", type=int, default=300, help="epochs of a trial, to project a grid's time (300)"
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device)
    parser.add_argument("--minutes", type=float, default=10, help="for faults (10)")
    parser.add_argument("--seed", type=int, default=0, help="of faults (0)")
    parser.add_argument(
        "--tiny", action="store_true", help="to try it out: small sizes, numbers without meaning"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"{PROGRAM}: {error}")
