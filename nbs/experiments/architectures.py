"""Tiny random models of more than a hundred architectures, through the whole way: load, audit, adapters, step, save, load again;
and through `finetune` as a user calls it: rows to adapter, loaded again, scored, merged.

    python nbs/experiments/architectures.py                    # all of them, both backends; prints the matrix
    python nbs/experiments/architectures.py mixtral gpt2       # some of them
    python nbs/experiments/architectures.py --finetune         # the second way instead of the first
    python nbs/experiments/architectures.py --save             # and keep these rows in nbs/results/architectures.json

`ZOO` names, for each architecture, the config class of transformers and the fields that make it small. Weights are
random, biases and norms too, and every model builds in milliseconds.
"""
import json, sys, tempfile, time, warnings
from functools import cache
from pathlib import Path

import torch, transformers
from bitsandbytes.functional import dequantize_4bit
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_nb.foundations.adapters import BACKENDS, adapted_layers, adapter_coverage, add_adapters, attach_adapter, save_adapter
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.core import Table, set_seed, versions
from qlora_nb.base.model_files import load_tokenizer
from qlora_nb.base.nf4_config import quiet
from qlora_nb.base.targets import note_idle
from qlora_nb.evaluation.evaluation import evaluate
from qlora_nb.foundations.loading import audit_4bit
from qlora_nb.foundations.expert_weights import dequantize_stacks
from qlora_nb.training.finetune import finetune
from qlora_nb.training.saved_adapters import load_adapter
from qlora_nb.training.tickets import make_tickets
from qlora_nb.using.merge import merge_and_save

BASE = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
DENSE = BASE | dict(intermediate_size=128, num_key_value_heads=2)
MOE = DENSE | dict(num_experts_per_tok=2, head_dim=16)
MAMBA = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8, conv_kernel=4, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)
MLA = MOE | dict(num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=8, qk_nope_head_dim=16,
                 v_head_dim=16, n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1, n_group=2,
                 topk_group=1, first_k_dense_replace=1, num_hidden_layers=3)
del MLA["head_dim"]
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
MAMBA2 = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8)

