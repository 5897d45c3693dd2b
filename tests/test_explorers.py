"Explorers: each figure over a grid of its settings with the extremes, each control as a reader moves it, and errors that are said."
import base64, re

import matplotlib.pyplot as plt, nbformat, pytest, torch
from nbformat.v4 import new_code_cell, new_notebook

from common import NBS, ROOT, code_cells, read
from forks import Kernels
from qlora_nb.base.diagrams import crowded
from qlora_nb.base.errors import QLoRAError
from qlora_nb.base.explorer import VIEW, Explorer, NotDrawn, choice, explore, number, picture, textbox, toggle
from run_notebook import run


# ---- the six: the function that draws, and values of each argument, the first ones those at the start ----

def quantized():
    from qlora_nb.foundations.nf4 import SIZES, draw_quantized
    return draw_quantized, dict(bits=[4, 2, 8], codebook=["NF", "Int", "FP"], block_size=[64, SIZES[0], SIZES[-1]], outliers=[0, 1, 100])


def lora():
    from qlora_nb.foundations.lora import TARGETS, draw_lora
    rng = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
    updates = {f"layers.0.{k}.weight": torch.randn(*s, generator=rng) for k, s in shapes.items()}
    return lambda **how: draw_lora(updates, **how), dict(r=[8, 1, 32], lora_alpha=[16, 1, 256], target=[*TARGETS][::-1])


def memory():
    from transformers import LlamaConfig
    from qlora_nb.memory.gpus import draw_memory
    llama = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    def draw(length, **how): return draw_memory(llama, max_length=length, **how)
    return draw, dict(length=[1024, 256, 16384], method=["qlora", "lora", "full"], per_device_train_batch_size=[4, 1, 32], r=[16, 4, 128],
                      gradient_checkpointing=[True, False], optim=["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"], loss=["chunked", "full"])


def batch():
    from qlora_nb.base.model_files import load_tokenizer
    from qlora_nb.training.data import encode_rows
    from qlora_nb.training.packing import draw_batch, read_lines
    tok = load_tokenizer()
    def draw(rows, **how): return draw_batch(encode_rows(read_lines(rows), tok), tok, **how)
    few = "Why? => Because of the light.\n2 + 2? => 4"
    return draw, dict(rows=[few, "a => b", f"你好 $x$ 😀 => 很高兴 $y$\n{few}\n" + "word "*60 + "=> yes"], packed=[False, True],
                      loss=["answers", "all"], max_length=[256, 128, 512])


def sampling():
    from qlora_nb.using.sampling import draw_sampling
    torch.manual_seed(0)
    logits = {k: torch.randn(1, n)*3 for k, n in dict(many=5000, few=4).items()}
    def named(ids): return [f"'$tok${i}'" for i in ids]
    def draw(prompt, **how): return draw_sampling(logits[prompt], named, **how)
    return draw, dict(prompt=["many", "few"], temperature=[1., 0., 3.], top_k=[0, 1, 50], top_p=[.9, 0., 1.], min_p=[0., .5, 1.])


