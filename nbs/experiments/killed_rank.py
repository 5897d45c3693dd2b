"""One of two processes under torchrun is killed after a checkpoint: what does the other say, and does the run go on?

    python nbs/experiments/killed_rank.py                # two GPUs, into "killed" of nbs/results/distributed.json
    python nbs/experiments/killed_rank.py --device cpu --steps 6 --save-steps 2 --out killed.json   # does the script run?

SmolLM2 in 4 bits on the tickets, four rows a process and step. Seconds are from the kill to the end of the launcher.
"""
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path

import psutil

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
p.add_argument("--steps", type=int, default=100)
p.add_argument("--save-steps", type=int, default=10)
p.add_argument("--out", type=Path, default=Path(__file__).parent.parent/"results"/"distributed.json")
o = p.parse_args()

from qlora_nb.training.tickets import make_tickets

tmp = tempfile.TemporaryDirectory()
folder, data = Path(tmp.name)/"run", Path(tmp.name)/"rows.jsonl"
data.write_text("".join(json.dumps(r) + "\n" for r in make_tickets("train", 400)), encoding="utf-8")
command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qlora_nb.apps.cli", "finetune", "--data", str(data),
           "--output-dir", str(folder), "--max-steps", str(o.steps), "--save-steps", str(o.save_steps), "--per-device-train-batch-size", "4",
           "--learning-rate", "2e-3", "--eval-rows", "0", "--device", o.device]
run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
last = f"checkpoint-{2*o.save_steps}"
while run.poll() is None and not (folder/"checkpoints"/last/"complete.json").exists(): time.sleep(.05)
ranks = [c for c in psutil.Process(run.pid).children(recursive=True) if "RANK" in c.environ()]
died = time.monotonic()
for c in ranks:
    if c.environ()["RANK"] == "1": c.kill()
said = run.communicate(timeout=120)[0].replace("\r", "\n").splitlines()
row = dict(gpus=2, launcher="torchrun", backend="nccl" if o.device == "cuda" else "gloo", steps=o.steps, save_steps=o.save_steps, killed_rank=1,
           killed_after=last, ended_after_s=round(time.monotonic() - died, 2), said=next((s for s in said if s.startswith("rank 0")), None))
subprocess.run([*command, "--resume"], check=True, capture_output=True, timeout=600)
info = json.loads((folder/"run.json").read_text(encoding="utf-8"))
row |= dict(resumed_from=info["resumed_from"], resumed_losses=len(info["losses"]))
doc = json.loads(o.out.read_text(encoding="utf-8")) if o.out.exists() else {}
o.out.write_text(json.dumps(doc | dict(killed=[row]), indent=1) + "\n", encoding="utf-8")
print(json.dumps(row, indent=1))
