"Plans against what is really there: every parameter counted, layers of every kind, attention of every form, and one sentence for the rest."
import gc

import pytest, torch
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, BloomConfig, DeepseekV3Config, Gemma2Config, Gemma3Config, Gemma4Config, Glm4MoeConfig, GPT2Config, GptOssConfig, JetMoeConfig,
                          Llama4TextConfig, LlamaConfig, MambaConfig, MixtralConfig, PhimoeConfig, ReformerConfig, XLMConfig)

from qlora_nb.foundations.adapters import add_adapters
from qlora_nb.foundations.loading import load_model
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import count_params
from qlora_nb.memory.gpus import advise_several, each_of
from qlora_nb.memory.ledger import blocks_of, layer_groups, on_card, some_layers, whole
from qlora_nb.memory.planner import plan, rehearse, skeleton

SIZE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0)
MOE = SIZE | dict(num_key_value_heads=2, intermediate_size=256)
CONFIGS = dict(llama=LlamaConfig(**MOE), gpt2=GPT2Config(vocab_size=512, n_embd=128, n_layer=6, n_head=4), gemma2=Gemma2Config(**MOE, head_dim=32),
    bloom=BloomConfig(vocab_size=512, hidden_size=128, n_layer=6, n_head=4), mixtral=MixtralConfig(**MOE, num_local_experts=4),
    glm=Glm4MoeConfig(**MOE, moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=4, head_dim=32),
    gpt_oss=GptOssConfig(**MOE, head_dim=32, num_local_experts=4), phimoe=PhimoeConfig(**MOE, num_local_experts=4),
    deepseek=DeepseekV3Config(**MOE | dict(num_key_value_heads=4), moe_intermediate_size=64, n_routed_experts=8, n_group=2, topk_group=1, q_lora_rank=32,
                              kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24, first_k_dense_replace=2, num_experts_per_tok=2),
    llama4=Llama4TextConfig(**MOE, intermediate_size_mlp=192, head_dim=32, num_local_experts=4))


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "deepseek", "gpt_oss", "phimoe", "llama4"])
def test_every_weight_is_counted(kind):
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16)
    p = plan(CONFIGS[kind], 1, 32)
    head, small = model.get_output_embeddings().weight, ("embed", "wte", "wpe")
    wide = {n: w for n, w in model.named_parameters() if w.ndim < 2 or w is head or any(o in n for o in small)}
    packed = {n: w.numel() for n, w in model.named_parameters() if n not in wide and not ("router" in n or n.endswith("mlp.gate.weight") or "bias" in n)}
    assert p.parts["4-bit weights"] == pytest.approx(sum(packed.values())/2, rel=.02), kind     # blocks of 512 bytes
    rest = sum(w.numel() for w in model.parameters()) - sum(packed.values())
    assert p.parts["16-bit weights"] == pytest.approx(2*rest, rel=.1), kind
    assert p.moments["forward"][1] > sum(v for k, v in p.parts.items() if "weights" in k)


@pytest.mark.parametrize("kind", ["glm", "gemma2"])
def test_few_layers_of_each_kind_stand_for_all(kind):
    "What is grown from few layers is what a rehearsal of all layers takes."
    how = dict(per_device_train_batch_size=2, max_length=96, method="qlora", r=4, target_modules="all-linear", gradient_checkpointing=False, optim="adamw", loss="chunked", dtype=torch.bfloat16)
    parts, moments = rehearse(CONFIGS[kind], **how)
    p = plan(CONFIGS[kind], 2, 96, r=4)
    assert {k: p.parts[k] for k in parts} == parts
    for k, (top, end) in moments.items():
        assert p.moments[k][0] == pytest.approx(top, rel=.02) and p.moments[k][1] == pytest.approx(end, rel=.02), k


def test_what_the_caller_has_frozen_stays_frozen():
    "Else each collection that follows in this process would go through it again."
    gc.freeze()
    before = gc.get_freeze_count()
    plan(LlamaConfig(**SIZE))
    assert gc.get_freeze_count() > .99*before > 1000


def test_layers_are_sorted_by_kind():
    assert layer_groups(whole(CONFIGS["glm"], torch.bfloat16)) == [[0, 1, 2, 3], [4, 5]]
    assert layer_groups(whole(CONFIGS["gemma2"], torch.bfloat16)) == [[0, 2, 4], [1, 3, 5]]
    model = whole(CONFIGS["llama"], torch.bfloat16)
    small = some_layers(model, [1, 4])
    assert (len(blocks_of(small)[2]), small.config.num_hidden_layers, len(blocks_of(model)[2]), model.config.num_hidden_layers) == (2, 2, 6, 6)


