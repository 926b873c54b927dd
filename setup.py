"""Packages and their files; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["blsam", "blsam.*"]), "blsam.weights"],
    package_dir={"blsam.weights": "checkpoints"},  # an editable install reads them where they lie
    include_package_data=False,  # what follows is all
    package_data={
        "blsam": ["py.typed"],
        "blsam.demo": ["static/*"],
        "blsam.weights": ["*vit_t.safetensors", "*vit_t_fine.safetensors", "MODEL_CARD.md", "README.md"],
    },
)
