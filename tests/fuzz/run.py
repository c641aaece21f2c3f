"""Builds the fuzz harnesses and runs them on the library that was built with AddressSanitizer.

    python tests/fuzz/run.py [--seconds 600] [--seed 1] [state|knobs ...]

A crash leaves its input in tests/fuzz/found-<harness>; fixed, it belongs into tests/fuzz/corpus/<harness>.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER.parents[1])]

from native_kernels import upstream_dir  # noqa: E402
from sanitizer import FLAGS, OPTIONS  # noqa: E402

from models import write_random_model  # noqa: E402
from monarch_llamacpp import library, paths  # noqa: E402

HARNESSES = ("state", "knobs")


def build(name: str, lib_dir: Path, folder: Path, sanitizer: str) -> Path:
    """knobs brings its sources, state uses the library."""
    program = folder / f"fuzz_{name}"
    upstream, native = upstream_dir(), paths.native_dir()
    sources = [FOLDER / "driver.cpp", FOLDER / f"fuzz_{name}.cpp"]
    link = [f"-L{lib_dir}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib_dir}", "-pthread"]
    if name == "knobs":
        sources, link = [*sources, native / "monarch-knobs.cpp"], []
    include = [f"-I{path}" for path in (upstream / "include", upstream / "ggml" / "include", native)]
    command = ["c++", "-std=c++17", *FLAGS[sanitizer], *include, *map(str, sources), "-o", str(program), *link]
    subprocess.run(command, check=True)
    return program


def run(name: str, program: Path, folder: Path, options: list[str]) -> subprocess.CompletedProcess:
    model = write_random_model(folder / f"fuzz_{name}.gguf", head_dim=32, n_head=2, n_head_kv=1, n_layer=1)
    corpus = sorted(map(str, (FOLDER / "corpus" / name).glob("*")))
    env = {key: value for key, value in os.environ.items() if not key.startswith("MONARCH")}
    env |= OPTIONS | {"FUZZ_MODEL": str(model), "LC_ALL": "C"}
    return subprocess.run([program, *options, *corpus], env=env, stdout=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("names", nargs="*", default=HARNESSES, metavar="|".join(HARNESSES))
    args = parser.parse_args()
    lib_dir = library.sanitized_dir("address")
    for name in args.names:
        program = build(name, lib_dir, lib_dir.parent, "address")
        found = FOLDER / f"found-{name}"
        options = ["-seconds", str(args.seconds), "-seed", str(args.seed), "-last", str(found)]
        done = run(name, program, lib_dir.parent, options)
        print(f"{name}: {done.stdout.strip() or f'stopped, the input is in {found}'}")
        if done.returncode != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
