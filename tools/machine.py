"""Say in four lines what runs here: the processor, the units that change numbers and speed, cores, memory.

    python tools/machine.py

It needs Python alone, so that it can be asked before anything is installed."""
import os, platform, re, subprocess, sys
from pathlib import Path

UNITS = "avx2 avx512f avx512_bf16 amx_bf16 asimd bf16".split()  # x86, then ARM; as Linux names them
CGROUP = Path("/sys/fs/cgroup")
VARIABLES = "ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA OMP_NUM_THREADS".split()  # may make of it another one


def text(path):
    try: return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError: return ""


def sysctl(name):
    "A fact of macOS, or an empty string."
    try: return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
    except OSError: return ""


def processor():
    "(name, the `UNITS` that it has, or None where that cannot be said)"
    info = text("/proc/cpuinfo")
    name = re.search(r"^(?:model name|Model|Hardware)\s*: (.+)", info, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)", info, re.M)
    if sys.platform == "darwin":
        have = sysctl("machdep.cpu.leaf7_features").lower() + " asimd"*(platform.machine() == "arm64")
        return sysctl("machdep.cpu.brand_string"), [o for o in UNITS if o in have.split()]
    have = flags and [o for o in UNITS if o in flags[1].split()]
    return name[1].strip() if name else platform.processor() or platform.machine(), have


def cores():
    "Cores that this process may use, as its affinity and its container have it."
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = text(CGROUP/"cpu.max").strip().partition(" ")
    return min(n, int(quota)/int(period)) if quota.isdigit() else n


def memory():
    "Bytes, or None where that cannot be said."
    try: total = os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError): total = int(sysctl("hw.memsize") or 0)
    limit = text(CGROUP/"memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total or None


def describe():
    name, units = processor()
    plain = "plain_cpu" in os.environ.get("LD_PRELOAD", "")
    has = "not known" if units is None else ", ".join(units) or "none of those that are looked for"
    size = memory()
    yield f"processor  {name} ({platform.machine()}, {platform.system()})"
    yield f"units      {has}" + " (hidden from programs by tools/plain_cpu.py: all but avx2)"*plain
    yield f"cores      {cores():g}"
    yield f"memory     {size/1e9:.1f} GB" if size else "memory     not known"
    yield from (f"{o}={os.environ[o]}" for o in VARIABLES if o in os.environ)


if __name__ == "__main__": print("\n".join(describe()))
