"""The wheel carries the stages, the params files and the settings, from which `fedgal init` makes a project."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class WithProject(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for pattern in ("settings.ini", "nbs/stages/*.ipynb", "params/*.yaml"):
            for file in HERE.glob(pattern):
                target = Path(self.build_lib, "fedgal", "project", file.relative_to(HERE))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(cmdclass={"build_py": WithProject})
