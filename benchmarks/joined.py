"""Would one product do for q, k and v, and one for gate and up? The products of Llama-3-8B's layers alone, apart and joined. CUDA.

    python benchmarks/joined.py benchmarks/results/joined.json

Two rows of 2,048 tokens in bfloat16, recorded as one CUDA graph; ms for 32 layers. `sums into x` adds up what the products
give back to their input; `adapters` are the four thin products of the backward pass, of rank 16, with their casts.
"""
import argparse, functools, json, statistics
from pathlib import Path

import torch, torch.nn.functional as F
from decode import recorded
from qlora_nb.base.core import versions
from step import gpu_ms

TOKENS, WIDTH, RANK, LAYERS = 4096, 4096, 16, 32
GROUPS = {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)}


def random(*shape, dtype=torch.bfloat16): return torch.randn(*shape, device="cuda", dtype=dtype)*.05


def thin(x, A, B, dy):
    "What the backward pass computes for one adapter."
    a, b = A.bfloat16(), B.bfloat16()
    h, dyB = F.linear(x, a), (dy @ b)*2.
    return (dyB.T @ x).float(), ((dy.T @ h)*2.).float()


def thin_joined(x, As, Bs, dy):
    "The same for several that share `x`, which is read once for all."
    h = F.linear(x, torch.cat(As).bfloat16()).split(RANK, 1)
    parts = dy.split([len(B) for B in Bs], 1)
    dyB = torch.cat([(p @ B.bfloat16())*2. for p, B in zip(parts, Bs)], 1)
    return (dyB.T @ x).float(), *[((p.T @ o)*2.).float() for p, o in zip(parts, h)]


def ms(work, times=15, n=4):
    replay = recorded(lambda: [work() for _ in range(n)])
    return statistics.median(gpu_ms(replay)/n*LAYERS for _ in range(times))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("out", type=Path)
    args = ap.parse_args()
    doc, x = dict(hardware=torch.cuda.get_device_name(), versions=versions(), rows=[]), random(TOKENS, WIDTH)
    for round in range(2):
        for group, sizes in GROUPS.items():
            Ws, dys = [random(n, WIDTH) for n in sizes], [random(TOKENS, n) for n in sizes]
            As, Bs = [random(RANK, WIDTH, dtype=torch.float32) for _ in sizes], [random(n, RANK, dtype=torch.float32) for n in sizes]
            W, dy = torch.cat(Ws), torch.cat(dys, 1)
            pairs = {"forward": (lambda: [F.linear(x, w) for w in Ws], lambda: F.linear(x, W)),
                     "dX accumulation": (lambda: functools.reduce(torch.add, (d @ w for d, w in zip(dys, Ws))), lambda: dy @ W),
                     "adapters": (lambda: [thin(x, *o) for o in zip(As, Bs, dys)], lambda: thin_joined(x, As, Bs, dy))}
            for part, (apart, joined) in pairs.items():
                doc["rows"].append(dict(group=group, part=part, round=round, apart_ms=ms(apart), joined_ms=ms(joined)))
                print(json.dumps(doc["rows"][-1]), flush=True)
    args.out.write_text(json.dumps(doc, indent=1) + "\n")


if __name__ == "__main__": main()
