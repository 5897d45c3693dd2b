"""What a training step takes when threads that wait spin or sleep, with and without other work on the same cores.

    python nbs/experiments/waiting.py nbs/results/waiting.json [--rounds 2] [--steps 6]

`OMP_WAIT_POLICY` is read when PyTorch is imported, so each way is a process of its own; ways take turns. The other
work is one process that multiplies matrices on all cores. A way that exceeds `--limit` seconds is ended and has no time.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

LOAD = "import torch\nA = torch.randn(1500, 1500)\nwhile True: A @ A"


def steps(n):
    "Seconds of each of `n` steps of the main job, after two that do not count."
    import tempfile
    from qlora_nb.adapters import add_adapters
    from qlora_nb.data import encode_rows, load_rows
    from qlora_nb.models import load_model, load_tokenizer
    from qlora_nb.training import make_trainer
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        times = []
        def on_step_end(self, *args, **kw): self.times.append(time.perf_counter())
    tokenizer = load_tokenizer()
    model = add_adapters(load_model(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, encode_rows(load_rows("tickets"), tokenizer), folder, progress=False, steps=n + 2, save_steps=10**6)
        trainer.speed_up(100)
        trainer.add_callback(clock := Clock())
        trainer.train()
    return None, [b - a for a, b in zip(clock.times[1:], clock.times[2:])]


def measure(policy, load, n, limit):
    env = os.environ | dict(HF_HUB_OFFLINE="1", OMP_WAIT_POLICY=policy)
    others = [subprocess.Popen([sys.executable, "-c", LOAD], env=env)] if load else []
    one = [sys.executable, __file__, "--one", str(n)]
    try: out = subprocess.run(one, env=env, capture_output=True, text=True, check=True, timeout=limit).stdout
    except subprocess.TimeoutExpired: return None, []
    finally: [o.kill() for o in others]
    return json.loads(out.strip().splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, nargs="?"), p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--steps", type=int, default=6), p.add_argument("--limit", type=float, default=300), p.add_argument("--one", type=int)
    a = p.parse_args()
    if a.one: return print(json.dumps(steps(a.one)))
    found = {}
    for _ in range(a.rounds):
        for load in (False, True):
            for way in ("PASSIVE", "ACTIVE"):
                times = measure(way, load, a.steps, a.limit)[1]
                found.setdefault((way, load), []).extend(times)
                print(way, load, [round(o, 2) for o in times], flush=True)
    from qlora_nb.core import cpu_kind, versions
    kind, rows = cpu_kind(), []
    for (way, load), t in found.items():
        took = dict(seconds=statistics.median(t), low=min(t), high=max(t)) if t else dict(seconds=None, limit=a.limit)
        rows.append(dict(cpu=kind, way=way, other_work=load, steps=len(t), **took))
    old = json.loads(a.out.read_text(encoding="utf-8"))["rows"] if a.out.exists() else []
    doc = dict(rows=[r for r in old if r["cpu"] != kind] + rows, versions=versions())
    a.out.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
