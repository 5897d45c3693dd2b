"""QLoRA explained and built, in notebooks that are also the library: `from qlora_nb import finetune, load_model, generate`.

`import qlora_nb` alone loads nothing and changes nothing in the process: a name loads its module when it is first asked for."""
__version__ = "0.1.0"

# What a user calls, and the module that defines it.
FRONT = dict(finetune="training.finetune", finetune_and_evaluate="evaluation.evaluation", evaluate="evaluation.evaluation",
             load_model="foundations.loading", load_tokenizer="base.model_files", audit_4bit="foundations.loading",
             add_adapters="foundations.adapters", quantize="foundations.double_quantization", quantize_model="apps.quantize", load_adapter="training.saved_adapters",
             encode_prompt="training.data", generate="using.inference", stream="using.inference", chat="apps.chat",
             merge_and_save="using.merge",
             plan="memory.planner", make_fast="speed.fast_training", load_rows="training.data", QLoRAError="base.errors")
# What loads a model, and may be asked for one in 4 bits of another kind: part 6 puts these into the table of foundations.loading.
LOADING = "finetune", "finetune_and_evaluate", "load_model", "load_adapter", "merge_and_save", "chat"
__all__ = [*FRONT]


def __getattr__(name):
    if name not in FRONT: raise AttributeError(f"module 'qlora_nb' has no attribute {name!r}; it has {', '.join(FRONT)}.")
    from importlib import import_module
    if name in LOADING: import_module("qlora_nb.beyond.scale_search")
    globals()[name] = value = getattr(import_module(f"qlora_nb.{FRONT[name]}"), name)
    return value


def __dir__(): return sorted([*globals(), *FRONT])