ZOO = dict(   # name → (class of the config, its fields)
    llama=("Llama", DENSE | dict(attention_bias=True)), llama_tied=("Llama", DENSE | dict(tie_word_embeddings=True)),
    mistral=("Mistral", DENSE | dict(sliding_window=16)), qwen2=("Qwen2", DENSE), qwen3=("Qwen3", DENSE | dict(head_dim=32)),
    gemma=("Gemma", DENSE | dict(head_dim=16)), gemma2=("Gemma2", DENSE | dict(head_dim=16, sliding_window=16)),
    gemma3=("Gemma3Text", DENSE | dict(head_dim=16, sliding_window=16)), phi3=("Phi3", DENSE), phi=("Phi", DENSE),
    gpt_neox=("GPTNeoX", DENSE), gptj=("GPTJ", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)),
    gpt2=("GPT2", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
    gpt_bigcode=("GPTBigCode", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
    opt=("OPT", BASE | dict(ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64)),
    bloom=("Bloom", dict(vocab_size=160, hidden_size=64, n_layer=2, n_head=4)),
    falcon=("Falcon", BASE | dict(alibi=True, bias=True, parallel_attn=False, new_decoder_architecture=False, multi_query=False)),
    falcon_new=("Falcon", BASE | dict(new_decoder_architecture=True, num_kv_heads=2)),
    stablelm=("StableLm", DENSE), smollm3=("SmolLM3", DENSE), olmo2=("Olmo2", DENSE), granite=("Granite", DENSE | dict(logits_scaling=8.)),
    cohere2=("Cohere2", DENSE | dict(head_dim=16)), starcoder2=("Starcoder2", DENSE), glm4=("Glm4", DENSE | dict(head_dim=16)),
    mixtral=("Mixtral", MOE | dict(num_local_experts=4)),
    qwen2_moe=("Qwen2Moe", MOE | dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)),
    qwen3_moe=("Qwen3Moe", MOE | dict(num_experts=4, moe_intermediate_size=64)),
    olmoe=("Olmoe", MOE | dict(num_experts=4)),
    gpt_oss=("GptOss", MOE | dict(num_local_experts=4, sliding_window=16)),
    deepseek_v2=("DeepseekV2", MLA), deepseek_v3=("DeepseekV3", MLA),
    glm4_moe=("Glm4Moe", MOE | dict(n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)),
    granitemoe=("GraniteMoe", DENSE | dict(num_local_experts=4, num_experts_per_tok=2)),
    granitemoeshared=("GraniteMoeShared", DENSE | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64)),
    jetmoe=("JetMoe", BASE | dict(num_key_value_heads=2, kv_channels=16, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)),
    phimoe=("Phimoe", DENSE | dict(num_local_experts=4, num_experts_per_tok=2)),
    llama4=("Llama4Text", MOE | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128, attention_chunk_size=32)),
    mamba=("Mamba", MAMBA), falcon_mamba=("FalconMamba", MAMBA),
    mamba2=("Mamba2", MAMBA | dict(num_heads=8, head_dim=16, n_groups=1, chunk_size=8)),
    falcon_h1=("FalconH1", DENSE | MAMBA2),
    bamba=("Bamba", DENSE | dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, attn_layer_indices=[1])),
    jamba=("Jamba", DENSE | dict(num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                                 expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False)),
    nemotron_h=("NemotronH", dict(vocab_size=160, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128,
                                  hybrid_override_pattern="M*E-", num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=16, n_groups=1,
                                  ssm_state_size=16, chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                                  moe_shared_expert_intermediate_size=64, n_shared_experts=1, n_group=1, topk_group=1, pad_token_id=0)),
    qwen3_next=("Qwen3Next", MOE | LINEAR | dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_hidden_layers=4)),
    recurrent_gemma=("RecurrentGemma", DENSE | dict(num_key_value_heads=1, lru_width=64, num_hidden_layers=3, attention_window_size=16)),
    lfm2=("Lfm2", DENSE | dict(num_hidden_layers=3, full_attn_idxs=[1], block_multiple_of=64)),
    apertus=("Apertus", DENSE),
    arcee=("Arcee", DENSE),
    cohere=("Cohere", DENSE),
    codegen=("CodeGen", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)),
    cwm=("Cwm", DENSE | dict(head_dim=16, sliding_window=16)),
    diffllama=("DiffLlama", DENSE),
    ernie4_5=("Ernie4_5", DENSE | dict(head_dim=16)),
    exaone4=("Exaone4", DENSE | dict(sliding_window=16)),
    glm=("Glm", DENSE | dict(head_dim=16)),
    gpt_neo=("GPTNeo", dict(vocab_size=160, max_position_embeddings=64, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global",
        "local"], 1]], window_size=16)),
    gpt_neox_japanese=("GPTNeoXJapanese", dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_multiple_size=2)),
    helium=("Helium", DENSE | dict(head_dim=16)),
    hunyuan=("HunYuanDenseV1", DENSE | dict(head_dim=16)),
    seed_oss=("SeedOss", DENSE | dict(head_dim=16)),
    ministral=("Ministral", DENSE | dict(head_dim=16, sliding_window=16)),
    ministral3=("Ministral3", DENSE | dict(head_dim=16)),
    modernbert=("ModernBertDecoder", DENSE | dict(global_attn_every_n_layers=2, local_attention=16)),
    nanochat=("NanoChat", DENSE),
    nemotron=("Nemotron", DENSE | dict(head_dim=16)),
    olmo=("Olmo", DENSE),
    olmo3=("Olmo3", DENSE | dict(sliding_window=16)),
    persimmon=("Persimmon", DENSE),
    vaultgemma=("VaultGemma", DENSE | dict(head_dim=16, sliding_window=16)),
    hyperclovax=("HyperCLOVAX", DENSE),
    jais2=("Jais2", DENSE),
    biogpt=("BioGpt", BASE | dict(intermediate_size=128, max_position_embeddings=64)),
    openai_gpt=("OpenAIGPT", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
    ctrl=("CTRL", dict(vocab_size=160, n_positions=64, n_embd=64, n_layer=2, n_head=4, dff=128)),
    bitnet=("BitNet", DENSE),
    gemma3n=("Gemma3nText", DENSE | dict(head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0, hidden_size_per_layer_input=16, vocab_size_per_layer_input=1000, laurel_rank=8, activation_sparsity_pattern=[0.0,
        0.0], altup_num_inputs=2)),
    gemma4=("Gemma4Text", DENSE | dict(head_dim=16, global_head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=1000, num_kv_shared_layers=0)),
    granite_swa=("GraniteSWA", DENSE | dict(sliding_window=16, layer_types=["full_attention", "sliding_attention"], layer_rope_theta=[10000.0,
        10000.0])),
    internlm3=("InternLM3", DENSE | dict(head_dim=16)),
    doge=("Doge", DENSE),
    kolibri1=("Kolibri1", DENSE),
    iquestcoder=("IQuestCoder", DENSE | dict(head_dim=16)),
    xglm=("XGLM", dict(vocab_size=160, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4)),
    youtu=("Youtu", MLA),
    afmoe=("Afmoe", MOE | dict(num_experts=4, moe_intermediate_size=64, num_shared_experts=1, num_dense_layers=1, sliding_window=16)),
    dots1=("Dots1", MOE | dict(n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)),
    ernie4_5_moe=("Ernie4_5_Moe", DENSE | dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1,
        moe_layer_start_index=1)),
    flex_olmo=("FlexOlmo", MOE | dict(num_experts=4)),
    glm4_moe_lite=("Glm4MoeLite", MLA),
    lfm2_moe=("Lfm2Moe", DENSE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, num_dense_layers=1, layer_types=["conv",
        "full_attention"])),
    longcat=("LongcatFlash", {k: v for k, v in MLA.items() if k != "num_hidden_layers"} | dict(num_layers=2, num_hidden_layers=4,
        ffn_hidden_size=128, expert_ffn_hidden_size=64, zero_expert_num=2, moe_topk=2, head_dim=8)),
    mimo=("MiMoV2Flash", MOE | dict(n_routed_experts=4, moe_intermediate_size=64)),
    minimax=("MiniMax", MOE | dict(num_local_experts=4, block_size=16, layer_types=["linear_attention", "full_attention"])),
    minimax_m2=("MiniMaxM2", MOE | dict(num_local_experts=4)),
    minimax_m3=("MiniMaxM3VLText", MOE | dict(num_local_experts=4, dense_intermediate_size=64, shared_intermediate_size=64, rotary_dim=8,
        mlp_layer_types=["dense", "sparse"], index_n_heads=2, index_head_dim=16, index_block_size=8, index_topk_blocks=2,
        layer_types=["full_attention"] * 2)),
    solar_open=("SolarOpen", MOE | dict(n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1, first_k_dense_replace=1)),
    exaone_moe=("ExaoneMoe", MOE | dict(num_experts=4, moe_intermediate_size=64, num_shared_experts=1, first_k_dense_replace=1, sliding_window=16)),
    hy_v3=("HYV3", MOE | dict(num_experts=4, moe_intermediate_size=64)),
    cohere2_moe=("Cohere2Moe", MOE | dict(num_experts=4, moe_intermediate_size=64)),
    deepseek_v32=("DeepseekV32", MLA),
    glm_moe_dsa=("GlmMoeDsa", MLA | dict(mlp_layer_types=["dense", "sparse"], num_hidden_layers=2) | dict(n_group=1, index_topk=8,
        index_head_dim=16, index_n_heads=2)),
    laguna=("Laguna", MOE | dict(num_experts=4, moe_intermediate_size=64)),
    mellum=("Mellum", MOE | dict(num_experts=4, moe_intermediate_size=64)),
    aria_text=("AriaText", DENSE | dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)),
    axk1=("AXK1", MLA | dict(mlp_layer_types=["dense", "sparse"], num_hidden_layers=2) | dict(num_hidden_layers=2)),
    flint=("Flint", MOE | dict(num_hidden_layers=3, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4,
        mlp_only_layers=[0], sliding_window=17, layer_types=["full_attention", "sliding_attention", "full_attention"], output_router_logits=True)),
    granitemoe_swa=("GraniteMoeSWA", DENSE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=16, output_router_logits=True,
        layer_types=["full_attention", "sliding_attention"], layer_rope_theta=[10000.0, 10000.0])),
    hunyuan_moe=("HunYuanMoEV1", MOE | dict(num_experts=4, moe_topk=2)),
    gemma4_moe=("Gemma4Text", DENSE | dict(head_dim=16, global_head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64,
        expert_intermediate_size=64)),
    inkling_text=("InklingText", MOE | dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, sliding_window_size=16, d_rel=4,
        rel_extent=32, layer_types=["hybrid_sliding", "hybrid"], mlp_layer_types=["dense", "sparse"], conv_kernel_size=2, moe_intermediate_size=64,
        n_routed_experts=4, n_shared_experts=1, logits_mup_width_multiplier=2.0)),
    granitemoehybrid=("GraniteMoeHybrid", DENSE | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64,
        layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8)),
    olmo_hybrid=("OlmoHybrid", DENSE | LINEAR | dict(layer_types=["linear_attention", "full_attention"])),
    qwen3_5=("Qwen3_5Text", DENSE | LINEAR | dict(head_dim=16, layer_types=["linear_attention", "full_attention"])),
    qwen3_5_moe=("Qwen3_5MoeText", MOE | LINEAR | dict(num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"])),
    zamba2=("Zamba2", DENSE | dict(num_key_value_heads=4, mamba_d_state=16, n_mamba_heads=8, mamba_headdim=16, mamba_ngroups=1, chunk_size=8,
        num_hidden_layers=3, hybrid_layer_ids=[1], layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1)),
    bailing_hybrid=("BailingHybrid", DENSE | dict(moe_intermediate_size=64, num_shared_experts=1, kv_lora_rank=32, qk_rope_head_dim=8,
        v_head_dim=16, qk_nope_head_dim=16, num_expert_group=2, topk_group=1, num_experts_per_token=2, num_experts=4, first_k_dense_replace=1,
        layer_group_size=2, linear_head_dim=16, linear_num_heads=4, num_key_value_heads=4, model_max_length=512)))


def config_of(name):
    "The config of one of `ZOO`."
    kind, fields = ZOO[name]
    return getattr(transformers, f"{kind}Config")(**fields)


# ---- the way through ----

IDS = torch.randint(3, 160, (2, 10), generator=torch.Generator().manual_seed(0))
COLUMNS = "model backend four_bit wide skipped adapted covered logits cosine adapters_without_gradient reload refused".split()


def build(name, folder, config=None, dtype=torch.float32):
    "Save a random model of this architecture, none of whose biases and norms is zero or one; returns the folder."
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config or config_of(name), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.add_(torch.randn_like(p)*.02)
    with quiet(): model.to(dtype).save_pretrained(folder)
    return folder


def written_out(model, folder):
    "The float model of transformers with the weights of a 4-bit model."
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    mods, stacks = dict(twin.named_modules()), {}
    for n, m in model.named_modules():
        if hasattr(m, "parametrizations"): stacks |= {f"{n}.{k}": getattr(m, k).detach() for k in m.parametrizations}
        if n not in mods or not hasattr(mods[n], "weight") or ".parametrizations" in n: continue
        state = getattr(getattr(m, "weight", None), "quant_state", None)
        W = dequantize_4bit(m.weight.data, state) if state else m.dequantize() if hasattr(m, "packed_numel") else None
        if W is not None: mods[n].weight.data = (W.T if isinstance(mods[n], Conv1D) else W).float().contiguous()
    for n, W in stacks.items(): twin.get_parameter(n).data = W.float().clone()
    return twin


def gradients(model):
    "Logits, and the gradient of every adapter."
    set_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p.data, std=.1)
        if "lora_A" in n: torch.nn.init.normal_(p.data, std=.1)
    out = model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n.replace("base_model.model.", ""): p.grad for n, p in model.named_parameters() if "lora_" in n}


