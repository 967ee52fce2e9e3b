"""Measures the layer, the epochs and the grid beside the usual way of doing the same, in one run on
one machine.

    python -m benchmarks                                                  # layer, memory, epoch: about a minute
    python -m benchmarks scaling jumps                                    # the layer as the work grows, and λ
    python -m benchmarks levels --data_dir=data                           # of the log-Mel as λ grows
    python -m benchmarks epoch --experiments audio_mnist esc50 --data_dir=data
    python -m benchmarks operators                                        # of a training step: the same everywhere
    python -m benchmarks prepare --clips 30000                            # recordings for training
    python -m benchmarks start copies grid                                # trials through Ray
    python -m benchmarks voices DIR                                       # 30,000 synthetic recordings, ten minutes
    python -m benchmarks faults --minutes 10                              # what interruptions cost: lost must be 0
    python -m benchmarks layer step epoch grid --experiments audio_mnist esc50 --complete     # on a GPU

To be run from the repository root. Prints Markdown tables; --output names a JSON file for the same,
with versions and hardware. Times are medians after a warm-up, the compared ones taken in turns;
compare only numbers of one run. "Clip by clip" stands in for the original software, see
clip_by_clip.py. Epochs are training and validation, with λ held at its initial value. All of them
keep freed memory for later, as trials of main.py do (MEMORY).
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
SECTIONS = {section.__name__: section for module in MODULES for section in module.SECTIONS}


def text(value):
    return (
        str(value)
        if not isinstance(value, float)
        else f"{value:.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


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
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Measure the layer, the epochs and the grid."
    )
    parser.add_argument(
        "section", nargs="*", type=section, help=f"layer memory epoch, or of {' '.join(SECTIONS)}"
    )
    parser.add_argument("--sections", nargs="+", type=section, default=[], help="the same")
    parser.add_argument(
        "--experiments", nargs="+", default=["time_frequency"], help="for epoch and grid"
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
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for faults (10)")
    parser.add_argument("--seed", type=int, default=0, help="of faults (0)")
    parser.add_argument(
        "--tiny", action="store_true", help="to try it out: small sizes, numbers without meaning"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device=cuda: there is no CUDA device here.")
    command = ["-m", "benchmarks", *sys.argv[1:]]
    if not MEMORY.items() <= os.environ.items():
        # It holds from the start of a process: all ways are measured so.
        os.execve(
            sys.executable,
            [sys.executable, *command],
            os.environ | MEMORY | {"PYTHONWARNINGS": "ignore"},
        )
    report = {**provenance(), "command": shlex.join(["python", *command]), "device": args.device}
    report |= {"threads": torch.get_num_threads(), "sections": {}}
    for name in [*args.section, *args.sections] or ["layer", "memory", "epoch"]:
        title = SECTIONS[name].__doc__
        rows = list(SECTIONS[name](args))
        cells = [[text(value) for value in row.values()] for row in rows]
        print(f"{title}\n\n{markdown_table(list(rows[0]), cells)}\n", flush=True)
        report["sections"][name] = {"title": title, "rows": rows}
        if args.output:
            with whole_file(args.output) as file:
                file.write(json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    try:
        run()
    except InputError as error:
        sys.exit(f"{PROGRAM}: {error}")
