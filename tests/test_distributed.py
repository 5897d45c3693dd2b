"Two processes on one CPU: the same losses, one folder, one message, and nobody left behind."
import json, os, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil, pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from qlora_nb.base.errors import PeerLost, QLoRAError
from qlora_nb.base.ranks import can_fork, on_ranks, rank
from qlora_nb.evaluation.evaluation import finetune_and_evaluate
from qlora_nb.foundations.adapters import add_adapters, tiny_qlora
from qlora_nb.speed.data_parallel import same_start
from qlora_nb.training.data import load_rows
from qlora_nb.training.finetune import finetune, make_trainer

from common import NBS, small_base, small_tokenizer
from forks import Fork

pytestmark = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="needs os.fork without CUDA")
STEPS = 4
LAUNCH = NBS/"launch"


@contextmanager
def as_in_a_rank():
    had = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(had)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with as_in_a_rank(): yield


@pytest.fixture(scope="session")
def how(tmp_path_factory):
    folder = small_base(tmp_path_factory.mktemp("base"), 300)
    # eleven rows: the end of a pass leaves one rank without any
    return dict(model=str(folder), data=load_rows("tickets")[:11], max_steps=STEPS, device="cpu", progress=False, fast=False,
                learning_rate=1e-2, per_device_train_batch_size=2, save_steps=2)


@pytest.fixture(scope="session")
def alone(how, tmp_path_factory):
    with as_in_a_rank():
        return finetune(output_dir=tmp_path_factory.mktemp("alone")/"run", gradient_accumulation_steps=2, **how).info["losses"]


def children(): return psutil.Process().children(recursive=True)


def test_nobody_stays_behind():
    before = {o.pid for o in children()}
    def hang():
        if rank() == 0: time.sleep(60)
        raise ValueError("no")
    with pytest.raises(QLoRAError, match="rank 1 of 2: ValueError: no") as e: on_ranks(2, hang, timeout=2)
    assert "raise ValueError" in e.value.__notes__[0]
    assert {o.pid for o in children()} <= before


def test_a_sharded_base_says_what_it_cannot_do():
    from qlora_nb.speed.cuda_graphs import decoder_layers
    from qlora_nb.speed.fast_training import make_fast
    from qlora_nb.speed.sharded_base import shard_base
    with pytest.raises(QLoRAError, match="there is one process"): shard_base(tiny_qlora())
    def picked_up():
        "A backward pass that does not come through a block's output."
        model, seen = tiny_qlora(n_layers=6).train(), []
        shard_base(model), make_fast(model)
        decoder_layers(model)[3].self_attn.q_proj.register_forward_hook(lambda m, args, y: seen.append(y))
        model(input_ids=torch.arange(5, 45)[None], use_cache=False)
        seen[0].sum().backward()
    with pytest.raises(QLoRAError, match="block 3 of a sharded base: its bytes"): on_ranks(2, picked_up)


def routed():
    "A small mixture of experts, whose routers have a loss of their own."
    torch.manual_seed(0)
    small = MixtralConfig(vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                          num_local_experts=4, router_aux_loss_coef=1., output_router_logits=True)
    return add_adapters(AutoModelForCausalLM.from_config(small))


def losses_of(passes:list, folder, make=tiny_qlora):
    "Of short runs, one for each number of passes a step."
    found = {}
    for k in passes:
        ids = torch.randint(5, 500, (11, 20), generator=torch.Generator().manual_seed(0)).tolist()
        trainer = make_trainer(make(), small_tokenizer(300), [dict(input_ids=o, labels=o) for o in ids], folder/f"{rank()} {k}", False,
                               per_device_train_batch_size=1, gradient_accumulation_steps=k, max_steps=4, learning_rate=1e-2)
        trainer.train()
        assert trainer.model_wrapped is trainer.model   # DDP adds in an order of its own, and writes into the base
        found[k] = [o["loss"] for o in trainer.state.log_history if "loss" in o]
    return found


def test_however_a_step_is_divided(tmp_path):
    "The losses have every digit of those of one process, whatever number of processes and passes makes a step; eleven rows end within one."
    one = losses_of([3, 4, 6], tmp_path)
    assert len(set(map(tuple, one.values()))) == 3
    for n, passes in {1: [3], 2: [2, 3], 3: [1, 2], 4: [1]}.items():
        for got in on_ranks(n, losses_of, passes, tmp_path): assert got == {k: one[n*k] for k in passes}
    one = losses_of([4], tmp_path/"routed", routed)   # a rank without rows once added the routers' loss of a row
    assert on_ranks(2, losses_of, [2], tmp_path/"routed", routed) == [{2: one[4]}]*2


