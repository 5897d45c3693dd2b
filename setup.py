"Everything about the package stands in settings.ini; this file only hands it to setuptools."
import configparser, shlex
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="], inline_comment_prefixes=None)
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
course = shlex.split(cfg["course_requirements"])
scripts = [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()]

setup(name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
      long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
      url=cfg["git_url"], author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0",
      keywords=cfg["keywords"].split(), python_requires=f">={cfg['min_python']}", packages=find_packages(include=["qlora_nb*"]),
      package_data={"qlora_nb": ["*.toml", "outputs.json", "results/*.json", "results/small_falcon/*"]},
      install_requires=shlex.split(cfg["requirements"]), extras_require={"course": course, "dev": course + shlex.split(cfg["dev_requirements"])},
      entry_points={"console_scripts": scripts, "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
      classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Intended Audience :: Education",
                   "Natural Language :: English", "Programming Language :: Python :: 3"], zip_safe=False)
