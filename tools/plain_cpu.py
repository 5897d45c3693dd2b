"""Run a command as on a processor with AVX2 and without AVX-512, bfloat16 and AMX, which is what most laptops have.

    python tools/plain_cpu.py pytest tests/test_quantization.py
    python tools/plain_cpu.py python tests/run_notebook.py nbs/1_foundations/04_double_quantization.ipynb

The C library beside this file answers the CPUID instruction, so that PyTorch, oneDNN, MKL and bitsandbytes choose the
kernels of such a processor; these run at their native speed. Where that is not possible one line says why, and the exit
status is 3."""
import ctypes, os, platform, shutil, subprocess, sys, tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ARCH_PRCTL, ARCH_SET_CPUID = 158, 0x1012
NOT_HERE = 3  # the exit status


def compiler(): return next((o for o in (os.environ.get("CC"), "cc", "gcc", "clang") if o and shutil.which(o)), None)


def why_not():
    "Why no command can be run in this way here, or None."
    if sys.platform != "linux" or platform.machine() != "x86_64": return "it needs Linux on x86-64"
    if compiler() is None: return "there is no C compiler"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ARCH_PRCTL, ARCH_SET_CPUID, 1):   # 1: leave the instruction as it is
        return f"kernel or processor offer no CPUID faulting ({os.strerror(ctypes.get_errno())})"


def build(folder):
    "Compile the library into `folder`."
    lib = Path(folder)/"plain_cpu.so"
    subprocess.run([compiler(), "-O1", "-shared", "-fPIC", "-o", lib, SOURCE, "-ldl"], check=True)
    return lib


def run_plain(command, **how):
    "`subprocess.run(command)`, on a plain processor. Ask `why_not` before."
    with tempfile.TemporaryDirectory(prefix="plain_cpu-") as folder:
        env = dict(how.pop("env", os.environ))
        env["LD_PRELOAD"] = " ".join(map(str, filter(None, [build(folder), env.get("LD_PRELOAD")])))
        return subprocess.run(command, env=env, **how)


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    if reason := why_not():
        print(f"plain_cpu: not available here: {reason}.", file=sys.stderr)
        sys.exit(NOT_HERE)
    status = run_plain(sys.argv[1:]).returncode
    sys.exit(status if status >= 0 else 128 - status)   # a shell's number for a signal
