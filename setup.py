"""What pyproject.toml cannot say: the recipes at the top of the repository ship in the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        # An editable install finds them where they are.
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib) / "elm_trainer" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
