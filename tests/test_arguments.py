"What a function of the front door is handed: a value of the wrong kind ends in one sentence, and never in another meaning."
import json, pytest, pyarrow as pa, torch, transformers, warnings
from pathlib import Path
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForSequenceClassification, LlamaModel, MptConfig, TrainerCallback

from common import once, small_base, small_tokenizer
from qlora_nb import (add_adapters, audit_4bit, encode_prompt, evaluate, finetune, generate, load_model, load_rows, load_tokenizer, merge_and_save, plan,
                      quantize, stream)
from qlora_nb.base.errors import QLoRAError
from qlora_nb.evaluation.answer_loss import fit_rows
from qlora_nb.foundations.qlora import load_scratch

ROWS = [dict(prompt=f"Which is {i}?", response=f"Number {i}.") for i in range(12)]


@pytest.fixture(scope="session")
def base(tmp_path_factory, worker_id): return once(tmp_path_factory, worker_id, "arguments", lambda o: small_base(o, 600))


@pytest.fixture(scope="session")
def pair(base): return load_model(base, device="cpu"), load_tokenizer(base)


FINETUNE = {   # what is given → what is said
    "packing is 'false', and has to be True or False": dict(packing="false"), "use_dora is 'no'": dict(use_dora="no"), "fast is 'no'": dict(fast="no"),
    "resume is 'no'": dict(resume="no"), "progress is 'no'": dict(progress="no"), "skip_bad_rows is 'no'": dict(skip_bad_rows="no"), "large is 'no'": dict(large="no"),
    "gradient_checkpointing is 'False'": dict(gradient_checkpointing="False"),
    "target_modules holds no name. Leave it out": dict(target_modules=[]), "target_modules holds no name": dict(target_modules=""),
    "one of target_modules is 3": dict(target_modules=["q_proj", 3]), "target_parameters is 3": dict(target_parameters=3),
    "callbacks is 'x', and has to be TrainerCallbacks": dict(callbacks="x"), "one of callbacks is 3": dict(callbacks=[3]),
    "leave_out is 3, and has to be row numbers": dict(leave_out=3), "output_dir is a NoneType, and has to be a folder": dict(output_dir=None),
    "config_yaml is 3, and has to be names of settings": dict(config_yaml=3), "config_yaml is a dict": dict(config_yaml={3: 4}), "report_to is 3": dict(report_to=3),
    "example is 3, and has to be text": dict(example=3), "there is no adapter here": dict(adapter=""), "a list is no folder of an adapter": dict(adapter=[]),
    "r is 1099511627776, and has to be below": dict(r=2**40), "batch_size is 2147483648": dict(per_device_train_batch_size=2**31),
    "learning_rate is 1e+300, and has to be what a float32": dict(learning_rate=1e300),
    "learning_rate is 20000.0, and has to be from 0 to below 1": dict(learning_rate=2e4)}

@pytest.mark.parametrize("said", FINETUNE)
def test_what_finetune_is_given(said, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QLoRAError) as e: finetune(base, ROWS, **dict(output_dir="run", device="cpu", max_steps=1) | FINETUNE[said])
    assert said in str(e.value) and not [*tmp_path.iterdir()]


class Counted(TrainerCallback):
    steps = 0
    def on_step_end(self, args, state, control, **kw): Counted.steps += 1

def test_one_callback_and_no_rows_left_out(base, tmp_path):
    run = finetune(base, ROWS, tmp_path/"run", callbacks=Counted(), leave_out=None, target_modules={"v_proj", "q_proj"}, device="cpu", max_steps=2, progress=False)
    assert Counted.steps == 2 and run.info["settings"]["target_modules"] == ["q_proj", "v_proj"]


PROMPTS = [("", "the prompt is empty"), (3, "the prompt is 3, and has to be text"), (dict(prompt="Hi"), "the prompt is a dict, and has to be text. encode_prompt"),
           (ROWS[:2], "prompt 1 is a dict"), (["Hi", ""], "prompt 2 is empty"), ({"Hi"}, "the prompt is a set"), (None, "the prompt is a NoneType"), ([[1, 2]], "prompt 1 is a list")]

