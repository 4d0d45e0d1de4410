"""Pack what a GPU machine without a network lacks, to be carried there: `python -m benchmarks.carry --data PUSHT`.

For a machine that has Python, PyTorch, torchvision, accelerate, pandas, pyarrow, OpenCV and what goes with them already
(SciPy, matplotlib, einops, psutil, xxhash, safetensors). The packages below, without symbols, tests and type stubs, go
into `.carry/site.tar.xz` (33 MB), PushT's dataset beside it. Unpack them into a folder that PYTHONPATH names. `.carry`
is nobody's but this checkout's: put `/.carry/` into `.git/info/exclude`.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import shutil
import subprocess
import tempfile
from pathlib import Path

MISSING = (
    "antlr4-python3-runtime",
    "av",
    "cffi",
    "datasets",
    "diffusers",
    "dill",
    "draccus",
    "farama-notifications",
    "getiaction",
    "gym-pusht",
    "gymnasium",
    "hydra-core",
    "jsonlines",
    "lerobot",
    "mergedeep",
    "multiprocess",
    "omegaconf",
    "platformdirs",
    "pycparser",
    "pygame",
    "pymunk",
    "pytz",
    "shapely",
    "termcolor",
    "typing-inspect",
    "tzdata",
)
LEFT_OUT = ("__pycache__", "tests", "test", "docs", "examples")
UNREAD = (".pyi", ".pyx", ".pxd", ".h", ".c", ".cpp")
COMMAND = """on that machine, in the checkout:
  mkdir /tmp/site && tar -xJf .carry/site.tar.xz -C /tmp/site && export PYTHONPATH=$PWD:/tmp/site HF_HUB_OFFLINE=1
  python -m benchmarks.gpu --pictures .carry/pusht"""


def copy(name: str, folder: Path) -> None:
    """Copy a distribution's files into `folder`, as they lie among the installed packages.

    Raises:
        PackageNotFoundError: it is not installed here.
    """
    distribution = metadata.distribution(name)
    for file in distribution.files or ():
        source, parts = Path(str(distribution.locate_file(file))), file.parts
        if parts[0] == ".." or {*parts} & {*LEFT_OUT} or source.suffix in UNREAD or not source.is_file():
            continue
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / file)


def strip(folder: Path) -> None:
    """Take the symbols out of shared libraries; one that cannot do without stays as it is."""
    if shutil.which("strip") is None:
        print("strip is not installed (binutils): the archive will be larger")
        return
    for library in [path for path in folder.rglob("*.so*") if path.is_file()]:
        subprocess.run(["strip", "--strip-unneeded", library], check=False, capture_output=True)


def main() -> None:
    """Pack the packages and the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="PushT's dataset, to carry as well")
    parser.add_argument("--out", type=Path, default=Path(".carry"))
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    archive = arguments.out / "site.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        for name in MISSING:
            copy(name, Path(folder))
        strip(Path(folder))
        with archive.open("wb") as file:
            tar = subprocess.Popen(["tar", "-c", "-C", folder, "."], stdout=subprocess.PIPE)
            subprocess.run(["xz", "-9e", "--threads=0"], stdin=tar.stdout, stdout=file, check=True)
            if tar.wait():
                raise SystemExit("tar failed")
    if arguments.data:
        shutil.copytree(arguments.data, arguments.out / arguments.data.name, dirs_exist_ok=True)
    sizes = {
        path.name: sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file())
        for path in arguments.out.iterdir()
    }
    print(*(f"{arguments.out / name}: {size / 2**20:.1f} MiB" for name, size in sizes.items()), COMMAND, sep="\n")


if __name__ == "__main__":
    main()
