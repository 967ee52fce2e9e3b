"""What this process may use of its machine: CPUs and memory, as containers and batch jobs limit
them, and GPUs; and what a container may lack.

Ray, psutil and joblib know a container's limits, but not those of a group of processes within a
machine's tree, as Slurm and systemd set them.
"""

import getpass
import math
import os
import re
import tempfile
from pathlib import Path

import psutil

from config import InputError, first_line

ROOT = "/"  # of /proc and /sys
AMPERE = 8  # first major compute capability with bfloat16


def cpus():
    """CPUs that this process may use at a time, by its affinity and its quota."""
    import joblib  # here, as most scripts do without; it knows affinity and a container's quota

    allowed = [joblib.cpu_count()]
    for folder in cgroups("cpu"):
        quota = read(folder / "cpu.max").split()
        if not quota:  # cgroup v1
            quota = read(folder / "cpu.cfs_quota_us").split()
            quota += read(folder / "cpu.cfs_period_us").split()
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            allowed.append(math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min(allowed))


def free_memory():
    """Bytes of memory that are free for this process: of the machine, and below its limits."""
    free = [psutil.virtual_memory().available]
    for folder in cgroups("memory"):
        limit = read(folder / "memory.max") or read(folder / "memory.limit_in_bytes")
        used = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            free.append(int(limit) - int(used) + file_pages(folder))
    return max(0, min(free))


def file_pages(folder):
    """Bytes of a control group's memory that hold files, which the system gives back."""
    values = {}
    for line in read(folder / "memory.stat").splitlines():
        name, value = line.split()
        values[name] = int(value)

    prefix = "total_" if "total_inactive_file" in values else ""  # in cgroup v1, with its groups
    return values.get(f"{prefix}inactive_file", 0) + values.get(f"{prefix}active_file", 0)


def cgroups(controller):
    """Folders of the control groups that limit this process, its own and all around it.

    In a container a group may be named as the machine outside names it, so folders that are not
    there are left out.
    """
    mount = Path(ROOT, "sys/fs/cgroup")
    folders = []
    for line in read(Path(ROOT, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # cgroup v2
            top = mount
        elif controller in controllers.split(","):
            top = mount / controller
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and folder.is_dir():
                folders.append(folder)
    return folders


def read(path):
    """The text of a file, without blanks around it; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# What a container may lack


def torch_settings():
    """Environment variables with which torch's compiler can be loaded, as its optimizers do.

    It names a folder after the user, whom a container may know by number alone.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return {}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return {"TORCHINDUCTOR_CACHE_DIR": folder_of_user("torchinductor")}
    return {}


def matplotlib_settings():
    """Environment variables with which Matplotlib can be loaded without a warning.

    It keeps its fonts in the home folder, which in a container may not be there, or read-only.
    """
    if "MPLCONFIGDIR" in os.environ:
        return {}
    try:
        os.makedirs(os.path.expanduser("~/.config/matplotlib"), exist_ok=True)
    except OSError:
        return {"MPLCONFIGDIR": folder_of_user("matplotlib")}
    return {}


def folder_of_user(name):
    """The path of a folder for temporary files that no other user shares."""
    return f"{tempfile.gettempdir()}/{name}-{os.getuid()}"


# GPUs

ON_THE_CPU = (
    "compute on CPUs, with CUDA_VISIBLE_DEVICES= before the command or, on a Ray cluster that is "
    "there, with --gpus_per_trial=0"
)


def check_gpu(device, bf16=False):
    """Raises InputError where torch cannot compute on a CUDA device, or not in bfloat16."""
    import torch  # here, as preparing recordings does without

    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    kernels = torch.cuda.get_arch_list()
    if not has_kernels(kernels, major, minor):
        raise InputError(
            f"{name} has compute capability {major}.{minor}, and torch {torch.__version__} has "
            f"kernels for {', '.join(kernels)} alone: name another GPU in CUDA_VISIBLE_DEVICES, "
            f"install a torch that has them, or {ON_THE_CPU}."
        )
    if bf16 and major < AMPERE:
        raise InputError(
            f"config: bf16 = True: {name} has compute capability {major}.{minor}, and computes in "
            f"bfloat16 from {AMPERE}.0 on (Ampere): leave bf16 at False, or {ON_THE_CPU}."
        )


def has_kernels(kernels, major, minor):
    """Whether one of torch's lists of kernels runs on a GPU of a compute capability.

    sm_86 runs on 8.6 and later ones of 8; compute_80 is compiled for whatever comes later.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", kernel) for kernel in kernels]
    for match in found:
        if match is None:  # of another kind of GPU, such as AMD's
            return True
        kind = match[1]
        version = (int(match[2]), int(match[3]))
        if kind == "sm" and version[0] == major and version[1] <= minor:
            return True
        if kind == "compute" and version <= (major, minor):
            return True
    return False


def check_driver():
    """Raises InputError where there is a GPU for this process and CUDA cannot use it.

    Mostly its driver is too old. A GPU may also need a service that does not run.
    """
    import torch

    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no GPU, no driver, a torch without CUDA
        reason = first_line(error)
        if "too old" in reason:
            raise InputError(
                f"a GPU cannot be used, as torch {torch.__version__} is for CUDA "
                f"{torch.version.cuda} ({reason:.120}): install a newer driver, or {ON_THE_CPU}."
            ) from None
        # The driver counts the GPUs of the machine, also those that a batch job may not use.
        if "No CUDA GPUs" in reason or torch.cuda.device_count() == 0:
            return
        raise InputError(
            f"a GPU cannot be used, as CUDA says '{reason:.120}': see what `nvidia-smi` says, "
            f"or {ON_THE_CPU}."
        ) from None


def free_gpu_memory(device, gpus):
    """Bytes of a CUDA device that this process may take more, where it has this share of it.

    The share counts, as other processes have theirs, and not what happens to be free now; but never
    more than is free, what this process keeps for itself included.
    """
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    held = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - held
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(0, min(total * min(gpus, 1) - held, free))
