"How the suite runs: as many workers as cores and memory allow, each on its share of the cores, long tests first."
import os
from pathlib import Path

import psutil

GIB = 2**30
PER_WORKER = 3*GIB  # a page that loads SmolLM2-135M and trains it peaks below this
# The pages that take longest, by what follows their number; then come the other pages, then everything else.
SLOW = "export cli evaluation training falcon gguf inference switching sampling cards packing models data".split()  # `pytest` ends with the slowest five


def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory(limit=Path("/sys/fs/cgroup/memory.max")):
    "Bytes that this process may still take: what the machine has free, or less in a container with a limit."
    free = psutil.virtual_memory().available
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(free, int(text)) if text.isdigit() else free


def pytest_xdist_auto_num_workers(config): return max(1, min(cores(), free_memory()//PER_WORKER))


# Set before any test file imports torch; the kernels inherit it. Two workers must not fight over the same cores, and only a
# worker knows how many there are: a value set in the process that starts them would be what they inherit.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if _workers > 1: os.environ.update({o: str(max(1, cores()//_workers)) for o in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits leaves its core to the others
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")


def rank(item):
    "Where a test stands in the order: slow pages, pages, the rest."
    if not item.name.startswith("test_page_runs["): return len(SLOW) + 1
    page = item.callspec.id.removesuffix(".ipynb").partition("_")[2]
    return SLOW.index(page) if page in SLOW else len(SLOW)


def pytest_collection_modifyitems(items): items.sort(key=rank)
