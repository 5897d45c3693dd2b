"""Run a notebook as the suite does, and say which of its cells take how long.

    python tests/cell_times.py nbs/base/core.ipynb"""
import math, sys
from time import monotonic
from unittest.mock import patch

import nbformat, psutil

import run_notebook
from forks import Kernels


class TimedClient(run_notebook.Client):
    "Notes for each cell the CPU seconds of the kernel and of what it started, and the seconds on the clock."
    times = {}

    def cpu_seconds(self):
        try: return sum(psutil.Process(self.km.provisioner.pid).cpu_times()[:4])
        except psutil.Error: return math.nan  # a kernel that died

    async def async_execute_cell(self, cell, *args, **kw):
        start, before = monotonic(), self.cpu_seconds()
        try: return await super().async_execute_cell(cell, *args, **kw)
        finally:
            if cell.cell_type == "code": self.times[cell.id] = self.cpu_seconds() - before, monotonic() - start


def cell_times(path, n=12, width=80):
    "Run `path`; yields a line for the whole and one for each of the `n` slowest cells, with its place in the notebook."
    cells, error = nbformat.read(path, as_version=4).cells, None
    with patch.object(run_notebook, "Client", TimedClient), patch.dict(TimedClient.times, clear=True):
        try: run_notebook.run(path, kernel_manager_class=Kernels)
        except Exception as e: error = e
        times = dict(TimedClient.times)
    rows = sorted(((*times[c.id], i, c.source) for i, c in enumerate(cells) if c.id in times), reverse=True)
    yield f"{sum(o[0] for o in rows):8.1f} CPU s {sum(o[1] for o in rows):8.1f} s  {len(rows)} cells"
    for cpu, wall, i, source in rows[:n]:
        code = next((o for o in source.splitlines() if o.strip() and not o.startswith("#|")), "")
        yield f"{cpu:8.1f} CPU s {wall:8.1f} s  [{i}] {code[:width]}"
    if error: raise error


if __name__ == "__main__":
    for line in cell_times(sys.argv[1]): print(line)
