"""Every key of a config, which describes one trial, with its limits; and what scripts share.

search_spaces.py gives dicts; read_search_space and draw turn one into Config objects, once, and
everything behind them takes the object: config.n_mels.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import traceback
from itertools import product
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import pydantic
from pydantic import Field

PARTS = ("train", "valid", "test")  # of a dataset

# Keys that take one value in a search space: a grid works on one set of clips, with one budget.
SINGLE_VALUED = ("dataset_name", "resample_rate", "n_points", "max_epochs", "device")
GIVEN_BY_MAIN = ("seed", "checkpoint_sha256")  # keys that a search space may not have

# Keys that do not tell trials apart: a budget, a place to compute on, and a path whose file counts
# by its hash, checkpoint_sha256.
NO_IDENTITY = {"max_epochs", "device", "checkpoint_path"}


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, where and what to do."""


class Config(pydantic.BaseModel, strict=True, extra="forbid", allow_inf_nan=False, frozen=True):
    """What describes a trial: all keys, checked.

    A key without a default is always needed; one with None is needed where it says so. A new key is
    a new line.
    """

    dataset_name: str = Field(description="time_frequency or a name in DATASETS of datasets.py")
    model_name: str = Field(description="a network in MODELS of models.py")
    n_points: int = Field(ge=2, le=10**8, description="samples per clip")
    hop_length: int = Field(ge=1, le=10**9, description="step between frames, in samples")
    init_lambd: float = Field(
        ge=0.5,
        description="λ to start from, in samples; with optimized, a λ below 0.5 could not move",
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
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="cuda:0 or cpu; without a CUDA device the CPU",
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

    # Given by main.py.
    seed: int = Field(
        0, ge=0, lt=2**63, description="--seed for the first run, then one more for each"
    )
    checkpoint_sha256: str | None = Field(
        None, description="hash of the file in checkpoint_path, where pretrained is True"
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

    @property
    def key(self):
        """The trial's name, twelve hexadecimal digits that follow from what tells trials apart.

        A key at its default changes nothing, so trials outlive a new key that has one.
        """
        identity = self.model_dump(exclude_defaults=True, exclude=NO_IDENTITY)
        return digest(identity)[:12]

    def is_finished(self, row):
        """Whether a trial whose last row this is has come to its end.

        That is a judgement of the moment: with more max_epochs it goes on, unless patience ran out.
        """
        return row["training_iteration"] >= self.max_epochs or self.lost_patience(row)

    def lost_patience(self, row):
        """Whether patience epochs have passed since the lowest validation loss: an end for good."""
        return row["training_iteration"] - row["best_epoch"] >= self.patience


def parse(config):
    """The Config of a dict; raises InputError with key, value and what is allowed."""
    config = plain(config)
    try:
        parsed = Config.model_validate(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        problem = first["msg"].replace("Input should", "must")
        field = Config.model_fields.get(key)
        meaning = field.description if field else f"known are {', '.join(Config.model_fields)}"
        value = f"{config.get(key)!r:.100}"
        raise InputError(f"config: {key} = {value}: {problem} ({meaning}).") from None

    check_limits(parsed)
    return parsed


def check_limits(config):
    """Raises InputError where values of a Config do not go together."""
    n_points = config.n_points
    limits = {"hop_length": n_points, "init_lambd": n_points, "sigma_ref": n_points / 5}
    for key, limit in limits.items():
        value = getattr(config, key)
        if value is not None and value > limit:
            raise InputError(
                f"config: {key} = {value} must be {limit:g} at most where n_points = {n_points}."
            )

    if config.zero_floor and config.energy_normalize is False:
        raise InputError(
            "config: zero_floor = True needs energy_normalize: True: it is of the logarithm."
        )

    if isinstance(config.split, dict):
        check_parts(config.split, "config: split")


def check_parts(split, name):
    """Raises InputError where a split, groups by part, lacks a part or has a group in two."""
    groups = [group for part in split.values() for group in part]
    if split.keys() != set(PARTS) or len(set(groups)) < len(groups):
        raise InputError(f"{name} = {split} must give each of {PARTS} groups of its own.")


def require(config, who, *keys):
    """Raises InputError where one of the keys is missing; who: what needs it."""
    for key in keys:
        if getattr(config, key) is None:
            raise InputError(
                f"config: key '{key}' is missing: {who} needs it, so add it to the search space."
            )


def plain(value):
    """A value with arrays and their numbers as Python's, tuples as lists, all else as it is."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):  # of numpy, torch or pandas
        return plain(value.tolist())
    return value


def digest(value):
    """SHA-256, in hexadecimal digits, of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Search spaces


def read_search_space(name, max_epochs):
    """The search space in search_spaces.py with the longest name that is part of this name.

    Raises InputError with file and line where that file fails.
    """
    with errors_in_search_spaces():
        import search_spaces

    spaces = {}
    for key, value in vars(search_spaces).items():
        if getattr(value, "__module__", "") == "search_spaces":
            spaces[key] = value
    matching = [key for key in spaces if key in name]
    if not matching:
        known = ", ".join(spaces)
        raise InputError(
            f"--name={name} contains none of the experiments in search_spaces.py: {known}."
        )

    chosen = max(matching, key=len)
    if chosen != name:  # meant so, or the one that was meant is not there
        print(f"{name}: takes the search space {chosen} of search_spaces.py", file=sys.stderr)

    with errors_in_search_spaces(spaces[chosen]):
        space = plain(spaces[chosen](max_epochs))
    if not isinstance(space, dict):
        raise InputError(f"search_spaces.py: {chosen}() must return a dict, not {space!r:.80}.")
    check_space(space)
    return space


@contextlib.contextmanager
def errors_in_search_spaces(function=None):
    """Turns what goes wrong in search_spaces.py into an InputError: a sentence with file and line,
    then the traceback of the file's own code. function: of that file, if it is called.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of any kind, as it is the user's code
        frames = traceback.extract_tb(error.__traceback__)
        names = [Path(frame.filename).name for frame in frames]
        own = []
        if "search_spaces.py" in names:
            own = frames[names.index("search_spaces.py") :]

        if own:
            place = f"line {own[0].lineno}"
        elif isinstance(error, SyntaxError):
            place = f"line {error.lineno}"
        elif hasattr(function, "__code__"):  # called with max_epochs, which it does not take
            place = f"line {function.__code__.co_firstlineno}"
        else:
            place = "as it is read"
        details = traceback.format_list(own) + traceback.format_exception_only(error)
        raise InputError(
            f"search_spaces.py, {place}: {type(error).__name__}: {first_line(error)}: "
            f"mend that and start again.\n\n{''.join(details).rstrip()}"
        ) from None


def check_space(space):
    """Raises InputError where a key of a search space has what no trial can be drawn from."""
    for key in GIVEN_BY_MAIN:
        if key in space:
            raise InputError(
                f"config: {key} is given by main.py (a run's seed by --seed and --num_samples): "
                "remove it from the search space."
            )
    for key in SINGLE_VALUED:
        if not isinstance(space.get(key, ""), (str, int, float, type(None))):
            raise InputError(f"config: {key} must be one value, the same for the whole grid.")
    if {"grid_search": []} in space.values():
        raise InputError("config: a grid_search of the search space is empty.")
    for key, value in space.items():
        is_grid = isinstance(value, dict) and value.keys() == {"grid_search"}
        if is_grid and not isinstance(value["grid_search"], list):
            raise InputError(
                f"config: {key} = grid_search({value['grid_search']!r:.80}) must be of a list."
            )


def draw(space, seed):
    """The trials of one run of a search space: Configs by key, equal ones once.

    Each cell of the grid draws its samplers (tune.uniform and the like) from a generator of its
    own, seeded by the run's seed and the cell's values in the grid without trainable. So a further
    value in the grid changes no draw of the other cells, and DMEL and baseline get the same.
    """
    from ray.tune.search.variant_generator import assign_value, generate_variants, parse_spec_vars

    space = dict(sorted(space.items()))  # the order of lines changes nothing
    _, _, axes = parse_spec_vars(space)
    paths = [path for path, _ in axes]
    configs = {}

    for values in product(*(axis.categories for _, axis in axes)):
        cell = plain(space)
        for path, value in zip(paths, values, strict=True):
            assign_value(cell, path, value)

        grid = {}
        for path, value in zip(paths, values, strict=True):
            if path != ("trainable",):
                grid["/".join(map(str, path))] = comparable(value)
        generator = np.random.RandomState(int(digest([seed, grid])[:8], 16))

        try:
            with seeded(generator):
                variants = [
                    variant for _, variant in generate_variants(cell, random_state=generator)
                ]
        except ValueError as error:  # of Ray, with the path of the key that failed
            reason = error.__context__ or error
            raise InputError(
                f"search_spaces.py: what is drawn fails ({first_line(error):.100}): "
                f"{type(reason).__name__}: {first_line(reason)}: mend that and start again."
            ) from None
        for variant in variants:
            variant = without_default_split(plain(variant))
            config = parse(with_hash_of_checkpoint(variant | {"seed": seed}))
            configs[config.key] = config
    return configs


def without_default_split(config):
    """A config, a dict, without the name of the split that its dataset has anyway."""
    from datasets import default_split  # here, as it imports this file

    if "split" in config and config["split"] == default_split(config.get("dataset_name")):
        del config["split"]
    return config


def comparable(value):
    """A value of a grid as it counts for draws: 1 as 1.0, what is no JSON by its type alone."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    value = plain(value)
    try:
        json.dumps(value)
    except TypeError:  # such as a sampler within the grid
        return type(value).__name__
    return value


@contextlib.contextmanager
def seeded(generator):
    """Seeds the global generators of Python and numpy, which tune.sample_from may use."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(int(generator.randint(2**31)))
    np.random.seed(generator.randint(2**31))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def with_hash_of_checkpoint(config):
    """A config, a dict, whose weights can be found by trials, which run in a folder of Ray's.

    Adds the hash of their file, which counts for the trial's key. A file that is not there is
    refused where the network is built.
    """
    path = config.get("checkpoint_path")
    if config.get("pretrained") is not True or not isinstance(path, str):
        return config

    path = os.path.abspath(path)
    sha256 = None
    if os.path.isfile(path):
        sha256 = hash_of_file(path)
    return config | {"checkpoint_path": path, "checkpoint_sha256": sha256}


def hash_of_file(path):
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What all scripts share


def run(main):
    """Runs a script; what the user can mend ends it with one sentence and exit code 1.

    An interruption ends it with exit code 130, as shells expect; whoever raises KeyboardInterrupt
    with a sentence has it said.
    """
    script = Path(sys.argv[0]).name
    # Beside busy cores, threads that spin for longer take ten times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        main()
    except KeyboardInterrupt as interruption:
        advice = str(interruption) or "the same command continues"
        print(f"{script}: interrupted: {advice}.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # such as produce_tables.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        # An OSError: a full disk, a folder that cannot be written, a storage that is not there.
        sys.exit(f"{script}: {error}")


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which takes its place at the end, or leaves nothing."""
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


def lock(path, remedy, timeout=-1):
    """A context that holds a lock, which is free again when its process ends, in any way.

    timeout: seconds to wait for another process, then filelock.Timeout is raised; -1: without end.
    remedy: what helps where nothing can be locked, the end of a sentence. Raises InputError there.
    """
    # Where a file system has no locks, filelock would take the file itself for one. That outlives
    # its process, and who comes next would wait for nobody.
    file_lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        return file_lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise
    except OSError as error:
        raise InputError(f"cannot lock {path} ({error.strerror or error}): {remedy}.") from None


def first_line(error):
    """What an exception says, in one line."""
    message = str(error).strip() or repr(error)
    return " ".join(message.split())[:300]
