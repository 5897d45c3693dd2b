"""Tiny random models of more than thirty architectures, through the whole way: load, audit, adapters, step, save, load again.

    python nbs/experiments/architectures.py                    # all of them, both backends; prints the matrix
    python nbs/experiments/architectures.py mixtral gpt2       # some of them
    python nbs/experiments/architectures.py --save             # and keep the table in nbs/results/architectures.json

`ZOO` names, for each architecture, the config class of transformers and the fields that make it small. Weights are
random, biases and norms too, and every model builds in milliseconds.
"""
import transformers

BASE = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
DENSE = BASE | dict(intermediate_size=96, num_key_value_heads=2)
MOE = DENSE | dict(num_experts_per_tok=2, head_dim=16)
MAMBA = dict(vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8, conv_kernel=4, pad_token_id=0,
             bos_token_id=1, eos_token_id=2)
MLA = MOE | dict(num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
                 v_head_dim=16, n_routed_experts=4, moe_intermediate_size=32, n_shared_experts=1, n_group=2,
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
    opt=("OPT", BASE | dict(ffn_dim=96, max_position_embeddings=64, word_embed_proj_dim=64)),
    bloom=("Bloom", dict(vocab_size=160, hidden_size=64, n_layer=2, n_head=4)),
    falcon=("Falcon", BASE | dict(alibi=True, bias=True, parallel_attn=False, new_decoder_architecture=False, multi_query=False)),
    falcon_new=("Falcon", BASE | dict(new_decoder_architecture=True, num_kv_heads=2)),
    stablelm=("StableLm", DENSE), smollm3=("SmolLM3", DENSE), olmo2=("Olmo2", DENSE), granite=("Granite", DENSE | dict(logits_scaling=8.)),
    cohere2=("Cohere2", DENSE | dict(head_dim=16)), starcoder2=("Starcoder2", DENSE), glm4=("Glm4", DENSE | dict(head_dim=16)),
    mixtral=("Mixtral", MOE | dict(num_local_experts=4)),
    qwen2_moe=("Qwen2Moe", MOE | dict(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32)),
    qwen3_moe=("Qwen3Moe", MOE | dict(num_experts=4, moe_intermediate_size=32)),
    olmoe=("Olmoe", MOE | dict(num_experts=4)),
    gpt_oss=("GptOss", MOE | dict(num_local_experts=4, sliding_window=16)),
    deepseek_v2=("DeepseekV2", MLA), deepseek_v3=("DeepseekV3", MLA),
    glm4_moe=("Glm4Moe", MOE | dict(n_routed_experts=4, moe_intermediate_size=32, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)),
    granitemoe=("GraniteMoe", DENSE | dict(num_local_experts=4, num_experts_per_tok=2)),
    granitemoeshared=("GraniteMoeShared", DENSE | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)),
    jetmoe=("JetMoe", BASE | dict(num_key_value_heads=2, kv_channels=16, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)),
    phimoe=("Phimoe", DENSE | dict(num_local_experts=4, num_experts_per_tok=2)),
    llama4=("Llama4Text", MOE | dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=96, attention_chunk_size=32)),
    mamba=("Mamba", MAMBA), falcon_mamba=("FalconMamba", MAMBA),
    mamba2=("Mamba2", MAMBA | dict(num_heads=8, head_dim=16, n_groups=1, chunk_size=8)),
    falcon_h1=("FalconH1", DENSE | MAMBA2),
    bamba=("Bamba", DENSE | dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8, attn_layer_indices=[1])),
    jamba=("Jamba", DENSE | dict(num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                                 expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False)),
    nemotron_h=("NemotronH", dict(vocab_size=160, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
                                  hybrid_override_pattern="M*E-", num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=16, n_groups=1,
                                  ssm_state_size=16, chunk_size=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                                  moe_shared_expert_intermediate_size=32, n_shared_experts=1, n_group=1, topk_group=1, pad_token_id=0)),
    qwen3_next=("Qwen3Next", MOE | LINEAR | dict(num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_hidden_layers=4)),
    recurrent_gemma=("RecurrentGemma", DENSE | dict(num_key_value_heads=1, lru_width=64, num_hidden_layers=3, attention_window_size=16)),
    lfm2=("Lfm2", DENSE | dict(num_hidden_layers=3, full_attn_idxs=[1], block_multiple_of=16)))


def config_of(name):
    "The config of one of `ZOO`."
    kind, fields = ZOO[name]
    return getattr(transformers, f"{kind}Config")(**fields)