@pytest.mark.parametrize("prompts, said", PROMPTS)
def test_what_generate_is_given(prompts, said, pair):
    with pytest.raises(QLoRAError) as e: generate(*pair, prompts, 2)
    assert said in str(e.value)
    with pytest.raises(QLoRAError, match="and has to be text|is empty"): next(stream(*pair, prompts, 2))


def test_texts_in_any_sequence(pair):
    text = encode_prompt(ROWS[0], pair[1])
    assert generate(*pair, (o for o in [text, text]), 2) == generate(*pair, [text, text], 2) == [generate(*pair, text, 2)]*2


@pytest.mark.parametrize("of", [lambda m, t: (t, m), lambda m, t: ("smollm2", t), lambda m, t: ((m, t), t), lambda m, t: (m, None)])
@pytest.mark.parametrize("f, last", [(generate, "Hi"), (evaluate, ROWS[:1])])
def test_a_model_and_its_tokenizer(of, f, last, pair):
    with pytest.raises(QLoRAError, match="is no model|is no tokenizer|a loaded model is wanted"): f(*of(*pair), last)


def test_what_evaluate_is_given(pair):
    alpaca = [dict(instruction=o["prompt"], output=o["response"]) for o in ROWS[:2]]
    assert evaluate(*pair, alpaca).answer_loss == evaluate(*pair, ROWS[:2]).answer_loss
    for rows, said in [(ROWS[0], "data of the type dict"), ([dict(prompt="Hi")], "row 1: the field `response` is missing"), (["Hi"], "Hub"),
                       ([dict(messages=[dict(role="user", content="Hi")])], "row 1: `messages` has no assistant turn"), ([dict(prompt="1+1?", response=2)], "must be text, not int"), (None, "NoneType")]:
        with pytest.raises(QLoRAError, match=said): evaluate(*pair, rows)
    for how, said in [(dict(max_length="512"), "max_length is '512'"), (dict(batch_size=0), "batch_size is 0"), (dict(long="shrink"), "drop or cut or error")]:
        with pytest.raises(QLoRAError, match=said): evaluate(*pair, ROWS[:1], **how)


@pytest.mark.parametrize("how", [dict(max_length="512"), dict(max_length=1.5), dict(r="16"), dict(per_device_train_batch_size=0), dict(target_modules=[]), dict(use_dora="no")])
def test_what_plan_is_given(how, base):
    with pytest.raises(QLoRAError, match=f"^{[*how][0]} "): plan(base, **how)


@pytest.mark.parametrize("model", [None, 3, {}])
def test_no_name_of_a_model(model):
    for f in (plan, load_tokenizer, load_model):
        with pytest.raises(QLoRAError, match=f"a {type(model).__name__} is no name of a model"): f(model)


def test_arrays_of_pyarrow():
    assert load_rows(pa.array(ROWS)) == load_rows(pa.chunked_array([ROWS[:5], ROWS[5:]])) == load_rows(ROWS)
    with pytest.raises(QLoRAError, match="an array of string holds no rows"): load_rows(pa.array(["Hi"]))


def test_a_plan_longer_than_the_positions():
    from transformers import MptConfig, OpenAIGPTConfig
    for config in (OpenAIGPTConfig(n_positions=64, n_embd=64, n_layer=2, n_head=4), MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64)):
        with pytest.raises(QLoRAError, match="It has 64 positions: set max_length=64."): plan(config, max_length=128)
        assert plan(config, max_length=64).peak > 0


def test_what_the_others_are_given(pair, tmp_path):
    from qlora_nb import make_fast, merge_and_save
    for f, said in [(lambda: make_fast("smollm2"), "a loaded model is wanted"), (lambda: make_fast(pair), "a tuple is no model"),
                    (lambda: merge_and_save(None, tmp_path/"m"), "a NoneType is no folder of an adapter"), (lambda: merge_and_save(pair[0], tmp_path/"m"), "is no folder of an adapter"),
                    (lambda: encode_prompt("Hi", pair[1]), "this str is no row with a question"), (lambda: encode_prompt(dict(messages=[]), pair[1]), "this dict is no row"),
                    (lambda: encode_prompt(ROWS[0], None), "a NoneType is no tokenizer")]:
        with pytest.raises(QLoRAError, match=said): f()


