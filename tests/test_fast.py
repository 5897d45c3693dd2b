"The fast step against the ordinary one: same losses, same gradients, same files, and a word for whatever is left as it was."
import shutil
from types import SimpleNamespace

import pytest, torch
from peft import LoraConfig, get_peft_model

from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import Table
from qlora_nb.speed.fast_training import fast_loss, make_fast, make_plain
from qlora_nb.speed.fused import adapted_layers, fuse, unfuse, why_not
from qlora_nb.speed.cuda_graphs import capture, decoder_layers
from qlora_nb.speed.logits import why_off
from qlora_nb.base.model_files import load_tokenizer, tiny_model
from qlora_nb.base.nf4_config import quiet
from qlora_nb.foundations.loading import load_model
from qlora_nb.training.document_mask import collate_packed, separate_documents
from qlora_nb.foundations.qlora import quantize_model
from qlora_nb.training.finetune import finetune

import forks
from common import small_tokenizer

EAGER = "aot_eager_decomp_partition"   # decides on memory as the real compiler does, and generates no code


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "Small random models with a small tokenizer beside them."
    made, tok = {}, small_tokenizer()
    for kind, layers in dict(llama=2, falcon=2, one_llama=1, one_falcon=1).items():
        made[kind] = tmp_path_factory.mktemp(kind)
        with quiet():
            tiny_model(kind.removeprefix("one_"), vocab_size=len(tok), hidden_size=64, num_hidden_layers=layers, pad_token_id=2).save_pretrained(made[kind])
            tok.save_pretrained(made[kind])
    return made


def adapted(folder, backend="bnb", dtype=torch.float32, rank=8, **how):
    torch.manual_seed(0)
    if backend == "bnb": model = load_model(folder, device="cpu", dtype=dtype)
    else: quantize_model(model := load_model(folder, bits=None, device="cpu", dtype=dtype))
    model = add_adapters(model, rank, 2*rank) if not how else get_peft_model(model, LoraConfig(r=rank, **how))
    for n, p in model.named_parameters():
        if "lora_" in n: p.data = torch.randn_like(p, dtype=torch.float32)*.05
    return model.train()


def test_a_model_may_add_to_a_fused_layer_with_a_bias():
    "In place, as RoCBert does: the output is no view of another tensor."
    model = tiny_model("llama", hidden_size=64, num_hidden_layers=1, attention_bias=True)
    quantize_model(model)
    layer, x = [*adapted_layers(add_adapters(model, 4, 8)).values()][0], torch.randn(2, 5, 64, requires_grad=True)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    def gradients():
        y = layer(x)
        y += x
        return torch.autograd.grad(y.square().sum(), [x, *(o["default"].weight for o in (layer.lora_A, layer.lora_B))])
    usual = gradients()
    fuse(layer)
    for a, b in zip(usual, gradients()): assert (a - b).norm() < 1e-5*a.norm()


def batch(seed=0, rows=2, tokens=24):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(3, 400, (rows, tokens), generator=g), torch.ones(rows, tokens, dtype=torch.long)
    mask[1, -5:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.rand(rows, tokens, generator=g) < .5), -100)
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def gradients(model, loss):
    model.zero_grad()
    (value := loss()).backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one, two, rtol=1e-4):
    assert one[0] == pytest.approx(two[0], rel=1e-5) and one[1].keys() == two[1].keys() and one[1]
    for n, g in one[1].items(): assert (g - two[1][n]).norm() <= rtol*g.norm() + 1e-8, n


