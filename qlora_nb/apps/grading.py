"""Grade a folder of submissions: points for each exercise, the message of the check, the misconception behind it."""
import re, time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tqdm import tqdm
from ..base.errors import QLoRAError
from .exercises import exercises_of
from .sandbox import Limits, Sandbox
from .submissions import read_submissions

# %%
def pages_of(source:str|Path) -> dict:  # {name: list of `Exercise`}
    "The exercises of a notebook, or of all notebooks in a folder."
    source = Path(source).expanduser()
    files = [source] if source.is_file() else sorted(source.rglob("*.ipynb"))
    pages = {o.stem: exercises_of(o) for o in files if ".ipynb_checkpoints" not in o.parts}
    if not any(pages.values()):
        raise QLoRAError("there are no exercises here.", str(source),
                         "Give the notebooks with the solutions, such as nbs.")
    return {k: v for k, v in pages.items() if v}

# %%
def first_line(message:str) -> str:
    "A message as one line of at most 300 printable letters."
    line = next((o for o in message.splitlines() if o.strip()), "It fails.")
    line = "".join(o if o.isprintable() else " " for o in line)
    return line[:300].encode("utf-8", "replace").decode()

def without_numbers(message:str) -> str: return re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "#", message)

# %%
@dataclass
class Result:
    "What one exercise of one submission earned."
    student:str
    page:str
    slug:str
    points:float
    most:float             # Points of a right answer
    message:str|None       # Why not all of them
    misconception:str|None # Which of the known mistakes says the same
    seconds:float
    when:datetime          # The file was handed in

# %%
class Graded:
    "A page with its sandbox and what is known about wrong answers."
    def __init__(self, name, exercises, limits, isolated, more=()):
        self.name, self.exercises, self.known, self.memory = name, exercises, {}, {}
        self.open = lambda: Sandbox(exercises[0].setup, limits, isolated, more)
        self.box = self.open()
    def run(self, ex, code, seconds=None) -> str|None:  # What is wrong
        "Check an answer. One that ends the page's process costs only itself."
        try: said = self.box.check(code, ex.solution, ex.check, seconds)
        except OSError:
            self.box.close()
            self.box, said = self.open(), "It ended the process of the page."
        return said and first_line(said)
    def seen(self, ex, code, seconds):
        "`run`, once for answers that are the same letter by letter."
        if (ex.slug, code) in self.memory: return self.memory[ex.slug, code]
        message = self.run(ex, code, seconds)
        if seconds >= self.box.limits.seconds: self.memory[ex.slug, code] = message
        return message
    def learn(self, bar=None):
        "Run the solutions, which must pass, and the known mistakes, which tell their messages."
        for ex in self.exercises:
            if said := self.run(ex, ex.solution):
                self.close()
                raise QLoRAError(f"the solution of '{ex.slug}' fails its own check ({said}).",
                                 self.name, "Answers must be functions and plain values.")
            for name, code in ex.wrong.items():
                said = without_numbers(self.run(ex, code) or "")
                self.known.setdefault((ex.slug, said), []).append(name)
                if bar is not None: bar.update()
    def misconception(self, ex, message) -> str|None:
        return " or ".join(self.known.get((ex.slug, without_numbers(message)), [])) or None
    def close(self): self.box.close()

# %%
def grade_one(page, sub, total, bar=None) -> list:
    "The results of a submission. Time that it does not use for one exercise is left for others."
    results, end = [], time.monotonic() + total
    for ex in page.exercises:
        code, start = sub.answers[ex.slug], time.monotonic()
        if code is None: message = "It is not answered."
        elif start > end: message = f"The {total:.0f} s of the submission are used up."
        else: message = page.seen(ex, code, end - start)
        results.append(Result(sub.student, sub.page, ex.slug, 0 if message else ex.points, ex.points,
                              message, message and page.misconception(ex, message),
                              time.monotonic() - start, sub.when))
        if bar is not None: bar.update()
    return results

# %%
@dataclass
class Grades:
    "A graded class."
    results:list    # Of `Result`
    problems:list   # Of (path, why it could not be graded)
    pages:dict      # {name: list of `Exercise`}
    known:dict      # {page: {(slug, message): misconceptions}}

def grade(folder:str|Path,             # FOLDER/<student>/<page>.ipynb or FOLDER/<student>.ipynb
          source:str|Path,             # The instructor's notebook, or a folder of them
          limits:Limits|None=None,     # Of one exercise
          total:float=120,             # Seconds of one submission
          isolated:bool=True,          # False: answers see files and network
          progress:bool=True,          # A bar with the time left
          more:list=()                 # More files and folders that set-up cells read
         ) -> Grades:
    "Grade a class. Whatever a submission does, it costs only itself."
    pages = pages_of(source)
    subs, problems = read_submissions(folder, pages)
    used = {k: v for k, v in pages.items() if any(o.page == k for o in subs)}
    steps = sum(len(ex.wrong) for v in used.values() for ex in v) + sum(len(o.answers) for o in subs)
    results, known = [], {}
    with tqdm(total=steps, desc="grading", unit="answer", disable=not progress) as bar:
        for name, exercises in used.items():
            page = Graded(name, exercises, limits, isolated, more)
            try:
                page.learn(bar)
                for sub in subs:
                    if sub.page == name: results += grade_one(page, sub, total, bar)
            finally: page.close()
            known[name] = page.known
    return Grades(results, problems, used, known)