def test_a_large_mixture_of_experts_is_counted_whole():
    "GLM-4.5: three dense layers before 89 with 160 experts. Two and three layers said 18.5 GB."
    glm = Glm4MoeConfig(hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=92, num_attention_heads=96,
                        num_key_value_heads=8, head_dim=128, n_routed_experts=160, num_experts_per_tok=8, first_k_dense_replace=3)
    with torch.device("meta"): total = sum(p.numel() for p in AutoModelForCausalLM.from_config(glm).parameters())
    p = plan(glm, 1, 128, gradient_checkpointing=True)
    assert p.parts["4-bit weights"] + p.parts["16-bit weights"]/4 == pytest.approx(total/2, rel=.01) and total > 3e11
    full = plan(glm, 1, 128, method="lora", gradient_checkpointing=True)
    assert full.parts["16-bit weights"] == pytest.approx(2*total, rel=.01)


@pytest.mark.parametrize("cfg, said", [(MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=4), "from token to token"),
                                       (JetMoeConfig(**{k: v for k, v in MOE.items() if k != "num_attention_heads"}, kv_channels=32), "cannot be rehearsed")])
def test_what_cannot_be_planned_says_so(cfg, said):
    with pytest.raises(QLoRAError, match=f"{cfg.model_type}: .*{said}"): plan(cfg, 1, 64)


def test_experts_are_wide_in_one_layer_at_a_time():
    p, q = (plan(MixtralConfig(**MOE | dict(hidden_size=256, num_hidden_layers=n), num_local_experts=16), 1, 16) for n in (3, 6))
    stack = 2*16*3*256*256                                    # the experts of one layer in 16 bits
    assert p.moments["forward"][0] - sum(p.parts[k] for k in ("4-bit weights", "scales", "16-bit weights", "adapters", "optimizer")) > .5*stack
    growth = (q.moments["forward"][1] - p.moments["forward"][1])/3
    assert growth < .4*stack, (growth, stack)                 # packed, with a little activation, and nothing wide


@pytest.mark.parametrize("kind, sharded", [("llama", True), ("mixtral", False)])
def test_no_plan_shards_what_cannot_be_sharded(kind, sharded):
    "`shard_base` refuses experts in 4 bits, so no plan for several GPUs counts on it. What a plan lists is what it needs."
    p = plan(CONFIGS[kind], 1, 16)
    ways = [False, True][:1 + sharded]
    for q in (each_of(p, 4, way) for way in ways): assert sum(q.parts.values()) == pytest.approx(q.peak)
    assert ("sharded base" in str(advise_several(p, "T4", 4)[1])) == sharded
    if not sharded:
        with pytest.raises(QLoRAError, match="experts in 4 bits cannot be sharded"): each_of(p, 4, True)


@pytest.mark.parametrize("kind, stacks", [("mixtral", ["experts.gate_up_proj", "experts.down_proj"]), ("gpt_oss", ["down_proj"])])
def test_adapters_on_experts_are_counted_by_pefts_rule(kind, stacks):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    real = count_params(add_adapters(model, 4, 8, target_parameters=stacks)).trainable
    p, q = (plan(CONFIGS[kind], 1, 16, r=4, target_parameters=o) for o in (stacks, None))
    planned = skeleton(CONFIGS[kind], "qlora", 4, "all-linear", torch.bfloat16, target_parameters=stacks)
    assert sum(o.numel() for o in planned.parameters() if o.requires_grad) == real
    assert real*4 <= p.parts["adapters"] < real*4 + 512*200 and p.parts["adapters"] > q.parts["adapters"] and p.peak > q.peak
    with pytest.raises(QLoRAError, match="matches no stack"): plan(CONFIGS[kind], target_parameters=["experts.nothing"])
    with pytest.raises(QLoRAError, match="method='qlora' only"): plan(CONFIGS[kind], method="lora", target_parameters=stacks)


NUMBERED = {r"model\.layers\.([2-4])\..*q_proj": 3*2, r".*\.(0|5)\.mlp\..*_proj": 2*3*2, r".*\.[135]\.self_attn\.(q|k)_proj": 3*2*2,
            ("layers.1.self_attn.q_proj", "layers.4.mlp.up_proj", "v_proj"): (1 + 1 + 6)*2}