def check(name, backend="bnb", folder=None):
    "One architecture through one backend: facts, or the sentence with which it was refused."
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings(action="ignore"), quiet():
        folder, facts = folder or build(name, f"{tmp}/model"), dict(model=name, backend=backend)
        load = lambda: BACKENDS[backend](folder, device="cpu", dtype=torch.float32)
        try: model = load()
        except QLoRAError as e: return facts | dict(refused=e.what)
        audit = audit_4bit(model)
        share = {r[0]: r[4] for r in audit.table.rows}
        facts |= dict(four_bit=len(audit.four_bit), wide=share.get("unquantized", 0.), skipped=len(audit.skipped))
        twin = written_out(model, folder)
        note_idle(model)   # as `finetune` does
        model = add_adapters(model, r=4, lora_alpha=8, lora_dropout=0.)
        names = adapted_layers(model)
        twin = add_adapters(twin, r=4, lora_alpha=8, target_modules=names)
        facts |= dict(adapted=len(names), covered=adapter_coverage(model).rows[-1][3])
        (y, g), (y_twin, g_twin) = gradients(model), gradients(twin)
        facts |= dict(logits=((y - y_twin).norm()/y_twin.norm()).item(), adapters_without_gradient=sum(not o.any() for o in g.values()),
                      cosine=min(cosine_similarity(g[n].flatten(), g_twin[n].flatten(), 0).item() for n in g_twin))
        with torch.no_grad(): y = model.eval()(input_ids=IDS).logits
        saved = save_adapter(model, f"{tmp}/adapter", str(folder))
        again = BACKENDS["bnb"](folder, device="cpu", dtype=torch.float32)
        again = attach_adapter(again, saved).eval()
        with torch.no_grad(): facts["reload"] = ((again(input_ids=IDS).logits - y).norm()/y.norm()).item()
        return facts


