"""How fast is NF4 with double quantization undone? Each peer in a process of its own, in turns, beside a plain copy.

    python benchmarks/dequant.py benchmarks/results/dequant.json [--peers ours bitsandbytes unsloth] [--rounds 3] \
        [--peers-path FOLDER]      # where Unsloth is, which only its own process sees

A row holds medians over the rounds. `gb_per_s` are the bytes that must be moved (see `73_kernels`) by the time taken;
`copy_gb_per_s` is what copying a gigabyte reached in the same process. The cache is emptied before each call. CUDA only.
"""
import argparse, json, os, statistics, subprocess, sys
from pathlib import Path

SHAPES = [(2048, 2048), (4096, 4096), (14336, 4096), (28672, 8192)]
ROOT, ENV = Path(__file__).resolve().parent.parent, dict(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")


def peer_function(peer):
    "(packed, state) → weight, by `peer`."
    if peer == "ours":
        from qlora_nb.speed.kernels import dequantize_nf4
        return dequantize_nf4
    if peer == "bitsandbytes":
        import bitsandbytes.functional as BF
        return BF.dequantize_4bit
    if peer == "unsloth":
        import unsloth
        from unsloth.kernels.utils import fast_dequantize
        return fast_dequantize
    raise SystemExit(f"there is no peer '{peer}'. Choose from: ours, bitsandbytes, unsloth.")


def measure(peer):
    "One process: copy bandwidth, then each shape."
    undo = peer_function(peer)   # before torch: unsloth wants to be first
    import torch, bitsandbytes.functional as BF
    from triton.testing import do_bench
    from qlora_nb.speed.kernels import bytes_moved
    def us(f): return 1e3*do_bench(f, warmup=50, rep=200, return_mode="median")
    src = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    dst = torch.empty_like(src)
    copy = 2*2**30/us(lambda: dst.copy_(src))/1e3
    del src, dst
    for rows, cols in SHAPES:
        W = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
        packed, state = BF.quantize_4bit(W, quant_type="nf4", blocksize=64, compress_statistics=True)
        right = torch.equal(undo(packed, state), BF.dequantize_4bit(packed, state))
        t = us(lambda: undo(packed, state))
        print(json.dumps(dict(peer=peer, rows=rows, cols=cols, us=t, gb_per_s=bytes_moved(rows*cols)/t/1e3,
                              copy_gb_per_s=copy, equal_bits=right)), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--peers", nargs="+", default=["ours", "bitsandbytes"])
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--peers-path", type=Path)
    ap.add_argument("--one", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.one: return measure(args.one)
    import torch
    from qlora_nb.base.core import versions
    found, doc = {}, dict(hardware=torch.cuda.get_device_name(), versions=versions(), rows=[])
    def middle(rows, key): return statistics.median(r[key] for r in rows)
    for _ in range(args.rounds):
        for peer in args.peers:
            paths = [args.peers_path if peer == "unsloth" else None, ROOT, os.environ.get("PYTHONPATH")]
            env = {**os.environ, **ENV, "PYTHONPATH": os.pathsep.join(str(o) for o in paths if o)}
            res = subprocess.run([sys.executable, __file__, str(args.out), "--one", peer], capture_output=True, text=True, env=env)
            if res.returncode: print(f"{peer} failed:\n{res.stderr[-1500:]}", file=sys.stderr)
            for row in (json.loads(o) for o in res.stdout.splitlines() if o.startswith('{"peer"')):
                found.setdefault((peer, row["rows"], row["cols"]), []).append(row)
            doc["rows"] = [dict(peer=p, rows=r, cols=c, rounds=len(o), equal_bits=all(x["equal_bits"] for x in o),
                                **{k: middle(o, k) for k in ("us", "gb_per_s", "copy_gb_per_s")})
                           for (p, r, c), o in found.items()]
            if found: args.out.write_text(json.dumps(doc, indent=1) + "\n")   # a run that is cut short keeps what it has
    if not found: raise SystemExit("nothing was measured; nothing is written.")
    for r in doc["rows"]: print("{peer:14} {rows:6} x {cols:5} {us:8.1f} us {gb_per_s:7.0f} GB/s".format(**r),
                                f"{r['gb_per_s']/r['copy_gb_per_s']:.0%} of copy", "equal" if r["equal_bits"] else "NOT EQUAL")


if __name__ == "__main__": main()
