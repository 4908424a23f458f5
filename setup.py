import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
package = (here / "llama" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+)"$', package, re.M)
assert version is not None, "llama/__init__.py says no version"

setup(
    name="llama",
    version=version[1],
    description="Llama weights on disk to tokens: the readable reference, at the speed of memory",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed", "demo/*.pth", "demo/*.json", "demo/*.chk", "demo/*.model"]},
    entry_points={"console_scripts": ["llama = llama.commands:main"]},
    python_requires=">=3.10",
    install_requires=(here / "requirements.txt").read_text(encoding="utf-8").split(),
    extras_require={
        "cli": ["tqdm>=4.60", "rich>=12", "prompt_toolkit>=3.0.24"],
        "gguf": ["gguf>=0.10"],
        "llama2": ["sentencepiece>=0.2"],
        "plot": ["matplotlib>=3.6"],
        "test": [
            "gguf>=0.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "sentencepiece>=0.2",
            "transformers>=4.50",
            "triton>=3.9; platform_system == 'Linux'",
        ],
        "dev": ["ruff>=0.6", "mypy>=1.11"],
    },
)
