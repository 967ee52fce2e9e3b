"""Every key of a config, which describes one trial, with its limits and meaning; and what all
scripts share.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
from pydantic import Field

PARTS = ("train", "valid", "test")  # of a dataset


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, where and what to do."""


def run(main):
    """Runs a script; what the user can mend, and an interruption, end it with one sentence and an
    exit code not 0.
    """
    script = Path(sys.argv[0]).name
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "1000"
    )  # beside busy cores threads that spin longer take 10 times as long
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted: the same command continues.")
    except BrokenPipeError:  # such as produce_tables.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (
        InputError,
        OSError,
    ) as error:  # or a full disk, a folder that cannot be written, a storage not there
        sys.exit(f"{script}: {error}")


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which takes its place at the end; where that fails, nothing is
    left or changed.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error):
    """What an exception says, in one line."""
    return " ".join((str(error).strip() or repr(error)).split())[:300]


class Config(pydantic.BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """A key without a default is always needed; one with None is needed where it says so. A new key
    is a new line.
    """

    dataset_name: str = Field(description="time_frequency or a name in DATASETS of datasets.py")
    model_name: str = Field(description="a network in MODELS of models.py")
    n_points: int = Field(ge=2, le=10**8, description="samples per clip")
    hop_length: int = Field(ge=1, le=10**9, description="step between frames, in samples")
    init_lambd: float = Field(
        ge=0.5, description="λ to start from, in samples; below 0.5 it could not move"
    )
    trainable: bool = Field(
        description="True: λ is trained (DMEL), False: it stays at init_lambd (baseline)"
    )
    optimized: bool = Field(
        description="True: window and FFT as long as 6λ needs, False: as the whole clip, always"
    )
    normalize_window: bool = Field(description="divide the window by the root of its energy")
    optimizer_name: Literal["adam", "sgd"] = Field(description="optimizer of the network and of λ")
    lr_model: float = Field(ge=0, description="learning rate of the network")
    lr_tf: float = Field(ge=0, description="learning rate of λ")
    batch_size: int = Field(ge=1, le=10**9, description="clips per step")
    max_epochs: int = Field(ge=1, le=10**9, description="epochs at most")
    patience: int = Field(
        ge=1,
        le=10**9,
        description="epochs without a lower validation loss after which a trial ends",
    )
    device: str = Field(
        pattern=r"^(cpu|cuda(:\d+)?)$", description="cuda:0 or cpu; without a CUDA device the CPU"
    )

    # Needed by the mel_ networks and panns_cnn6, the first one by all recordings.
    resample_rate: int | None = Field(
        None, ge=2, le=10**6, description="sample rate of the clips, Hz"
    )
    n_mels: int | None = Field(None, ge=1, le=4096, description="number of mel filters")
    energy_normalize: bool | None = Field(
        None, description="True: the network sees the log-Mel spectrogram"
    )

    # Needed by time_frequency.
    n_samples: int | None = Field(None, ge=10, le=10**8, description="number of clips drawn")
    noise_std: float | None = Field(None, ge=0, description="noise is uniform from 0 to this")
    sigma_ref: float | None = Field(None, ge=0.1, description="width of a pulse, in samples")
    center_offset: bool | None = Field(
        None, description="displace the pulses at random in time and frequency"
    )

    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="given by main.py: --seed for the first run, then one more each",
    )
    split: str | dict[str, list[int]] | None = Field(
        None, description="a name in DATASETS, or {'train': [1], …}"
    )
    augment: bool = Field(False, description="SpecAugment in panns_cnn6")
    pretrained: bool = Field(
        False, description="start panns_cnn6 from the published AudioSet weights"
    )
    checkpoint_path: str | None = Field(None, description="file with these weights")
    continuous: bool = Field(
        False, description="the mel spectrogram does not jump where the FFT size doubles"
    )
    zero_floor: bool = Field(
        False, description="the log-Mel spectrogram of silence is 0, not ln(1e-10)"
    )
    tf32: bool = Field(
        False, description="convolutions and products of a GPU in TF32, quicker and less exact"
    )
    bf16: bool = Field(
        False, description="the network behind the layer in bfloat16, quicker and less exact"
    )


