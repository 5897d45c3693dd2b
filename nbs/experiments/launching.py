"""`finetune` started in each way that the page on data parallelism names, once, as a user would: two processes on one CPU.

    python nbs/experiments/launching.py nbs/results/launching.json [--ways torchrun notebook]

A small random Llama and eleven rows; each way in a folder of its own. Its losses have to be those of one process that
accumulates twice as many batches. What stands for something else here: gloo and a CPU for NCCL and GPUs, two agents on one
host for two hosts, and two short scripts for `srun` and `scontrol`. CPU seconds are those of all processes of a way, imports included.
"""
import argparse, json, os, resource, socket, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT/"nbs"/"launch"
CLI = ["-m", "qlora_nb.apps.cli", "finetune"]
NOTEBOOK = """
def train(how):
    from qlora_nb import finetune   # not before: see the page
    finetune(**how)

from accelerate import notebook_launcher
notebook_launcher(train, ({how!r},), num_processes=2, use_port="{port}")
"""
SPAWN = """
import json, os, sys
import torch.multiprocessing as mp

def train(rank, how, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    from qlora_nb import finetune
    finetune(**how)

if __name__ == "__main__": mp.spawn(train, (json.loads(sys.argv[1]), sys.argv[2]), nprocs=2)
"""
# On each of two nodes, `srun` starts the command, and `scontrol` knows their names.
STANDS_FOR = dict(scontrol="echo localhost; echo localhost",
                  srun='while [[ "$1" == --* ]]; do shift; done; for k in 0 1; do SLURM_NODEID=$k "$@" & done; wait -n && wait -n')


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def prepare(folder):
    "A small base and rows, as files: (what `finetune` takes, the same as options)."
    from qlora_nb.base.model_files import load_tokenizer, tiny_model
    from qlora_nb.base.nf4_config import quiet
    from qlora_nb.training.tickets import make_tickets
    rows = make_tickets("train")
    tok = load_tokenizer().train_new_from_iterator(map(str, rows), 300)
    with quiet():
        tiny_model("llama", vocab_size=len(tok), hidden_size=64, pad_token_id=2).save_pretrained(folder/"base")
        tok.save_pretrained(folder/"base")
    (folder/"rows.jsonl").write_text("".join(json.dumps(o) + "\n" for o in rows[:11]), encoding="utf-8")
    how = dict(model=str(folder/"base"), data=str(folder/"rows.jsonl"), max_steps=4, device="cpu", learning_rate=1e-2,
               per_device_train_batch_size=2, fast=False)
    return how, [o for k, v in how.items() for o in ("--" + k.replace("_", "-"), str(v).lower() if v is False else str(v))] + ["--eval-rows", "0"]


def both(*commands, env):
    "Start all, wait for all."
    running = [subprocess.Popen(o, env=env) for o in commands]
    if any([p.wait(600) for p in running]): raise SystemExit(f"failed: {commands[0]}")


def in_kernel(source, folder):
    "A notebook of one cell, run as JupyterLab runs it."
    import nbformat
    from nbclient import NotebookClient
    NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), timeout=600, resources=dict(metadata=dict(path=str(folder)))).execute()


def start(way, how, options, folder):
    "One way, from its command or cell to the end of all its processes."
    out, port = ["--output-dir", str(folder/way)], free_port()
    env = os.environ | dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    local = how | dict(output_dir=str(folder/way), progress=False)
    def agents(*command, word): return [[*command, word, str(k), *CLI, *options, *out] for k in (0, 1)]
    torchrun, accelerate = [sys.executable, "-m", "torch.distributed.run"], [sys.executable, "-m", "accelerate.commands.launch"]
    if way == "one process": both([sys.executable, *CLI, *options, "--gradient-accumulation-steps", "2", *out], env=env)
    if way == "torchrun": both([*torchrun, "--nproc-per-node", "2", "--master-port", port, *CLI, *options, *out], env=env)
    if way == "accelerate": both([*accelerate, "--config_file", str(LAUNCH/"one_host.yaml"), "--main_process_port", port, *CLI, *options, *out], env=env)
    if way == "notebook":
        os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
        in_kernel(NOTEBOOK.format(how=local, port=port), folder)
    if way == "spawn":
        (folder/"spawn.py").write_text(SPAWN, encoding="utf-8")
        both([sys.executable, str(folder/"spawn.py"), json.dumps(local), port], env=env)
    if way == "two torchrun":
        both(*agents(*torchrun, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port, word="--node-rank"), env=env)
    if way == "two accelerate":
        both(*agents(*accelerate, "--config_file", str(LAUNCH/"two_hosts.yaml"), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
                     "--num_processes", "2", word="--machine_rank"), env=env)
    if way == "SLURM script":
        for name, body in STANDS_FOR.items():
            (folder/name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
            (folder/name).chmod(0o755)
        slurm = dict(SLURM_JOB_NODELIST="localhost,localhost", SLURM_NNODES="2", SLURM_JOB_ID=port)
        both(["bash", str(LAUNCH/"slurm.sh"), "finetune", *options, *out], env=env | slurm | dict(PATH=f"{folder}:{env['PATH']}"))


WAYS = "one process", "torchrun", "accelerate", "notebook", "spawn", "two torchrun", "two accelerate", "SLURM script"


def used():
    t = resource.getrusage(resource.RUSAGE_CHILDREN)
    return t.ru_utime + t.ru_stime


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    o = p.parse_args()
    from qlora_nb.base.core import cpu_kind, versions
    ways = json.loads(o.file.read_text(encoding="utf-8"))["ways"] if o.file.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        how, options = prepare(Path(name))
        for way in o.ways:
            cpu, clock = used(), time.perf_counter()
            start(way, how, options, Path(name))
            info = json.loads((Path(name)/way/"run.json").read_text(encoding="utf-8"))
            ways[way] = dict(losses=info["losses"], processes=info["settings"].get("num_processes", 1), cpu_s=round(used() - cpu, 1), clock_s=round(time.perf_counter() - clock, 1))
            print(way, ways[way], flush=True)
            if ways[way]["losses"] != ways["one process"]["losses"]: raise SystemExit(f"{way}: other losses")
            if ways[way]["processes"] != 1 + (way != "one process"): raise SystemExit(f"{way}: not two processes")
            o.file.write_text(json.dumps(dict(versions=versions(), cpu=cpu_kind(), ways=ways), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
