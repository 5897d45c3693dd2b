"""What a training step takes when threads that wait sleep at once or spin first, with and without other work on the same cores.

    python nbs/experiments/waiting.py nbs/results/waiting.json [--rounds 12] [--spins 0 10000 300000]

How often a thread looks again before it sleeps is read when PyTorch is imported (`GOMP_SPINCOUNT`; 0 is what
`OMP_WAIT_POLICY=PASSIVE` means, 300,000 what PyTorch's library does when nobody says anything), so each way is a process of
its own. All are loaded first and then take turns, step by step, so that a machine whose speed changes is the same for all.
The other work is one process that multiplies matrices on all cores.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

LOAD = "import torch\nA = torch.randn(1500, 1500)\nwhile True: A @ A"


def train(n):
    "`n` steps of the main job, each begun when a line comes in; prints what each took, in seconds."
    import tempfile
    from qlora_nb.foundations.adapters import add_adapters
    from qlora_nb.training.data import encode_rows, load_rows
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.foundations.loading import load_model
    from qlora_nb.training.finetune import make_trainer
    from transformers import TrainerCallback
    class OnCall(TrainerCallback):
        def on_step_begin(self, *args, **kw):
            sys.stdin.readline()
            self.start = time.perf_counter()
        def on_step_end(self, *args, **kw): print("took", time.perf_counter() - self.start, flush=True)
    tokenizer = load_tokenizer()
    model = add_adapters(load_model(device="cpu"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, encode_rows(load_rows("tickets"), tokenizer), folder, progress=False, max_steps=n, save_steps=10**6)
        trainer.speed_up(100)
        trainer.add_callback(OnCall())
        trainer.train()


def step(p):
    "Seconds of the next step of process `p`."
    p.stdin.write("go\n")
    p.stdin.flush()
    for line in p.stdout:
        if line.startswith("took"): return float(line.split()[1])
    raise RuntimeError(f"the process ended with {p.wait()}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, nargs="?"), p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--spins", type=int, nargs="+", default=[0, 10_000, 300_000]), p.add_argument("--train", type=int)
    a = p.parse_args()
    if a.train: return train(a.train)
    def start(*args, **env): return subprocess.Popen([sys.executable, *args], env=os.environ | dict(HF_HUB_OFFLINE="1") | env,
                                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ways, found = {o: start(__file__, "--train", str(2*a.rounds + 4), GOMP_SPINCOUNT=str(o)) for o in a.spins}, {}
    for _ in range(2): [step(w) for w in ways.values()]   # which compile and allocate, and do not count
    for load in (False, True):
        others = [start("-c", LOAD)] if load else []
        for _ in range(a.rounds):
            for o, w in ways.items(): found.setdefault((o, load), []).append(step(w))
        for o in others: o.kill()
    for w in ways.values(): w.kill()
    from qlora_nb.base.core import cpu_kind, versions
    rows = [dict(cpu=cpu_kind(), spins=o, other_work=load, steps=len(t), seconds=statistics.median(t), low=min(t), high=max(t),
                 ratio=statistics.median(x/y for x, y in zip(t, found[a.spins[-1], load]))) for (o, load), t in found.items()]
    if a.out: a.out.write_text(json.dumps(dict(rows=rows, versions=versions()), indent=1) + "\n", encoding="utf-8")
    for r in rows: print(r)


if __name__ == "__main__": main()
