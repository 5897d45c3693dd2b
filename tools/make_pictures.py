"""Draw the pictures that the README shows, from the code of the course, to nbs/images/.

    python tools/make_pictures.py   # after a change of base/diagrams
"""
from pathlib import Path

import matplotlib

from make_course import course
from qlora_nb.base.diagrams import note, part_map, qlora_layer

IMAGES = Path(__file__).parent.parent/"nbs"/"images"


ASKS = dict(zip(range(1, 8), ("How does it work?", "How do I train?", "Does it fit?", "How do I use it?", "Was it worth it?",
                              "What is still better?", "What is faster?")))


def course_parts(parts):
    "{part: parts that its pages want to be known} as `part_map` takes it."
    lessons = [p for p in parts if p["folder"][0].isdigit()]
    of = {page["name"]: p["folder"][0] for p in lessons for page in p["page"]}
    return {f"{p['folder'][0]} {p['title']}": " ".join(sorted({of[o] for page in p["page"] for o in page["first"] if o in of} - {p["folder"][0]}))
            for p in lessons}


def course_map(parts):
    "The parts of the course in their order; the figure's label is the alternative text on the index."
    fig, ax = (fig := part_map(course_parts(parts))), fig.axes[0]
    for box in [t for t in ax.texts if t.get_text()[:1].isdigit()]:
        note(ax, 3.2, box.get_position()[1], ASKS[int(box.get_text()[0])], ha="left")
    fig.set_label(fig.get_label().replace(" pages in their order", " parts in their order"))
    return fig


def main():
    IMAGES.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "qlora_nb"   # the same picture gives the same file
    how = dict(metadata=dict(Date=None), facecolor="white")
    qlora_layer().savefig(IMAGES/"qlora_layer.svg", **how)
    course_map(course()).savefig(IMAGES/"course_map.svg", **how)


if __name__ == "__main__": main()