def right(facts):
    "Is everything as it should be, or refused in one sentence?"
    if "refused" in facts: return True
    return (facts["wide"] < .02 and facts["logits"] < 1e-5 and facts["cosine"] > .99999 and facts["reload"] < 1e-5
            and not facts["adapters_without_gradient"] and facts["adapted"] > 0)


# ---- as a user goes ----

RUN_COLUMNS = "model loss reload answer_loss merged said refused".split()


@cache
def small_vocabulary():
    "SmolLM2's tokenizer, its rules and its template, with a thousand entries learnt from the tickets."
    return load_tokenizer().train_new_from_iterator([str(row) for row in make_tickets("train")], 1000, show_progress=False)


def run_base(name, folder):
    "The model of `build` with that vocabulary and room for 512 positions, its tokenizer beside it."
    tok, (kind, fields) = small_vocabulary(), ZOO[name]
    place = "n_positions" if "n_positions" in fields else "max_position_embeddings"
    config = getattr(transformers, f"{kind}Config")(**fields | {"vocab_size": len(tok), place: 512})
    build(name, folder, config, torch.bfloat16), tok.save_pretrained(folder)   # as most are, so that what stays wide is exact
    return folder


def logits(model):
    with torch.no_grad(): return model.eval()(input_ids=IDS + 100).logits.float()