@pytest.mark.parametrize("dtype, kind", [("float32", torch.float32), ("torch.bfloat16", torch.bfloat16)])
def test_a_number_format_by_name(dtype, kind, base):
    model = load_model(base, device="cpu", dtype=dtype)
    assert model.get_input_embeddings().weight.dtype == kind and plan(base, dtype=dtype).peak == plan(base, dtype=kind).peak


@pytest.mark.parametrize("call", [load_model, load_scratch, plan])
@pytest.mark.parametrize("dtype", ["nosuch", "int8", 16])
def test_a_number_format_that_is_none(call, dtype, base):
    with pytest.raises(QLoRAError, match="is no format for weights. Choose float32"): call(base, dtype=dtype)


def test_rows_of_an_evaluation_may_be_a_table(pair):
    import pandas as pd
    rows, tokenizer = ROWS[:2], pair[1]
    fitted = [fit_rows(o, tokenizer) for o in (rows, pd.DataFrame(rows), pa.Table.from_pylist(rows))]
    assert all([*map(dict, o)] == rows for o in fitted)


NO_MODEL = dict(audit=audit_4bit, adapters=lambda o: add_adapters(o, 4), quantize=quantize)

@pytest.mark.parametrize("f", NO_MODEL)
def test_what_is_no_model(f):
    for o in (3, None, "smollm2", {}):
        with pytest.raises(QLoRAError, match="is no model|is no tensor|a loaded model is wanted"): NO_MODEL[f](o)


def test_a_rank_above_the_layers(base, tmp_path):
    with pytest.raises(QLoRAError, match="Set r=64 or less"): add_adapters(load_model(base, device="cpu"), 2**40)
    with pytest.raises(QLoRAError, match="r is 0, and has to be a whole number"): add_adapters(load_scratch(base, device="cpu"), 0)
    with pytest.warns(UserWarning, match="r=40 is above the smaller side of 4 of 14 layers"): add_adapters(load_model(base, device="cpu"), 40)


@pytest.mark.parametrize("out", [None, 3, ["a"]])
def test_where_a_model_is_merged_to(out):
    with pytest.raises(QLoRAError, match="out is .* and has to be a folder"): merge_and_save("run", out)


def test_positions_that_no_config_names(tmp_path):
    "MPT has no tables of positions: its bias reaches as far as `max_seq_len`, and fails beyond."
    tok = small_tokenizer(600)
    sizes = dict(vocab_size=len(tok), d_model=64, n_heads=4, n_layers=1, expansion_ratio=1)
    AutoModelForCausalLM.from_config(MptConfig(**sizes, max_seq_len=40)).save_pretrained(tmp_path/"mpt"), tok.save_pretrained(tmp_path/"mpt")
    long = dict(prompt="Which are these? "*9, response="Numbers.")
    with pytest.raises(QLoRAError, match=r"row 3: the example has \d+ tokens, and the model can take 40\. Set max_length=40"):
        finetune(tmp_path/"mpt", [*ROWS[:2], long], tmp_path/"run", device="cpu", max_steps=1, progress=False)


def test_ctrl_c_while_a_trained_model_is_scored(base, tmp_path, monkeypatch):
    "The adapter is there, and the message says where, and how to go on."
    from qlora_nb.evaluation import evaluation
    def interrupted(*a, **kw): raise KeyboardInterrupt
    how = dict(model=base, data=ROWS, output_dir=tmp_path/"run", eval_rows=2, max_steps=1, device="cpu", progress=False)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt, match=r"The adapter is saved in .*run: use it, or score it with --resume"):
        m.setattr(evaluation, "evaluate", interrupted)
        evaluation.finetune_and_evaluate(**how)
    assert (tmp_path/"run"/"adapter"/"adapter_config.json").exists()
    assert evaluation.finetune_and_evaluate(**how, resume=True).after is not None