@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.parametrize("backend", ["bnb", "scratch"])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_fused_layers_have_the_same_gradients(folders, kind, backend, rank):
    model, b = adapted(folders[kind], backend, rank=rank), batch()
    want = gradients(model, lambda: model(**b).loss)
    for fold in (False, True):
        for m in adapted_layers(model).values(): assert why_not(m) is None; fuse(m, fold)
        same(want, gradients(model, lambda: model(**b).loss))
        for m in adapted_layers(model).values(): unfuse(m)
    again = gradients(model, lambda: model(**b).loss)
    assert again[0] == want[0] and all(torch.equal(g, again[1][n]) for n, g in want[1].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fold", [True, False])
def test_a_fused_layer_with_large_outputs_is_not_called_off(dtype, fold):
    "In float16, which a T4 computes in, the comparison itself has to stay within what the type can hold."
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=256)
    with torch.no_grad(): [p.mul_(300) for n, p in model.named_parameters() if "_proj" in n]
    quantize_model(model.to(dtype))
    layers = adapted_layers(add_adapters(model, 8, 16).train())
    for m in layers.values(): fuse(m, fold)
    assert why_off(layers) == {}


@pytest.mark.parametrize("kind", ["one_llama", "falcon"])   # each layer is compiled by itself, a Llama's in seven seconds, so that one model has two
def test_the_whole_step(folders, kind):
    "All activations recomputed; `test_cuda_graphs` keeps some of them."
    model, b, other = adapted(folders[kind]), batch(), batch(1, rows=3, tokens=31)
    want, wants = (gradients(model, lambda: model(**o).loss) for o in (b, other))
    keys = list(model.state_dict())
    table = make_fast(model, 0., compile=EAGER)
    assert not [r for r in table.rows if "as before" in r[2]] and list(model.state_dict()) == keys
    same(want, gradients(model, lambda: model.step_loss(b)))
    same(want, gradients(model, lambda: model(**b, use_cache=False).loss))   # the model's own loss goes through the same layers
    same(wants, gradients(model, lambda: model.step_loss(other)))   # lengths that vary are compiled anew, once, and for longer
    make_plain(model)
    assert not hasattr(model, "step_loss") and gradients(model, lambda: model(**b).loss)[0] == want[0]


def test_accumulation_and_an_output_head_in_chunks(folders):
    model, b = adapted(folders["llama"]), batch(rows=4)
    whole, n = gradients(model, lambda: fast_loss(model, b)), (b["labels"][:, 1:] != -100).sum()
    parts = [{k: v[i:i+2] for k, v in b.items()} for i in (0, 2)]
    same(whole, gradients(model, lambda: sum(fast_loss(model, p, n, chunk_size=5) for p in parts)))


def test_evaluation_and_generation_do_not_change(folders):
    model = adapted(folders["llama"]).eval()
    ids = batch()["input_ids"]
    def answers(): return model(input_ids=ids).logits.detach(), model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False)
    want = answers()
    make_fast(model, compile=EAGER)
    assert all(torch.equal(a, b) for a, b in zip(answers(), want))
    model.train()
    with model.disable_adapter(), torch.no_grad(): off = model(input_ids=ids).logits
    assert not torch.equal(off, want[0])


@pytest.mark.parametrize("kind, compile", [("llama", False), ("falcon", False), ("one_llama", EAGER), ("one_falcon", EAGER)])
def test_cuda_graphs(folders, kind, compile):
    "Some activations kept, rows of documents that stay apart, and both replayed; the first two steps of a shape go through the layers."
    model = separate_documents(adapted(folders[kind]))
    docs = [dict(input_ids=list(range(5 + k, 17 + 2*k)), labels=list(range(5 + k, 17 + 2*k))) for k in range(3)]
    packed, kept, keys = collate_packed([docs], 2), [], list(model.state_dict())
    b = batch(tokens=packed["input_ids"].shape[1])   # of one length, or the second is compiled for all lengths: `test_the_whole_step`
    n = sum(len(d["labels"]) - 1 for d in docs)
    def alone():
        one = [{k: torch.tensor([v]) for k, v in d.items()} for d in docs]
        return sum(model(**o).loss*(o["labels"].shape[1] - 1) for o in one)/n
    want = [gradients(model, f) for f in (lambda: model(**b).loss, alone)]
    same(want[1], gradients(model, lambda: model(**packed).loss))
    table = make_fast(model, memory=.5, compile=compile, cuda_graphs=True)
    assert "CUDA graphs" in str(table) and list(model.state_dict()) == keys
    assert not compile or not [r for r in table.rows if "as before" in r[2]]
    def step(o):
        kept.append(loss := model.step_loss(o))   # as in a list of losses that nobody detaches
        return loss
    for _ in range(4):
        for o, w in zip((b, packed), want): same(w, gradients(model, lambda: step(o)))
    assert len(model.stack.passes) == 2 and model.stack.why is None
    twice = gradients(model, lambda: (model.step_loss(b).backward(), model.step_loss(b))[1])
    same((want[0][0], {n: 2*g for n, g in want[0][1].items()}), twice)
    make_plain(model)
    assert not hasattr(model, "stack") and gradients(model, lambda: model(**b).loss)[0] == want[0][0]