def sides():
    from qlora_nb.using.several_adapters import draw_sides
    def answer(n, s): return dict(tokens=[f" {s}$"]*n, probs=dict(base=[.5]*n, json=[1/(k + 1) for k in range(n)]))
    def draw(tokens, word): return draw_sides(dict(base=answer(tokens, word), json=answer(max(1, tokens//2), word)))
    return draw, dict(tokens=[9, 1, 16], word=["city", "\n", "<|im_end|>"])


SIX = [quantized, lora, memory, batch, sampling, sides]
each = pytest.mark.parametrize("make", SIX, ids=lambda o: o.__name__)


def grid(options):
    "The first values; all of them with one changed; all at their first extreme, all at their second."
    first = {k: v[0] for k, v in options.items()}
    yield first
    for k, values in options.items(): yield from (first | {k: o} for o in values[1:])
    for i in (1, -1): yield {k: v[i] for k, v in options.items()}


@each
def test_each_setting_draws_and_no_label_covers_another(make):
    "One test, for workers share no figures, and some take long to draw."
    draw, options = make()
    drawn = [(values, draw(**values)) for values in grid(options)]
    figures = [f for _, f in drawn]
    assert not plt.get_fignums()
    assert all(f.get_label().strip().endswith(".") and f.get_size_inches()[0] <= 5 for f in figures)
    smallest = min(t.get_size() for f in figures for ax in f.axes for t in [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()])
    assert smallest >= 8, smallest   # on a phone, 460 pixels of a figure become about 360
    bad = {str(values): found for values, f in drawn if (found := crowded(f))}
    assert not bad, bad


@each
def test_each_control_changes_the_figure_and_its_words(make):
    draw, options = make()
    e = Explorer(draw, "", **{k: toggle(k, v[0]) if isinstance(v[0], bool) else choice(k, *v) for k, v in options.items()})
    start = e.first
    for k, values in options.items():
        before = e.now
        e.controls[k].value = values[-1]
        # a setting that takes no part at these values may leave the figure as it is
        if (k, make) not in QUIET: assert e.now[0] != before[0] and e.alt != before[0]["text/plain"], k
        e.controls[k].value = values[0]
        assert e.now == start == e.first, f"{k}: the same values, another figure"
    png = base64.b64decode(start[0]["image/png"])
    assert png.startswith(b"\x89PNG") and start[1]["image/png"]["alt"] == start[0]["text/plain"]


QUIET = {("max_length", batch)}   # of packed rows only


def test_a_setting_of_packed_rows():
    draw, options = batch()
    rows = "\n".join(f"question {i} => answer {i}" for i in range(6))
    a, b = (picture(draw, rows=rows, packed=True, loss="answers", max_length=n)[0] for n in (64, 256))
    assert a["image/png"] != b["image/png"] and "6 examples in 6 rows" in a["text/plain"] and "6 examples in 1 rows" in b["text/plain"]
    said = picture(draw, rows="你好 => 很高兴", packed=False, loss="answers", max_length=256)[0]["text/plain"]
    assert "'很高兴<|im_end|>'" in said, said   # not the bytes of its tokens


def test_an_error_that_is_large_is_on_the_axis():
    draw, _ = lora()
    ax = draw(r=32, lora_alpha=256, target="mlp").axes[1]
    assert "error 300.0%" in ax.get_title() and ax.get_ylim()[1] > 3, ax.get_ylim()


# ---- what explorers share ----

def parabola(n=1, tall=False):
    fig, ax = plt.subplots(figsize=(2, 1 + tall))   # of pyplot, which keeps it
    if n == 3: raise ZeroDivisionError("n is three")
    if n == 4: raise QLoRAError("four is too much.", cure="Take less.")
    fig.set_label("" if n == 5 else f"{n} and {'tall' if tall else 'small'}.")
    return fig


def test_no_figure_stays_open():
    kept = plt.figure()
    e = Explorer(parabola, "", n=number("n", 1, 9, 1, 1))
    for n in (2, 3, 4, 5):
        if n == 2: e.controls["n"].value = n
        else:
            with pytest.raises(NotDrawn): e.controls["n"].value = n
    assert plt.get_fignums() == [kept.number]
    plt.close(kept)


@pytest.mark.parametrize("n,said", [(3, "There is no figure for n=3: ZeroDivisionError: n is three"),
                                    (4, "There is no figure for n=4: four is too much. Take less."),
                                    (5, "There is no figure for n=5: parabola: a figure says nothing")])
def test_an_error_is_one_sentence_and_the_explorer_goes_on(n, said):
    e = Explorer(parabola, "", n=number("n", 1, 9, 1, 1))
    with pytest.raises(NotDrawn) as error: e.controls["n"].value = n
    assert str(error.value).startswith(said) and error.value._render_traceback_() == [str(error.value)]
    assert e.alt == "1 and small."
    e.controls["n"].value = 2
    assert e.alt == "2 and small."


def test_an_error_at_the_start_is_raised():
    with pytest.raises(ZeroDivisionError): explore(parabola, "", n=number("n", 1, 9, 1, 3))


def test_number_and_slider_are_one():
    for low, high, step, value in ((1, 9, 1, 3), (0., 2., .05, .7)):
        box = number("n", low, high, step, value)
        assert box.value == box.slider.value == value and box.description == "n" and not box.continuous_update
        box.slider.value = high
        assert box.value == high
        box.value = low - 1
        assert box.value == box.slider.value == low


def test_every_control_says_its_name():
    made = [number("one", 1, 9, 1, 1), choice("two", 1, 2), toggle("three"), textbox("four", "x")]
    assert [o.description for o in made] == "one two three four".split()
    assert made[1].tooltips == ("two: 1", "two: 2") and choice("k", ("a", 1), ("b", 2), value=2).tooltips == ("k: a", "k: b")


def test_without_a_front_end(capsys):
    def said(): return capsys.readouterr().out.replace("\033[2K\r", "")   # IPython's way to clear a line
    e = explore(parabola, "A caption.", n=number("n", 1, 9, 1, 1), tall=toggle("tall"))
    assert said() == "1 and small.\nA caption.\nControls, where a kernel runs: n, tall.\n"
    e.controls["tall"].value = True
    assert said() == "1 and tall.\n" and repr(e) == "An explorer of n=1, tall=True."


def test_a_module_with_a_figure_loads_no_widgets():
    source = (ROOT/"qlora_nb"/"base"/"explorer.py").read_text(encoding="utf-8")
    assert not re.search(r"^(import|from) (ipywidgets|IPython|matplotlib)", source, re.M)   # nf4 and LoRA import it


PAGE = """
from matplotlib.figure import Figure
from qlora_nb.base.explorer import explore, number
def draw(n):
    fig = Figure()
    fig.set_label(f"n is {1/(3 - n)}.")
    return fig
seen = explore(draw, "A caption.", n=number("n", 1, 9, 1, 1))
"""


def page(folder, *cells):
    nbformat.write(new_notebook(cells=[new_code_cell(o.strip()) for o in cells]), path := folder/"page.ipynb")
    return path


def test_a_page_keeps_the_static_twin_and_no_widget(tmp_path):
    nb = run(page(tmp_path, PAGE, "seen.controls['n'].value = 2\nseen.alt"), kernel_manager_class=Kernels)
    shown = [o.data for c in code_cells(nb) for o in c.outputs]
    assert [[*o] for o in shown] == [["image/png", "text/plain"], *[["text/markdown", "text/plain"]]*2, ["text/plain"]]
    assert [o["text/plain"] for o in shown] == ["n is 0.5.", "A caption.", "Controls, where a kernel runs: n.", "'n is 1.0.'"]
    assert VIEW not in str(nb)


def test_an_error_behind_a_control_fails_the_page(tmp_path):
    with pytest.raises(RuntimeError, match="inside a widget callback: NotDrawn: There is no figure for n=3: ZeroDivisionError"):
        run(page(tmp_path, PAGE, "seen.controls['n'].value = 3"), kernel_manager_class=Kernels)


HOMES = ["1_foundations/03_nf4", "1_foundations/05_lora", "2_training/30_packing", "3_memory/38_gpus", "4_using/41_sampling",
         "4_using/43_several_adapters"]


@pytest.mark.parametrize("name", HOMES)
def test_the_pages_hold_them(name):
    cell, = [c for c in code_cells(read(NBS/f"{name}.ipynb")) if c.source.startswith(("seen = explor", "next_tokens", "mine =", "@cache", "def draw("))
             and "explore" in c.source]
    picture, caption, controls = (o.data for o in cell.outputs)
    assert "image/png" in picture and len(picture["text/plain"]) > 60
    assert len(caption["text/plain"]) > 30 and controls["text/plain"].startswith("Controls, where a kernel runs: ")
