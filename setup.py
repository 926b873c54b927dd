from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["webdataset"]
TEACHERS = ["mobilesam-mirror", "timm"]
EVAL = ["lvis"]
EXPORT = ["onnx", "onnxscript", "onnxruntime"]
DEMO = ["gradio>=6", "scikit-image"]
NOTEBOOKS = ["ipykernel", "ipympl", "ipywidgets", "scikit-image"]

setup(
    name="blsam",
    version="0.1.0",
    description="Segment Anything with a big.LITTLE image encoder",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["blsam", "blsam.*"]),
    package_data={"blsam.demo": ["static/*"]},
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "numpy",
        "segment-anything>=1.0",
        "opencv-python",
        "pycocotools",
        "safetensors",
        "matplotlib",
        "pillow",
        "tqdm",
    ],
    extras_require={
        "eval": EVAL,
        "train": TRAIN,
        "teachers": TEACHERS,
        "export": EXPORT,
        "demo": DEMO,
        "notebooks": NOTEBOOKS,
        "hf": ["transformers"],
        "test": ["pytest", "nbclient", "playwright", *EVAL, *TRAIN, *TEACHERS, *DEMO, *NOTEBOOKS],
    },
    entry_points={"console_scripts": ["blsam=blsam.cli:main"]},
)