def test_a_graph_is_of_one_state(folders):
    model, b = adapted(folders["llama"]), batch()
    make_fast(model, cuda_graphs=True)
    for _ in range(3): value = gradients(model, lambda: model.step_loss(b))[0]
    with model.disable_adapter(): off = model.step_loss(b).item()   # in training, without the adapters
    assert abs(off - value) > 1e-3 and len(model.stack.passes) == 1
    assert model.step_loss(b).item() == pytest.approx(value, rel=1e-6)
    with torch.no_grad(): assert model.step_loss(b).item() == pytest.approx(value, rel=1e-5)


def test_a_capture_that_fails_is_said(folders, monkeypatch):
    from qlora_nb.speed import cuda_graphs as graphs
    model, b, once = adapted(folders["llama"]), batch(), graphs.GraphedPasses
    want = gradients(model, lambda: model(**b).loss)
    make_fast(model, cuda_graphs=True)
    def passes(*args):
        if model.stack.seen.most_common(1)[0][1] == 3: raise RuntimeError("not permitted when stream is capturing")
        return once(*args)
    monkeypatch.setattr(graphs, "GraphedPasses", passes)
    same(want, gradients(model, lambda: model.step_loss(b)))
    same(want, gradients(model, lambda: model.step_loss(b)))
    with pytest.warns(UserWarning, match="layers run eagerly: capture failed .RuntimeError: not permitted"):
        same(want, gradients(model, lambda: model.step_loss(b)))
    same(want, gradients(model, lambda: model.step_loss(b)))   # and not a word more
    assert not model.stack.passes


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_not_captured(folders, reentrant):
    model, b = adapted(folders["llama"]), batch()
    want = gradients(model, lambda: model(**b).loss)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    make_fast(model, cuda_graphs=True)
    for _ in range(4): same(want, gradients(model, lambda: model.step_loss(b)))
    assert not model.stack.passes


