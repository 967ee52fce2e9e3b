"""What this process may use of its machine: CPUs and memory, as containers and batch jobs limit
them, and GPUs.

Ray, psutil and joblib know a container's limits, but not those of a group of processes within a
machine's tree, as Slurm and systemd set them.
"""

import math
from pathlib import Path

import psutil

ROOT = "/"  # of /proc and /sys


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
