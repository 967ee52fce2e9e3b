"""Every key of a config with its type, limits, default and meaning; and what all scripts share.

    config = complete({"dataset_name": "time_frequency", ...})  # every key, optional ones at their defaults
    if __name__ == "__main__":
        run(main)                                               # a mistake of the user's ends in one sentence

A config describes one trial. A search space of search_spaces.py has the same keys, some of them with several values.
"""

import hashlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field

PARTS = ("train", "valid", "test")  # of a dataset
Count = Annotated[int, Field(ge=1, le=10**9)]
Rate = Annotated[float, Field(ge=0)]


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, where and what to do."""


class Config(pydantic.BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    """A key without a default is always needed; one with None is needed where it says so. A new key is a new line."""

    dataset_name: str = Field(description="time_frequency or a name in DATASETS of datasets.py")
    model_name: str = Field(description="a network in MODELS of models.py")
    n_points: int = Field(ge=2, le=10**8, description="samples per clip")
    hop_length: Count = Field(description="step between frames, in samples")
    init_lambd: float = Field(ge=0.5, description="λ to start from, in samples; below 0.5 it could not move")
    trainable: bool = Field(description="True: λ is trained (DMEL), False: it stays at init_lambd (baseline)")
    optimized: bool = Field(description="True: window and FFT as long as 6λ needs, False: as the whole clip, always")
    normalize_window: bool = Field(description="divide the window by the root of its energy")
    optimizer_name: Literal["adam", "sgd"] = Field(description="optimizer of the network and of λ")
    lr_model: Rate = Field(description="learning rate of the network")
    lr_tf: Rate = Field(description="learning rate of λ")
    batch_size: Count = Field(description="clips per step")
    max_epochs: Count = Field(description="epochs at most")
    patience: Count = Field(description="epochs without a lower validation loss after which a trial ends")
    device: str = Field(pattern=r"^(cpu|cuda(:\d+)?)$", description="cuda:0 or cpu; without a CUDA device the CPU")

    # Needed by the mel_ networks and panns_cnn6, the first one by all recordings.
    resample_rate: int | None = Field(None, ge=2, le=10**6, description="sample rate of the clips, Hz")
    n_mels: int | None = Field(None, ge=1, le=4096, description="number of mel filters")
    energy_normalize: bool | None = Field(None, description="True: the network sees the log-Mel spectrogram")

    # Needed by time_frequency.
    n_samples: int | None = Field(None, ge=10, le=10**8, description="number of clips drawn")
    noise_std: float | None = Field(None, ge=0, description="noise is uniform from 0 to this")
    sigma_ref: float | None = Field(None, ge=0.1, description="width of a pulse, in samples")
    center_offset: bool | None = Field(None, description="displace the pulses at random in time and frequency")

    # Options.
    seed: int = Field(0, ge=0, lt=2**63, description="given by main.py: --seed for the first run, then one more each")
    split: Any = Field(None, description="a name in DATASETS of datasets.py, or groups: {'train': [1], 'valid': …}")
    augment: bool = Field(False, description="SpecAugment in panns_cnn6")
    pretrained: bool = Field(False, description="start panns_cnn6 from the published AudioSet weights")
    checkpoint_path: str | None = Field(None, description="file with these weights")
    continuous: bool = Field(False, description="the mel spectrogram does not jump where the FFT size doubles")
    zero_floor: bool = Field(False, description="the log-Mel spectrogram of silence is 0, not ln(1e-10)")
    tf32: bool = Field(False, description="convolutions and products of a GPU in TF32, quicker and less exact")
    bf16: bool = Field(False, description="the network behind the layer in bfloat16, quicker and less exact")

    @pydantic.field_validator("split")
    @classmethod
    def _split(cls, split):
        if split is None or isinstance(split, str):
            return split
        groups = [number for part in PARTS for number in split[part]] if is_split(split) else []
        if not groups or len(set(groups)) < len(groups):
            raise ValueError("must be a name or give each of train, valid and test a list of groups of its own")
        return split

    @pydantic.model_validator(mode="after")
    def _together(self):
        for key in ("hop_length", "init_lambd"):
            if (value := getattr(self, key)) > self.n_points:
                raise ValueError(f"{key} = {value} is longer than a clip of n_points = {self.n_points} samples")
        if self.zero_floor and self.energy_normalize is False:
            raise ValueError("zero_floor = True needs energy_normalize: True: it is of the logarithm")
        if self.sigma_ref is not None and self.sigma_ref > self.n_points / 5:
            limit = f"a fifth of n_points = {self.n_points}"
            raise ValueError(f"sigma_ref = {self.sigma_ref} must be {limit} at most: pulses lie that far apart")
        return self


def is_split(split):
    """Whether a value is a dict that gives every part a list of whole numbers."""
    lists = list(split.values()) if isinstance(split, dict) and set(split) == set(PARTS) else [None]
    return all(isinstance(groups, list) and all(type(number) is int for number in groups) for groups in lists)


def complete(config):
    """The config with all keys, in plain values; raises InputError with key, value and what is allowed."""
    return _validated(config).model_dump()


def trial_key(config):
    """A short name for the trial of a config, which follows from its values; a key at its default changes nothing."""
    text = json.dumps(_validated(config).model_dump(exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _validated(config):
    try:
        return Config.model_validate(plain(config))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        told = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if not first["loc"]:  # what keys say together
            raise InputError(f"config: {told}.") from None
        key, *_ = first["loc"]
        if key not in Config.model_fields:
            raise InputError(f"config: unknown key {key}; known are {', '.join(Config.model_fields)}.") from None
        if first["type"] == "missing":
            raise InputError(f"config: key '{key}' is missing: add it to the search space.") from None
        told = told.replace("String should", "must").replace("\n", " ")
        meaning = Config.model_fields[key].description
        raise InputError(f"config: {key} = {first['input']!r:.100} {told} ({meaning}).") from None


def require(config, who, *keys):
    """Raises InputError where one of the keys is missing; who: what needs it."""
    for key in keys:
        if config[key] is None:
            raise InputError(f"config: key '{key}' is missing: {who} needs it, so add it to the search space.")


def plain(value):
    """A value with numpy's arrays and numbers as Python's, tuples as lists; everything else as it is."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return plain(value.tolist()) if isinstance(value, (np.generic, np.ndarray)) else value