def test_make_plain_gives_back_widths_and_checkpointing(folders):
    from peft import prepare_model_for_kbit_training
    model = prepare_model_for_kbit_training(load_model(folders["llama"], device="cpu", dtype=torch.bfloat16),
                                            gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model = add_adapters(model, 8, 16).train()
    def state(): return {n: p.dtype for n, p in model.named_parameters()}, model.is_gradient_checkpointing
    before = state()
    for _ in range(2): make_fast(model, compile=EAGER)
    (widths, checkpointing), head = state(), "base_model.model.lm_head.weight"
    assert (before[0][head], widths[head], before[1], checkpointing) == (torch.float32, torch.bfloat16, True, False)
    make_plain(model)
    assert state() == before and decoder_layers(model)[0]._gradient_checkpointing_func.keywords == dict(use_reentrant=False)


def test_an_adapter_that_is_off_in_some_layers(folders):
    model, b = adapted(folders["llama"]), batch()
    make_fast(model, cuda_graphs=True)
    list(adapted_layers(model).values())[3].enable_adapters(False)
    want = gradients(model, lambda: model.step_loss(b))
    for _ in range(3): same(want, gradients(model, lambda: model.step_loss(b)))
    assert len(model.stack.passes) == 1


@pytest.mark.parametrize("how, reason", [(dict(target_modules=["q_proj"], use_dora=True), "Dora"),
    (dict(target_modules=["q_proj"], lora_dropout=.1), "dropout is 0.1"), (dict(target_modules=["q_proj"], lora_bias=True), "bias")])
def test_what_cannot_be_fused_says_why(folders, how, reason):
    model, b = adapted(folders["llama"], **how), batch()
    table = make_fast(model)
    left = [r for r in table.rows if "as before" in r[2] and r[0] == "adapter"]
    assert len(left) == 1 and reason in left[0][2] and left[0][1] == 2
    model.step_loss(b).backward()


def test_merged_and_switched_adapters(folders):
    model = adapted(folders["llama"])
    make_fast(model)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
    layer = next(iter(adapted_layers(model).values()))
    model.base_model.set_adapter(["default", "second"])
    assert "2 adapters" in (why_not(layer) or "")
    model.set_adapter("default")
    with quiet(): model.merge_adapter()
    assert why_not(layer) == "its adapter is merged"


def test_32_bit_copies_of_16_bits_go_back(folders):
    from peft import prepare_model_for_kbit_training
    torch.manual_seed(0)
    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    was = {n: p.dtype for n, p in model.named_parameters()}
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(r=4, target_modules="all-linear"))
    assert model.get_input_embeddings().weight.dtype == torch.float32
    table = make_fast(model)
    assert any(r[0] == "frozen weight" for r in table.rows) and model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(p.dtype == was[n.removeprefix("base_model.model.").replace(".base_layer", "")]
               for n, p in model.named_parameters() if "lora_" not in n)


def test_errors(folders):
    with pytest.raises(QLoRAError, match="no adapters"): make_fast(tiny_model())
    model = adapted(folders["llama"])
    with pytest.raises(QLoRAError, match="between 0 and 1"): make_fast(model, memory=2)
    with pytest.raises(QLoRAError, match="label"): fast_loss(model, batch() | dict(labels=torch.full((2, 24), -100)))
    with pytest.raises(QLoRAError, match="no list of decoder layers"):
        decoder_layers(type("M", (), dict(get_decoder=lambda self: torch.nn.Linear(2, 2)))())


def test_trl_trains_a_fast_model(folders, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    found = []
    for fast in (False, True):
        model = adapted(folders["one_llama"])
        if fast: make_fast(model, compile=EAGER)
        rows = Dataset.from_dict(dict(input_ids=[list(range(5, 30))]*8))
        args = SFTConfig(str(tmp_path/str(fast)), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, bf16=False,
                         logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False)
        with quiet():
            trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=load_tokenizer())
            trainer.train()
        found.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert len(found[0]) == 3 and found[0] == pytest.approx(found[1], rel=1e-3)


def test_trl_needs_no_gpu_for_a_cpu(tmp_path):
    "Triton's interpreter would hide it: a kernel that is started on a CPU fails without it, and beside a GPU."
    code = """
import sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from qlora_nb.base.model_files import load_tokenizer, tiny_model
rows = Dataset.from_dict(dict(input_ids=[list(range(5, 30))]*8))
args = SFTConfig(sys.argv[1], max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
SFTTrainer(tiny_model(), args, train_dataset=rows, processing_class=load_tokenizer()).train()
"""
    r = forks.run(code, tmp_path, env=dict(TRITON_INTERPRET="0"))
    assert r.returncode == 0, r.stderr[-2000:]


def test_a_cpu_does_without_a_loss_in_triton(folders, tmp_path, monkeypatch):
    from qlora_nb.training import training_loop as trainer
    from qlora_nb.training.data import load_rows
    def losses(name):
        return finetune(str(folders["llama"]), load_rows("tickets")[:8], tmp_path/name, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, device="cpu",
                        progress=False, fast=False).info["losses"]
    want = losses("theirs")
    def broken(*args, **kw): raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    monkeypatch.setattr(trainer.SFTTrainer, "compute_loss", broken)
    monkeypatch.setattr(trainer, "triton_everywhere", lambda: True)
    assert losses("ours") == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("backend", ["bnb", "scratch"])
