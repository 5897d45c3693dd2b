"""Python processes for the tests that need one of their own, forked from one that has imported the libraries.

Imports take longer than most of these tests. A fork is fresh in all that is ours: none of our modules is imported.
The kernels of the pages are forked as well: `Kernels` is a kernel manager for nbclient."""
import atexit, inspect, json, os, select, signal, subprocess, sys, tempfile, time
from functools import cache
from pathlib import Path

import zmq
from jupyter_client.manager import AsyncKernelManager


def described_once():
    "`importlib.metadata.Distribution.metadata` that keeps what it has parsed."
    from importlib.metadata import Distribution
    parse, found = Distribution.metadata.fget, {}
    def metadata(self):
        place = str(getattr(self, "_path", id(self)))
        if place not in found: found[place] = parse(self)
        return found[place]
    return metadata


SERVER = inspect.getsource(described_once) + """
import atexit, gc, inspect, json, os, subprocess, sys, threading, weakref
sys.modules.setdefault("rfc3987_syntax", None)   # as in conftest.py
import importlib.metadata
importlib.metadata.Distribution.metadata = property(described_once())
import bitsandbytes, datasets, gguf, ipykernel.kernelapp, ipywidgets, matplotlib.pyplot, nbformat, peft, safetensors.torch
import torch, transformers, trl
import IPython.core.completerlib, IPython.core.debugger, IPython.core.oinspect, IPython.extensions.storemagic, tornado.platform.asyncio, tornado.queues
import matplotlib.backends.backend_agg, tabulate, transformers.models.falcon.modeling_falcon, transformers.models.llama.modeling_llama
from functools import cache
from trl import SFTConfig, SFTTrainer  # is what brings in transformers' trainer: these libraries import the rest when it is asked for
import jinja2
compiled = cache(jinja2.Environment.compile)  # of the card that PEFT writes beside each adapter, of each checkpoint too
jinja2.Environment.compile = lambda self, source, *args, **kw: compiled(self, source, *args, **kw)
os.fsync = lambda fd: None  # nothing waits for the disk: conftest.py
inspect.getmodule(sys._getframe())  # for each operator that is registered, PyTorch asks where it stands: of some thousand modules, this remembers
for o in weakref.finalize._registry.values(): o.atexit = False  # PyTorch would take its operators apart in each fork, and at times wait for ever
gc.collect(), gc.freeze()  # a collection in a fork leaves these objects alone, and their memory shared
kept = []  # or they would be waited for by `subprocess` itself
peak = 0   # kilobytes of the largest fork that has ended since this was asked for
def new(job):  # beside a GPU the imports have opened CUDA, which does not survive a fork
    streams = [open(name, mode) for name, mode in zip(job["streams"], ("r", "a", "a"))]
    kept.append(subprocess.Popen([sys.executable, "-c", job["code"], *job["args"]], cwd=job["cwd"],
                                 env={**os.environ, **job["env"]}, **dict(zip(("stdin", "stdout", "stderr"), streams))))
    return kept[-1].pid
for line in sys.stdin:
    job = json.loads(line)
    if "cpu" in job:
        print(json.dumps(sum(os.times()[2:4])), flush=True)
        continue
    if "peak" in job:
        print(json.dumps(peak), flush=True)
        peak = 0
        continue
    if "pid" in job:
        pid, status, used = os.wait4(job["pid"], os.WNOHANG)
        if pid: peak = max(peak, used.ru_maxrss)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    if (pid := new(job) if torch.cuda.is_initialized() else os.fork()) == 0: break
    print(pid, flush=True)
else: sys.exit()
for fd, name in enumerate(job["streams"]): os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), fd)
sys.stdin, sys.argv = open(0, encoding="utf-8"), ["-c", *job["args"]]
os.chdir(job["cwd"]), os.environ.update(job["env"])
try: exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
except SystemExit as e:
    if e.code: raise
# The end of a process as Python has it, but for taking apart a million objects that are shared: half a second.
threading._shutdown(), atexit._run_exitfuncs()
sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
"""


@cache
def server():
    p = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(lambda: (p.stdin.close(), p.wait()))
    return p


def ask(**job):
    print(json.dumps(job), file=server().stdin, flush=True)
    return json.loads(server().stdout.readline())


ended = set()   # of the two numbers below those that have changed: most tests start no fork, and each is asked for four times
used = 0.