def complete(config, exclude_defaults=False):
    """The config with all keys, in plain values; raises InputError with key, value and what is
    allowed.
    """
    config = plain(config)
    try:
        checked = Config.model_validate(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key, told = first["loc"][0], first["msg"].replace("Input should", "must")
        field = Config.model_fields.get(key)
        meaning = field.description if field else f"known are {', '.join(Config.model_fields)}"
        raise InputError(f"config: {key} = {config.get(key)!r:.100}: {told} ({meaning}).") from None
    n_points, split = checked.n_points, checked.split
    for key, limit in {
        "hop_length": n_points,
        "init_lambd": n_points,
        "sigma_ref": n_points / 5,
    }.items():
        if (value := getattr(checked, key) or 0) > limit:
            raise InputError(
                f"config: {key} = {value} must be {limit:g} at most where n_points = {n_points}."
            )
    if checked.zero_floor and checked.energy_normalize is False:
        raise InputError(
            "config: zero_floor = True needs energy_normalize: True: it is of the logarithm."
        )
    if isinstance(split, dict):
        groups = [group for part in split.values() for group in part]
        if split.keys() != set(PARTS) or len(set(groups)) < len(groups):
            raise InputError(
                f"config: split = {split} must give each of {PARTS} groups of its own."
            )
    return checked.model_dump(exclude_defaults=exclude_defaults)


def trial_key(config):
    """A short name for the trial of a config, which follows from its values; a key at its default
    changes nothing.
    """
    return digest(complete(config, exclude_defaults=True))[:12]


def digest(value):
    """SHA-256, in hexadecimal digits, of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def require(config, who, *keys):
    """Raises InputError where one of the keys is missing; who: what needs it."""
    for key in keys:
        if getattr(config, key) is None:
            raise InputError(
                f"config: key '{key}' is missing: {who} needs it, so add it to the search space."
            )


def plain(value):
    """A value with numpy's arrays and numbers as Python's, tuples as lists, and what is none of
    these as it is.
    """
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return plain(value.tolist()) if isinstance(value, (np.generic, np.ndarray)) else value


def read_search_space(name, max_epochs):
    """The search space in search_spaces.py with the longest name that is part of this name, in
    plain values.
    """
    import search_spaces

    own = [
        key
        for key, value in vars(search_spaces).items()
        if getattr(value, "__module__", "") == "search_spaces"
    ]
    if (chosen := max((key for key in own if key in name), key=len, default=None)) is None:
        raise InputError(
            f"--name={name} contains none of the experiments in search_spaces.py: {', '.join(own)}."
        )
    if chosen != name:  # meant so, or the one that was meant is not there
        print(f"{name}: takes the search space {chosen} of search_spaces.py", file=sys.stderr)
    space = plain(getattr(search_spaces, chosen)(max_epochs))
    if not isinstance(space, dict):
        raise InputError(f"search_spaces.py: {chosen}() must return a dict, not {space!r:.80}.")
    return space


def draw(space, seed):
    """The configs of one run of a search space: every cell of its grid, samplers drawn from the
    seed.
    """
    from ray.tune.search.variant_generator import generate_variants

    for key in ("dataset_name", "resample_rate", "n_points"):
        if not isinstance(space.get(key) or 0, (str, int, float)):
            raise InputError(
                f"config: {key} must be one value: a search space works on one set of clips."
            )
    if {"grid_search": []} in space.values():
        raise InputError("config: a grid_search of the search space is empty.")
    random = np.random.RandomState(seed % 2**32)
    configs = [
        plain({**cell, "seed": seed}) for _, cell in generate_variants(space, random_state=random)
    ]
    for config in configs:
        if config.get("pretrained") is True and isinstance(config.get("checkpoint_path"), str):
            config["checkpoint_path"] = os.path.abspath(
                config["checkpoint_path"]
            )  # trials run in a folder of Ray's
    return configs


def describe(space):
    """A search space in plain values that can be written to a file and compared."""

    def described(value):  # a function, or an object such as those of tune.uniform
        attributes = plain(getattr(value, "__dict__", str(value)))
        return getattr(value, "__qualname__", {type(value).__name__: attributes})

    return json.loads(json.dumps(space, default=described))
