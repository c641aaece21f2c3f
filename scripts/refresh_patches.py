#!/usr/bin/env python3
"""Regenerates patches/ from an edited llama.cpp tree.

    scripts/refresh_patches.py --new-tree DIR   a patched tree to edit; its monarch/ is a link to native/
    scripts/refresh_patches.py --tree DIR       rewrites the patches and SHA256SUMS from the edited tree

Which patch owns which file is written in patches/series: add the line there before changing another upstream file.
The text above a patch's first "---" is kept. An upstream line may be removed only if patches/REMOVED_LINES lists it:
read what --allow-removals would add before using it.
"""

import argparse
import filecmp
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monarch_llamacpp import builder_patch, builder_source, paths, pin  # noqa: E402
from monarch_llamacpp.errors import MonarchError  # noqa: E402

PATCHES = ROOT / "patches"


def upstream_tree(sdist: Path | None) -> Path:
    cache = paths.cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    return builder_source.ensure_upstream(pin.read_pin(), cache, sdist)


def new_tree(upstream: Path, tree: Path) -> None:
    if tree.exists():
        raise MonarchError(f"{tree} exists: name a new folder")
    files = builder_source.upstream_files(upstream)
    files |= builder_patch.apply_patches(PATCHES, lambda path: builder_source.read_upstream(upstream, path))
    tree.mkdir(parents=True)
    builder_source.sync_tree(tree, files)
    (tree / builder_source.NATIVE).symlink_to(ROOT / "native")


def changed_files(upstream: Path, tree: Path) -> list[str]:
    """Upstream files that the tree changed. New ones (build output, monarch/) are not patches' business."""
    common = list(builder_source.upstream_files(upstream))
    _, changed, missing = filecmp.cmpfiles(upstream, tree, common, shallow=False)
    if missing:
        raise MonarchError(f"{tree}: {missing[0]} is missing: patches may not delete a file")
    return sorted(changed)


def hunks(old: Path, new: Path) -> bytes:
    command = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff", "--diff-algorithm=histogram", "-U3"]
    result = subprocess.run([*command, str(old), str(new)], stdout=subprocess.PIPE)
    if result.returncode != 1 or b"\n@@ " not in result.stdout:
        raise MonarchError(f"git diff of {new} failed with status {result.returncode}")
    return result.stdout[result.stdout.index(b"\n@@ ") + 1 :]


def patch_text(name: str, files: list[str], upstream: Path, tree: Path) -> bytes:
    file = PATCHES / name
    header = builder_patch.parse_patch(name, file.read_bytes()).header if file.exists() else b""
    if not header.strip():
        print(f"{name}: write above its first '---' why it exists and when it can go", file=sys.stderr)
    diffs = [f"--- a/{path}\n+++ b/{path}\n".encode() + hunks(upstream / path, tree / path) for path in files]
    return header + b"".join(diffs)


def refresh(upstream: Path, tree: Path, allow_removals: bool) -> None:
    series = builder_patch.read_series(PATCHES)
    changed = changed_files(upstream, tree)
    owned = [path for files in series.values() for path in files]
    if odd := set(owned).symmetric_difference(changed):
        raise MonarchError(f"{', '.join(sorted(odd))}: changed, or listed in patches/series, but not both")
    texts = {name: patch_text(name, files, upstream, tree) for name, files in series.items()}
    patches = [builder_patch.parse_patch(name, text) for name, text in texts.items()]
    if allow_removals:
        removed = builder_patch.removed_lines(patches)
        write(PATCHES / builder_patch.REMOVED, "".join(f"{line}\n" for line in sorted(removed.elements())).encode())
    builder_patch.check_removed_lines(PATCHES, patches)
    for name, text in texts.items():
        write(PATCHES / name, text)
    for stale in set(PATCHES.glob("*.patch")) - {PATCHES / name for name in series}:
        stale.unlink()
    sums = builder_patch.format_sums({path: (tree / path).read_bytes() for path in changed})
    write(PATCHES / builder_patch.SUMS, sums.encode())
    builder_patch.apply_patches(PATCHES, lambda path: builder_source.read_upstream(upstream, path))


def write(file: Path, data: bytes) -> None:
    temp = file.with_suffix(".tmp")
    temp.write_bytes(data)
    os.replace(temp, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tree", type=Path, help="the edited tree")
    what.add_argument("--new-tree", type=Path, help="make a patched tree there")
    parser.add_argument("--sdist", type=Path, help="the pinned sdist, when it is not in the cache")
    parser.add_argument("--allow-removals", action="store_true", help="rewrite REMOVED_LINES to what is removed now")
    args = parser.parse_args()
    try:
        upstream = upstream_tree(args.sdist)
        if args.new_tree:
            new_tree(upstream, args.new_tree)
        else:
            refresh(upstream, args.tree, args.allow_removals)
    except MonarchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