def test_a_broken_batch_is_named_by_the_process_that_had_it(tmp_path):
    "The sum of gradients is broken for all; the other process has no row to blame."
    def broken():
        import qlora_nb.training.training_loop as module
        real = module.SureTrainer.compute_loss
        module.SureTrainer.compute_loss = lambda self, *args, **kw: real(self, *args, **kw)*(float("nan") if rank() else 1)   # in this fork alone
        try: losses_of([1], tmp_path)
        except PeerLost as e: (tmp_path/"said").write_text(str(e), encoding="utf-8")
    with pytest.raises(QLoRAError, match=r"^rank 1 of 2: the loss is nan at step 1, in rows \d+\. Likely: the learning rate"): on_ranks(2, broken)
    assert (tmp_path/"said").read_text(encoding="utf-8") == "rank 0 of 2: another process of this run has ended, and so does this one."


def test_packed_rows_and_our_own_layers(how, tmp_path):
    more = dict(packing=True, max_length=300, per_device_train_batch_size=1, backend="scratch", max_steps=3)
    want = finetune(output_dir=tmp_path/"one", gradient_accumulation_steps=2, **how | more).info["losses"]
    assert on_ranks(2, lambda: finetune(output_dir=tmp_path/"two", **how | more).info["losses"]) == [want]*2


def test_resumed_by_two(how, alone, tmp_path):
    "One process begins, two go on; a step with another number of rows is another run."
    begun = how | dict(output_dir=tmp_path/"run", gradient_accumulation_steps=2)
    class Stop(Exception): pass
    from transformers import TrainerCallback
    class At3(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 2: raise Stop
    with pytest.raises(Stop): finetune(callbacks=[At3()], **begun)
    with pytest.raises(QLoRAError, match="rows_a_step was 4, now 8"): on_ranks(2, lambda: finetune(resume=True, **begun))
    got = on_ranks(2, lambda: finetune(resume=True, **begun | dict(gradient_accumulation_steps=1)).info)
    assert [o["losses"] for o in got] == [alone]*2 and got[0]["resumed_from"] == "checkpoint-2"


def test_all_are_asked_for_the_same(how, tmp_path):
    "A process with another file or seed would train something else, or wait for ever, without a word."
    def unlike(): return finetune(output_dir=tmp_path/"run", **how | (dict(seed=1, data=how["data"][:9]) if rank() else {}))
    with pytest.raises(QLoRAError, match="^rank 1 of 2: it was started otherwise than rank 0: .*seed=1 instead of 0.*other rows"): on_ranks(2, unlike)
    assert not (tmp_path/"run"/"settings.json").exists()


def test_all_begin_in_one_place():
    "A machine that does not see the checkpoint, or whose GPU has another type of numbers."
    def begins():
        said = []
        for found, dtype in ((None if rank() else Path("run/checkpoint-2"), "bfloat16"), (None, ["bfloat16", "float32"][rank()]), (None, "bfloat16")):
            weight = torch.zeros(1, dtype=getattr(torch, dtype))
            try: said.append(same_start(found, SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))))
            except QLoRAError as e: said.append(str(e))
        return said
    had = "rank 1 of 2: it was started otherwise than rank 0: {} instead of {}. Give all the same options and files."
    assert on_ranks(2, begins) == [[had.format("resumed_from=None", "checkpoint-2"), had.format("dtype=torch.float32", "torch.bfloat16"), None]]*2


def test_one_process_says_that_a_folder_is_taken(how, tmp_path):
    "It says how to go on with the run that is there, and the other only that it ends; a checkpoint that only one of them sees is refused too."
    taken = how | dict(output_dir=tmp_path/"run", max_steps=1, save_steps=1)
    def again(**more):
        import qlora_nb.training.finetune as training
        if rank() and more: training.last_checkpoint = lambda folder: None   # in this fork alone
        try: finetune(**taken | more)
        except QLoRAError as e: return str(e)
    finetune(**taken | dict(gradient_accumulation_steps=2))
    first, second = on_ranks(2, again)
    assert "already holds a run. Add --resume" in first
    assert second == "rank 1 of 2: another process of this run has ended, and so does this one."
    for said in on_ranks(2, lambda: again(resume=True)): assert "resumed_from=None instead of checkpoint-1" in said


def test_rows_that_one_process_cannot_read(how, tmp_path):
    "It says which; the other one has one sentence too, long before a folder is opened."
    def unread():
        try: finetune_and_evaluate(output_dir=tmp_path/"run", **how | (dict(data=str(tmp_path/"none.jsonl")) if rank() else {}))
        except PeerLost as e: (tmp_path/"said").write_text(str(e), encoding="utf-8")
    with pytest.raises(QLoRAError, match="rank 1 of 2: .*none.jsonl"): on_ranks(2, unread)
    assert (tmp_path/"said").read_text(encoding="utf-8") == "rank 0 of 2: another process of this run has ended, and so does this one."