# Search spaces


def read_search_space(name, max_epochs):
    """The search space of that name in search_spaces.py, or of the longest name that is part of it, in plain values."""
    import search_spaces

    functions = inspect.getmembers(search_spaces, inspect.isfunction)
    spaces = {key: function for key, function in functions if function.__module__ == search_spaces.__name__}
    contained = [key for key in spaces if key in name]
    if not contained:
        raise InputError(f"--name={name} contains none of the experiments in search_spaces.py: {', '.join(spaces)}.")
    chosen = name if name in spaces else max(contained, key=len)
    space = plain(spaces[chosen](max_epochs))
    if not isinstance(space, dict):
        raise InputError(f"search_spaces.py: {chosen}() must return a dict, not {space!r:.80}.")
    return space


def draw(space, seed):
    """The configs of one run of a search space: every cell of its grid, samplers drawn from the seed."""
    from ray.tune.search.variant_generator import generate_variants

    for key in ("dataset_name", "resample_rate", "n_points"):
        if isinstance(space.get(key), dict) or hasattr(space.get(key), "sample"):
            raise InputError(f"config: {key} must be one value: a search space works on one set of clips.")
    if {"grid_search": []} in space.values():
        raise InputError("config: a grid_search of the search space is empty.")
    random = np.random.RandomState(seed % 2**32)
    configs = [plain({**cell, "seed": seed}) for _, cell in generate_variants(space, random_state=random)]
    for config in configs:
        if config.get("pretrained") is True and isinstance(config.get("checkpoint_path"), str):
            config["checkpoint_path"] = os.path.abspath(config["checkpoint_path"])  # trials run in a folder of Ray's
    return configs


def describe(value):
    """A search space, or a part of it, in plain values that can be written to a file and compared."""
    from ray.tune.search.sample import Domain, Sampler

    if isinstance(value, (Domain, Sampler)):
        return {type(value).__name__: describe(vars(value))}
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    return value.__qualname__ if hasattr(value, "__qualname__") else plain(value)


# For all scripts


def run(main):
    """Runs a script; what the user can mend, and an interruption, end it with one sentence and an exit code not 0."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except InputError as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted: the same command continues.")
    except BrokenPipeError:  # such as produce_tables.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
