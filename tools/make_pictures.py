"""Draw the pictures that the README shows, from the code of the course, to nbs/images/.

    python tools/make_pictures.py   # after a change of base/diagrams
"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "qlora_nb"   # the same picture gives the same file
from qlora_nb.base.diagrams import qlora_layer

IMAGES = Path(__file__).parent.parent/"nbs"/"images"


def main():
    IMAGES.mkdir(exist_ok=True)
    qlora_layer().savefig(IMAGES/"qlora_layer.svg", metadata=dict(Date=None), facecolor="white")


if __name__ == "__main__": main()
