"""Write the repository's address, which stands in settings.ini alone, into the badges and install cells of nbs/.

    python tools/make_links.py   # after changing user, repo or branch; then tools/make_readme.py and nbdev_export
"""
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def fix_links(text, cfg):
    "`text` of a notebook file with the address of `cfg` in each link to this project, whoever it named before."
    user, repo, branch = cfg["user"], cfg["repo"], cfg["branch"]
    badge = r"(research\.google\.com/github/)[\w.-]+/[\w.-]+/blob/[^\s\"')]+?(/(?:(?:\d_\w+|base|apps|classroom|zh)/\w+|index)\.ipynb)"
    text = re.sub(badge, rf"\g<1>{user}/{repo}/blob/student\2", text)   # the version without solutions
    text = re.sub(r"""(pip install -q (?:--no-deps )?\\?["']?git\+)https://[^@\s]+@[\w./-]+""", rf"\g<1>{cfg['git_url']}@{branch}", text)
    return re.sub(rf"(\b(?:github\.com|raw\.githubusercontent\.com|/github)/)[\w.-]+/{re.escape(repo)}(?![\w-])",
                  rf"\g<1>{user}/{repo}", text)


def main():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        old = path.read_text(encoding="utf-8")
        if (new := fix_links(old, cfg["DEFAULT"])) != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(path.relative_to(ROOT))


if __name__ == "__main__": main()