def test_a_user_who_is_not_here(base):
    for f in (lambda o: load_rows(o + "/a.jsonl"), lambda o: finetune(base, ROWS, o), lambda o: merge_and_save("run", o)):
        with pytest.raises(QLoRAError, match="this user has no home"): f("~nobody-of-this-name")


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head(kind, tmp_path):
    "The head of a reward model, or of one for embeddings, would be random, and nothing would say so."
    kind(LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(QLoRAError, match=f"no output head: it was saved as {kind.__name__}, and is no causal"): load_model(tmp_path, device="cpu")


SMALL = dict(vocab_size=160, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
             decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=32, max_target_positions=32, pad_token_id=0)
BERT = dict(vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)

@pytest.mark.parametrize("kind, fields, says", [
    ("Bart", SMALL, r"it is an encoder-decoder \(bart\)"), ("Whisper", SMALL, r"it is an encoder-decoder \(whisper\)"), ("T5", {}, "it is an encoder-decoder"),
    ("MPNet", BERT, r"transformers has no causal language model \(mpnet\)"), ("ViT", {}, "transformers has no causal language model"),
    ("Bert", BERT, "its tokens see those behind them"), ("Electra", BERT | dict(embedding_size=64), "its tokens see those behind them")])
def test_what_is_no_causal_language_model(kind, fields, says, tmp_path):
    "An encoder-decoder would be loaded as its decoder alone, and a BERT would learn to copy what it is shown."
    config = getattr(transformers, f"{kind}Config")(**fields)
    if "see" not in says: config.save_pretrained(tmp_path)
    else: AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for bits in (4, None):
        with pytest.raises(QLoRAError, match=says): load_model(tmp_path, bits, device="cpu")
    if "see" in says: return
    for f in (lambda: plan(config), lambda: plan(str(tmp_path)), lambda: finetune(str(tmp_path), ROWS, tmp_path/"run")):
        with pytest.raises(QLoRAError, match=says): f()


def test_a_model_that_sees_the_answer_is_not_trained(tmp_path):
    model = AutoModelForCausalLM.from_config(BertConfig(**BERT | dict(vocab_size=len(small_tokenizer(600)), max_position_embeddings=512)))
    model.qlora_nb_name = "someone/bert"
    with pytest.raises(QLoRAError, match="its tokens see those behind them"):
        finetune(model, ROWS, tmp_path/"run", tokenizer=small_tokenizer(600), max_steps=1, device="cpu", progress=False)


def test_a_decoder_alone_is_loaded(tmp_path):
    model = AutoModelForCausalLM.from_config(transformers.BartConfig(**SMALL, is_decoder=True))
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path, device="cpu")).__name__ == "BartForCausalLM"


def without(*names):
    def change(folder):
        held = load_file(folder/"model.safetensors")
        save_file({k: v for k, v in held.items() if k not in names}, folder/"model.safetensors", metadata=dict(format="pt"))
    return change

def says(**fields):
    def change(folder):
        config = json.loads((folder/"config.json").read_text(encoding="utf-8"))
        (folder/"config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return change

def beside(folder):
    LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(folder)).save_pretrained(folder)
    model = get_peft_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)), LoraConfig(r=2, target_modules=["q_proj"]))
    save_file(get_peft_model_state_dict(model), folder/"adapter_model.safetensors", metadata=dict(format="pt"))

@pytest.mark.parametrize("change, message", [
    (without("model.layers.0.input_layernorm.weight"), "lack 1 weights, such as model.layers.0.input_layernorm.weight, which would be random"),
    (without("model.embed_tokens.weight"), "lack 1 weights"), (says(num_hidden_layers=2), "lack 9 weights"), (says(attention_bias=True), "lack 4 weights"),
    (says(vocab_size=640), "Its config.json is not that of its weights"), (says(hidden_act="none"), "cannot be loaded .KeyError"),
    (says(quantization_config=dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")), "config.json says 4 bits"), (beside, "an adapter lies in its folder")])
@pytest.mark.parametrize("bits", [4, None])
def test_a_folder_that_is_not_whole(change, message, bits, tmp_path):
    "What transformers would fill with random numbers, or an adapter that it would add, is no base."
    AutoModelForCausalLM.from_config(LlamaConfig(**BERT | dict(num_key_value_heads=2))).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(QLoRAError, match=message): load_model(tmp_path, bits, device="cpu")


@pytest.mark.parametrize("bits", [4, None])
def test_layers_that_a_config_leaves_out_are_said(bits, tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**BERT | dict(num_key_value_heads=2, num_hidden_layers=2))).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no place for")
        load_model(tmp_path, bits, device="cpu")
    says(num_hidden_layers=1)(tmp_path)
    with pytest.warns(UserWarning, match="hold 9 tensors that its config.json has no place for, such as model.layers.1."): load_model(tmp_path, bits, device="cpu")