@pytest.mark.parametrize("targets", NUMBERED)
def test_layers_told_apart_by_number_are_counted_as_peft_does(targets):
    "What is grown from some layers of each kind is what a rehearsal of all six takes, and its adapters are PEFT's."
    cfg, wanted = CONFIGS["llama"], targets if isinstance(targets, str) else list(targets)
    with torch.device("meta"): model = get_peft_model(AutoModelForCausalLM.from_config(cfg), LoraConfig(r=4, target_modules=wanted, task_type="CAUSAL_LM"))
    real = [o.numel() for o in model.parameters() if o.requires_grad]
    p = plan(cfg, 2, 64, r=4, target_modules=wanted)
    assert len(real) == NUMBERED[targets] and p.parts["adapters"] == sum(on_card(4*n) for n in real)
    how = dict(per_device_train_batch_size=2, max_length=64, method="qlora", r=4, target_modules=targets, gradient_checkpointing=False, optim="adamw", loss="chunked", dtype=torch.bfloat16)
    assert rehearse(cfg, **how)[1] == p.moments


def test_experts_told_apart_by_number_are_counted():
    targets, stacks = r".*\.[24]\..*q_proj", ["layers.1.mlp.experts.gate_up_proj", "5.mlp.experts.down_proj"]
    model = add_adapters(AutoModelForCausalLM.from_config(CONFIGS["mixtral"]), 4, 8, target_modules=targets, target_parameters=stacks)
    real = [o.numel() for o in model.parameters() if o.requires_grad]
    assert len(real) == 8                                     # two layers' q_proj, two stacks
    assert plan(CONFIGS["mixtral"], 1, 16, r=4, target_modules=targets, target_parameters=stacks).parts["adapters"] == sum(on_card(4*n) for n in real)
    with pytest.raises(QLoRAError, match="matches nothing"): plan(CONFIGS["llama"], target_modules=r".*\.[67]\..*q_proj")


def test_a_paged_optimizer_keeps_what_is_large_elsewhere():
    "bitsandbytes pages from 100,000 elements on; 8-bit ones keep the scales of their blocks on the card."
    import torch
    from qlora_nb.memory.planner import state_bytes
    small, large = (torch.empty(n, device="meta") for n in (8192, 2**20))
    assert [state_bytes(large, o) for o in ("adamw", "adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit")] == [8*2**20]*2 + [0, 8*2**12]
    assert [state_bytes(small, o) for o in ("adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit")] == [8*8192]*2 + [2*8192 + 8*32]


TEXT = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=64)
TOWER = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
WRAPPERS = dict(gemma3=lambda: Gemma3Config(text_config=TEXT, vision_config=TOWER | dict(image_size=56, patch_size=14, vision_use_head=False), mm_tokens_per_image=4),
                gemma4=lambda: Gemma4Config(text_config=TEXT | dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=512, global_head_dim=32, num_kv_shared_layers=0),
                                            vision_config=TOWER | dict(num_key_value_heads=4, head_dim=32), audio_config=None))

@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_tower_for_pictures_is_counted_as_it_is_loaded(kind, tmp_path):
    "Byte for byte what `load_model` and `add_adapters` hold; an optimizer keeps states for what has a gradient, as a step shows."
    AutoModelForCausalLM.from_config(WRAPPERS[kind]()).save_pretrained(tmp_path)
    model = add_adapters(load_model(tmp_path, device="cpu", dtype=torch.bfloat16), r=4)
    mine, held = list(model.parameters()), list(model.parameters()) + list(model.buffers())
    bytes_of = {"4-bit weights": sum(on_card(p.nbytes) for p in held if p.dtype == torch.uint8), "adapters": sum(on_card(4*p.numel()) for p in mine if p.requires_grad),
                "16-bit weights": sum(on_card(p.nbytes) for p in held if p.dtype != torch.uint8 and not p.requires_grad)}
    ids = torch.randint(3, 400, (1, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    bytes_of["optimizer"] = sum(8*p.numel() for p in mine if p.grad is not None)
    p = plan(tmp_path, 1, 64, r=4)
    assert {k: p.parts[k] for k in bytes_of} == bytes_of
    assert any("vision" in n and q.requires_grad and q.grad is None for n, q in model.named_parameters())


def test_a_model_that_needs_all_its_layers_is_rehearsed_with_them():
    "XLM counts its layers by its config, and looked for one that had been left out; Reformer takes rows of one length."
    p = plan(XLMConfig(vocab_size=512, emb_dim=64, n_layers=2, n_heads=4, causal=True), 1, 64, r=4)
    assert p.parts["4-bit weights"] == 2*(4*64*64 + 2*64*256)//2
    odd = ReformerConfig(is_decoder=True, vocab_size=512, hidden_size=64, attention_head_size=16, num_attention_heads=4, axial_pos_shape=(16, 16), axial_pos_embds_dim=(32, 32), attn_layers=["local", "lsh"])
    with pytest.raises(QLoRAError, match="reformer: .* without weights: its rows have to be of certain lengths[.]"): plan(odd, 1, 64)
