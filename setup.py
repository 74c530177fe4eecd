"""Install SeeThink in editable form: `pip install -e ".[all]"`."""
from setuptools import setup

report = ["matplotlib", "tensorboard"]
hf = ["tokenizers"]
test = ["pytest", "pytest-xdist", "hypothesis", "transformers",
        "scipy"]                                    # torchvision reads the labels of Flowers102 by it

setup(
    name="seethink",
    version="0.1.0",
    description="A from-scratch reference implementation of vision-reasoning models in plain PyTorch",
    python_requires=">=3.10",
    packages=["model", "model.hub", "model.runs", "rl", "rl.report", "data", "kernels"],
    package_data={"rl.report": ["inspector.*"]},
    py_modules=["train", "eval"],
    install_requires=[
        "torch>=2.11", "torchvision", "open_clip_torch", "sentencepiece", "numpy", "einops",
        "protobuf",                                 # sentencepiece 0.2.3 tells the places of pieces by it alone
        "triton>=3.6; platform_system == 'Linux'",  # not published for macOS; everything runs without it
    ],
    extras_require={
        "report": report,
        "hf": hf,
        "test": test,
        "peers": ["trl", "liger-kernel", "cut-cross-entropy"],   # only for benches
        "all": report + hf + test,
    },
)