def apart(a, b): return ((a - b).norm()/b.norm()).item()


def whole_run(name, **how):   # Of `finetune`
    "Rows to adapter, load it again, score it, merge it: facts, or the sentence with which it was refused."
    facts, rows = dict(model=name), make_tickets("train")[:8]
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings(action="ignore"), quiet():
        base = run_base(name, f"{tmp}/base")
        try:
            run = finetune(base, rows, f"{tmp}/run", **dict(max_steps=3, device="cpu", progress=False, per_device_train_batch_size=2, max_length=256) | how)
            facts |= dict(loss=run.info["losses"][-1], said=run.info["said"][-1])
            facts["reload"] = apart(logits(load_adapter(run.folder).model), logits(run.model))
            facts["answer_loss"] = evaluate(run.model, run.tokenizer, rows[:2], max_length=256).answer_loss
            merge_and_save(run, f"{tmp}/merged", dtype="float32")
            merged = AutoModelForCausalLM.from_pretrained(f"{tmp}/merged", dtype=torch.float32)
            twin = attach_adapter(written_out(BACKENDS["bnb"](base, device="cpu"), base), run.folder/"adapter")   # by PEFT, nothing merged
            facts["merged"] = apart(logits(merged), logits(twin))
        except QLoRAError as e: facts["refused"] = str(e)
    return facts


def right_run(facts):
    "Trained, scored, and the same again after loading and after merging?"
    return "refused" not in facts and facts["loss"] < 10 and facts["answer_loss"] < 10 and facts["reload"] == 0 and facts["merged"] < 1e-5


def main(args):
    names, start = [o for o in args if o in ZOO] or list(ZOO), time.process_time()
    runs = "--finetune" in args
    kind, columns, well = ("runs", RUN_COLUMNS, right_run) if runs else ("rows", COLUMNS, right)
    rows = [whole_run(n) for n in names] if runs else [check(n, b) for n in names for b in BACKENDS]
    print(Table([["" if well(r) else "WRONG", *(r.get(c, "") for c in columns)] for r in rows], ["", *columns], ".6g"))
    print(f"{len(rows)} ways, {sum(map(well, rows))} right, {time.process_time() - start:.0f} CPU seconds")
    if "--save" in args:
        hardware = dict(cpu=versions()["cpu"], cores=versions()["cores"])
        path = Path(__file__).parent.parent/"results"/"architectures.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        mine, order = {r["model"] for r in rows}, list(ZOO)
        others = [r for r in found.get(kind, ()) if r["model"] in ZOO and r["model"] not in mine]
        found |= dict(hardware=hardware, versions=versions()) | {kind: sorted(others + rows, key=lambda r: order.index(r["model"]))}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1:])