def test_a_fast_run_is_the_same_run_and_resumes_to_the_same_bits(folders, tmp_path, backend):
    from qlora_nb.training.data import load_rows
    rows = load_rows("tickets")[:16]
    def run(name, steps=4, **how):
        return finetune(str(folders["llama"]), rows, tmp_path/name, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2, learning_rate=1e-2,
                        device="cpu", progress=False, backend=backend, **how)
    usual, fast = run("usual", fast=False).info, run("fast").info
    assert usual["settings"]["fast"] is False and fast["settings"]["fast"] is True   # by itself
    assert usual["losses"] == pytest.approx(fast["losses"], rel=5e-3)
    (tmp_path/"fast"/"run.json").unlink()
    shutil.rmtree(tmp_path/"fast"/"checkpoints"/"checkpoint-4")
    again = run("fast", resume=True).info
    assert again["resumed_from"] == "checkpoint-2" and again["losses"][-2:] == fast["losses"][-2:]
    with pytest.raises(QLoRAError, match="fast"): run("fast", fast=False, resume=True)


def test_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None   # as where it is not installed
import torch
from qlora_nb.base.errors import QLoRAError
from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.speed.fast_training import make_fast
from qlora_nb.base.model_files import tiny_model
from qlora_nb.foundations.qlora import quantize_model
quantize_model(model := tiny_model())
model, ids = add_adapters(model).train(), torch.arange(20)[None]
assert "fused" in str(make_fast(model))
model.step_loss(dict(input_ids=ids, labels=ids)).backward()
try: import qlora_nb.speed.kernels
except QLoRAError as e: print(e)
"""
    r = forks.run(code)
    assert r.returncode == 0 and r.stdout == "Triton is not installed. On Linux: pip install triton.\n", r.stderr[-2000:]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("kind, memory, offload", [("llama", 0., True), ("llama", .4, True), ("llama", 1., True), ("falcon", .4, True)])
def test_activations_are_offloaded(folders, kind, memory, offload, cuda_graphs):
    model = adapted(folders[kind]).cuda()
    b = {k: v.cuda() for k, v in batch().items()}
    want = gradients(model, lambda: model(**b).loss)
    make_fast(model, memory=memory, offload=offload, cuda_graphs=cuda_graphs)
    for _ in range(4): same(want, gradients(model, lambda: model.step_loss(b)), rtol=2e-2)
    assert model.host_memory.buffers and (not cuda_graphs or model.stack.passes and model.stack.why is None)
    first = model.step_loss(b)
    with torch.no_grad(): model.step_loss(b)   # an evaluation between the two passes
    first.backward()
    first = model.step_loss(b)
    model.step_loss(b)
    with pytest.raises(QLoRAError, match="another forward pass"): first.backward()


@needs_gpu
def test_graphs_share_their_gradients(folders):
    model, shapes = adapted(folders["llama"]).cuda(), [{k: v.cuda() for k, v in batch(tokens=t).items()} for t in (24, 30)]
    want = [gradients(model, lambda: model(**b).loss) for b in shapes]
    make_fast(model, compile=False)
    for _ in range(4):
        for b, w in zip(shapes, want): same(w, gradients(model, lambda: model.step_loss(b)), rtol=2e-2)
    one, two = model.stack.passes.values()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(one.grads, two.grads))
    model.zero_grad()
    for b in shapes: model.step_loss(b).backward()   # two shapes in a step are added up
    for n, p in model.named_parameters():
        if p.requires_grad: torch.testing.assert_close(p.grad, want[0][1][n] + want[1][1][n], rtol=2e-2, atol=1e-4)
    model.stack.forget()
    for _ in range(4): same(want[0], gradients(model, lambda: model.step_loss(shapes[0])), rtol=2e-2)
    assert len(model.stack.passes) == 1 and model.stack.why is None   # captured anew


@needs_gpu
def test_batches_of_one_step_add_up_in_graphs(folders):
    "The next forward pass writes into the graphs' memory, where the gradients of the batch before it lie."
    model, shapes = adapted(folders["llama"]).cuda(), [{k: v.cuda() for k, v in batch(tokens=t).items()} for t in (24, 30, 24, 24)]
    def all_of(loss):
        for b in shapes[:-1]: loss(b).backward()
        return loss(shapes[-1])
    want = gradients(model, lambda: all_of(lambda b: model(**b).loss))
    make_fast(model, compile=False)
    for _ in range(4): same(want, gradients(model, lambda: all_of(model.step_loss)), rtol=2e-2)
    assert len(model.stack.passes) == 2


@needs_gpu
def test_a_loss_that_is_held_is_named(folders):
    model = adapted(folders["llama"]).cuda()
    b = {k: v.cuda() for k, v in batch().items()}
    make_fast(model)
    held = model.step_loss(b)
    with pytest.warns(UserWarning, match="a loss from before still held"):
        for _ in range(2): model.step_loss(b).backward()
    assert held.isfinite() and torch.randn(2, device="cuda").isfinite().all()


@needs_gpu
@pytest.mark.parametrize("failure", [lambda x: x.sum().item(), lambda x: 1/0], ids=["CUDA's", "Python's"])
def test_a_capture_that_fails_leaves_nothing_behind(failure):
    x, side, pool = torch.ones(1000, device="cuda"), torch.cuda.Stream(), torch.cuda.graph_pool_handle
    found, replay = capture(lambda: [torch.nn.functional.dropout(x)], pool())
    stream, state = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    with pytest.raises((RuntimeError, ZeroDivisionError)): capture(lambda: [x*2, failure(x)], pool())
    assert torch.cuda.current_stream() == stream and torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.randn(3, device="cuda").isfinite().all()
    drawn = [(replay(), found[0].clone())[1] for _ in range(2)]   # an earlier one goes on drawing
    assert not torch.equal(*drawn) and set(drawn[0].tolist()) == {0., 2.}
    again, replay = capture(lambda: [x*3], pool())
    replay()
    assert (again[0] == 3).all()
    before = torch.cuda.memory_allocated()
    big = torch.empty(2**26, device="cuda")
    big.record_stream(side)
    del big
    torch.cuda.synchronize(), torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before   # memory shared by streams is freed only where nothing is captured


@needs_gpu
def test_a_gpu_trains_fast_by_itself(folders, tmp_path):
    model = load_model(folders["llama"], device="cuda")
    run = finetune(model, tokenizer=load_tokenizer(folders["llama"]), output_dir=tmp_path/"run", max_steps=2, progress=False)
    assert run.info["settings"]["fast"] is True and hasattr(run.model, "step_loss") and not run.model.stack.passes


@pytest.mark.parametrize("steps, device, compiled", [(6_000, "cuda", False), (7_000, "cuda", True), (7_000, "cpu", False)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_for_long_runs_only(monkeypatch, steps, device, compiled, checkpointing):
    from qlora_nb.speed import fast_training as fast
    from qlora_nb.training import training_loop as trainer
    called = []
    def note(model, memory, **how): called.append((memory, how)); return Table([], [])
    monkeypatch.setattr(fast, "make_fast", note)
    monkeypatch.setattr(trainer, "count_params", lambda model: SimpleNamespace(total=1e9))   # 6 x 1e9 x steps x 8 x 100
    args = SimpleNamespace(max_steps=steps, train_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing)
    trainer.FastTrainer.speed_up(SimpleNamespace(args=args, model=SimpleNamespace(device=torch.device(device))), length=100)
    assert called == [(0. if checkpointing else 1., dict(compile=compiled, dynamic=True))]
    assert args.gradient_checkpointing == (checkpointing and not compiled)   # compiled layers do it themselves