def test_killed_while_a_checkpoint_is_written(how, alone, tmp_path):
    "The other process says so within seconds, and a checkpoint that is not whole is not gone on from."
    begun = how | dict(output_dir=tmp_path/"run")
    def killed():
        import qlora_nb.speed.data_parallel as module
        seal, died = module.seal_once, tmp_path/"died"
        def seal_once(folder):
            if folder.name == "checkpoint-4" and rank() == 1:
                died.write_text(str(time.time()), encoding="utf-8")
                os.kill(os.getpid(), signal.SIGKILL)
            seal(folder)
        module.seal_once = seal_once   # in this fork alone
        try: finetune(**begun)
        except QLoRAError as e: (tmp_path/"said").write_text(f"{time.time() - float(died.read_text(encoding='utf-8'))} {e}", encoding="utf-8")
    with pytest.raises(QLoRAError, match="rank 1 of 2: it was ended .exit code -9."): on_ranks(2, killed)
    after, said = (tmp_path/"said").read_text(encoding="utf-8").split(" ", 1)
    assert said == ("rank 0 of 2: another process of this run has ended, and so does this one. checkpoint-2 is complete: "
                    "go on from it with --resume (resume=True).")
    assert float(after) < 10
    for info in on_ranks(2, lambda: finetune(resume=True, **begun).info): assert (info["losses"], info["resumed_from"]) == (alone, "checkpoint-2")


def test_the_command_under_a_launcher(how, alone, tmp_path):
    "Two processes as torchrun starts them: one report, one folder, and the others end before the scores."
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(o) + "\n" for o in how["data"]), encoding="utf-8")
    argv = f"finetune --model {how['model']} --data {tmp_path/'rows.jsonl'} --eval-rows 2 --output-dir {tmp_path/'run'} --max-steps 2 --device cpu"
    code = "import sys; from qlora_nb.apps.cli import main; main(sys.argv[1:])"
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    both = [Fork(code, *argv.split(), env=env | dict(RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE="2")) for r in (0, 1)]
    (out, err), (out1, err1) = [o.communicate(100) for o in both]
    assert [o.returncode for o in both] == [0, 0], err + err1
    assert "exact match" in out and out1 == "" and "training" not in err1
    assert json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))["settings"]["num_processes"] == 2


TRAIN = """
import json, sys, torch
how, node, port = map(json.loads, sys.argv[1:])
def train():
    torch.set_num_threads(1)
    from qlora_nb import finetune
    finetune(**how)
"""
NOTEBOOK = """
from accelerate import launchers
launchers.are_libraries_initialized = lambda *names: []   # this fork has them from the beginning, and no GPU
launchers.notebook_launcher(train, num_processes=2, use_port=str(port))
"""
AGENT = """
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
elastic_launch(LaunchConfig(2, 2, 1, run_id="both", rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs=dict(rank=node),
                            max_restarts=0, monitor_interval=.1, start_method="fork"), train)()
"""

@pytest.mark.parametrize("launcher", [[NOTEBOOK], [AGENT]*2], ids=["notebook", "two agents"])
def test_under_launchers_of_others(how, alone, tmp_path, launcher):
    "accelerate's for notebooks, and PyTorch's agents as torchrun starts them on two machines."
    argv = json.dumps(how | dict(output_dir=str(tmp_path/"run"))), free_port()
    agents = [Fork(TRAIN + o, argv[0], k, argv[1], env=dict(GLOO_SOCKET_IFNAME="lo")) for k, o in enumerate(launcher)]
    said = [o.communicate(100)[1] for o in agents]
    assert [o.returncode for o in agents] == [0]*len(agents), said
    info = json.loads((tmp_path/"run"/"run.json").read_text(encoding="utf-8"))
    assert (info["losses"], info["settings"]["num_processes"]) == (alone, 2)


def test_files_for_launchers():
    "What the page on data parallelism links to is read by accelerate and by bash; nbs/experiments/launching.py starts each."
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType
    for name, machines in dict(one_host=1, two_hosts=2).items():
        config = load_config_from_file(str(LAUNCH/f"{name}.yaml"))
        assert (config.num_machines, config.distributed_type, config.mixed_precision) == (machines, DistributedType.MULTI_GPU, "no")
    assert subprocess.run(["bash", "-n", LAUNCH/"slurm.sh"]).returncode == 0


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_spawned(monkeypatch):
    "As on macOS, or beside a GPU: a function that cannot be imported goes to a new Python."
    import qlora_nb.base.ranks as module
    assert can_fork()
    monkeypatch.setattr(module, "can_fork", lambda: False)
    def gathered(k):
        import torch.distributed as dist
        got = [None]*2
        dist.all_gather_object(got, k + dist.get_rank())
        return got
    assert on_ranks(2, gathered, 5) == [[5, 6]]*2