def cpu_seconds():
    "CPU seconds of the forks that have ended."
    global used
    if "cpu" in ended: used = ask(cpu=True)
    ended.discard("cpu")
    return used


def peak_kilobytes():
    "What the largest fork had in memory that has ended since the last call, what it shares with others included."
    if "peak" not in ended: return 0
    ended.discard("peak")
    return ask(peak=True)


class Fork:
    "`python -c code args...` as `subprocess.Popen` runs it, but forked, and with streams that go through files."
    stdin = stdout = stderr = None
    def __init__(self, code, *args, stdin="", cwd=None, env=None):
        self.folder, self.returncode = tempfile.TemporaryDirectory(), None
        self.streams = [Path(self.folder.name)/o for o in ("in", "out", "err")]
        for o in self.streams: o.write_text(stdin if o.name == "in" else "", encoding="utf-8")
        self.pid = ask(code=code, args=[str(o) for o in args], env=env or {}, cwd=str(cwd or os.getcwd()),
                       streams=[str(o) for o in self.streams])

    def said(self): return self.streams[1].read_text(encoding="utf-8")
    def send_signal(self, sig): os.kill(self.pid, sig)
    def kill(self): self.send_signal(signal.SIGKILL)
    def terminate(self): self.send_signal(signal.SIGTERM)

    def poll(self):
        if self.returncode is None:
            self.returncode = ask(pid=self.pid)
            if self.returncode is not None: ended.update(("cpu", "peak"))
        return self.returncode

    def pause(self, seconds):
        "Until it has ended, or for so long; for a moment where the system does not tell."
        try: fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError): return time.sleep(.01)
        try: select.select([fd], [], [], seconds)
        finally: os.close(fd)

    def wait(self):
        while self.poll() is None: self.pause(60)
        return self.returncode

    def communicate(self, timeout=300):
        "(what it wrote, what it complained of) when it has ended."
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                said = self.streams[2].read_text(encoding="utf-8")[-2000:]
                raise TimeoutError(f"a process took more than {timeout} s: {said}")
            self.pause(max(0, end - time.monotonic()))
        return self.said(), self.streams[2].read_text(encoding="utf-8")


def run(code, *args, timeout=300, **kw):
    "`python -c code args...` as `subprocess.run` runs it when it captures text."
    p = Fork(code, *args, **kw)
    out, err = p.communicate(timeout)
    return subprocess.CompletedProcess(args, p.returncode, out, err)


KERNEL = """
import os, sys, matplotlib
os.environ.update(JPY_PARENT_PID=str(os.getppid()), MPLBACKEND="module://matplotlib_inline.backend_inline")
matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]  # as it would have been read at its import
sys.modules["debugpy"] = None  # its import takes longer than all else here, and no page is debugged
from ipykernel.kernelapp import IPKernelApp
IPKernelApp.launch_instance(argv=sys.argv[1:])
# A kernel that ends at once stops the thread of its outputs while that of the shutdown still tells it something, and both wait for
# ever: a kernel in ten was ended by a signal, seconds later.
control = IPKernelApp.instance().control_thread
control.stop(), control.join()
"""


def ready_soon(kc):
    """A client's `wait_for_ready` without its pause of a fifth of a second for messages that do not come; nbclient leaves out what
    belongs to no cell."""
    ready, channel = kc.wait_for_ready, kc.iopub_channel
    async def wait(timeout=None):
        get_msg = channel.get_msg
        channel.get_msg = lambda timeout=None: get_msg(timeout=.02)
        try: await ready(timeout=timeout)
        finally: channel.get_msg = get_msg
    return wait


class Kernels(AsyncKernelManager):
    "Starts each kernel as a fork, and looks every hundredth of a second whether it is there or gone: its parent takes a tenth."
    def client(self, **kw):
        self.context.setsockopt(zmq.RECONNECT_IVL, 10)
        kc = super().client(**kw)
        kc.wait_for_ready = ready_soon(kc)
        return kc

    async def _async_finish_shutdown(self, waittime=None, pollinterval=.01, restart=False):
        await super()._async_finish_shutdown(waittime, pollinterval, restart)

    async def _async_launch_kernel(self, kernel_cmd, env=None, cwd=None, **kw):
        p = self.provisioner
        p.process = Fork(KERNEL, *kernel_cmd[kernel_cmd.index("-f"):], cwd=cwd, env=env)
        p.pid, p.pgid, p.cwd = p.process.pid, None, cwd
        self._reconcile_connection_info(p.connection_info)
